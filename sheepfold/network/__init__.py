"""A run whose clients are other machines: what both sides agree on, and the server's end. Knows of no transport."""
