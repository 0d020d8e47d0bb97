"""How far the cohort engine is from plain PEFT, one client at a time: ragged rows, unequal steps, ranks 2, 4 and 8.

python benchmarks/equality.py
"""

import contextlib
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from sheepfold.config import TrainSettings
from tests import small


def main() -> None:
    """Print the largest difference between two engines' numbers, for every family and dtype."""
    train = TrainSettings(epochs=5, batch_rows=4, micro_rows=2, lr=1e-3, schedule="linear", weight_decay=0.01)
    ranks = {"ann": 2, "bob": 4, "cleo": 8, "dora": 4}
    print("AdamW, peak lr 1e-3, 20, 15, 20 and 25 steps; largest absolute difference over all adapters")
    print("| family | float64 | float32 |\n|---|---:|---:|")
    for family in small.FAMILIES:
        gaps = []
        for dtype in (torch.float64, torch.float32):
            base = small.model(dtype, family)
            start = {c: small.adapter(base, r, i, family, dtype) for i, (c, r) in enumerate(ranks.items())}
            work = small.assignments(start)
            # so that float64 is measured, and not the float32 that families take softmax and norms in
            with small.Whole() if dtype == torch.float64 else contextlib.nullcontext():
                engine = small.cohort_engine(base, train, family)
                ours = {u.client: u.adapter for u in engine.train(work)}
                engine.close()
                reference = {u.client: u.adapter for u in small.peft_engine(base, train, family).train(work)}
            gaps.append(max(small.gap(ours[c], reference[c]) for c in ours))
        print(f"| {family} | {gaps[0]:.1e} | {gaps[1]:.1e} |", flush=True)


if __name__ == "__main__":
    main()
