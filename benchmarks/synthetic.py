"""Rows of many clients, written by the benchmark: a few hundred words, of which each client knows forty."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SYLLABLES = ("ba", "ri", "mo", "tel", "sun", "ka", "ver", "lo", "pin", "dra", "che", "fu")


def records(clients: int, rows: int, words: int = 12, seed: int = 0) -> Iterator[dict[str, str]]:
    """Yield each client's rows, client after client: about `words` words to read and a third as many to answer."""
    rng = np.random.default_rng(seed)
    known = np.array(["".join(rng.choice(SYLLABLES, rng.integers(1, 4))) for _ in range(400)])
    for client in range(clients):
        own = rng.choice(known, 40)
        for _ in range(rows):
            asked, answered = (own[rng.integers(0, 40, max(1, rng.poisson(n)))] for n in (words, words / 3))
            yield {"instruction": " ".join(asked), "output": " ".join(answered), "client": f"client-{client:04d}"}


def write(path: Path, clients: int, rows: int, words: int = 12) -> Path:
    """Write these rows as JSON lines, and return the file."""
    with path.open("w") as file:
        for row in records(clients, rows, words):
            file.write(json.dumps(row) + "\n")
    return path
