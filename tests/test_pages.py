"""Pages, opened in headless Chromium."""

import shutil
import subprocess
from pathlib import Path

import pytest

from sheepfold.data.prepare import partition_only
from sheepfold.data.table import counts, heatmap_html
from tests.runs import experiment

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]


def browse(page: Path, *options: str) -> str:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install your system's chromium package to run the page tests")
    command = [CHROMIUM, *QUIET, "--window-size=1200,900", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_heat_map_shows_every_client_and_every_number(tmp_path):
    table = counts(partition_only(experiment(tmp_path).data))
    page = tmp_path / "map.html"
    page.write_text(heatmap_html(table), encoding="utf-8")
    text = browse(page, "--dump-dom")
    for client in table.clients:
        assert client in text
    browse(page, f"--screenshot={tmp_path / 'map.png'}")
    from PIL import Image

    picture = Image.open(tmp_path / "map.png").convert("RGB")
    colours = {colour for _, colour in picture.getcolors(1 << 24)}
    assert picture.size == (1200, 900)
    assert len(colours) > 20, "a blank page has one colour"
