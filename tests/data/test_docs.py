"""docs/data.md stays true: every name in it exists, and its Python runs."""

import re
from pathlib import Path

import pytest
import yaml

from sheepfold.config import DataSettings
from sheepfold.data.assign import PARTITIONERS
from sheepfold.data.sources import NAMED
from sheepfold.data.wordings import WORDINGS

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_every_source_partitioner_and_template_is_named() -> None:
    for name in (*NAMED, *PARTITIONERS, *WORDINGS):
        assert f"`{name}`" in PAGE, name


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_its_settings_are_settings(text: str) -> None:
    assert DataSettings.model_validate(yaml.safe_load(text)["data"])


def test_its_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.startswith("{")
