"""Talking to what a run made: one conversation as a value, shown by a page in the browser or by the terminal."""
