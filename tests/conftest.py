"""What all tests share: where the data and models beside the project are, if they are."""

import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

# Cores are shared and imports are slow: a deadline would fail examples for the machine's sake.
# Where a change is judged, the same examples every time; elsewhere, new ones.
settings.register_profile("sheepfold", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("sheepfold")


@pytest.fixture(scope="session")
def lab() -> Path:
    """The shared folder: $SHEEPFOLD_SHARED, else ../shared beside the repository. For tests marked `lab`."""
    here = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("SHEEPFOLD_SHARED") or here.parent / "shared")
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data at {folder}; set SHEEPFOLD_SHARED to the folder that has it")
    return folder
