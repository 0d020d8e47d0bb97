"""The harness without its log and its bars, and with nobody else's random numbers disturbed."""

import contextlib
import logging
import random
import warnings
from collections.abc import Iterator
from functools import partial

import numpy as np


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep the harness's information and warnings off the terminal; what it raises comes through."""
    from lm_eval.api import task

    from sheepfold.data.files import quiet_datasets
    from sheepfold.loading import quiet

    log, bar = logging.getLogger("lm_eval"), task.tqdm
    level = log.level
    log.setLevel(logging.ERROR)
    task.tqdm = partial(bar, disable=True)
    try:
        with quiet(), quiet_datasets(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        task.tqdm = bar


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start the global generators, which the harness draws from, at this seed, and put them back afterwards."""
    import torch

    before, numpy_before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numpy_before)
