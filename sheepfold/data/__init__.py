"""Rows: where they come from, who holds them, and how they become tokens."""
