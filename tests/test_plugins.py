"""Own parts by name, and the package's public names."""

import pytest

import sheepfold
from sheepfold import plugins
from sheepfold.errors import ConfigError


def test_a_part_is_found_by_name_or_by_module_and_attribute(tmp_path, monkeypatch):
    assert plugins.find({"one": abs}, "one", "key") is abs
    assert plugins.find({}, "builtins:max", "key") is max
    (tmp_path / "my_own_part.py").write_text("def part(a, b=2):\n    return a + b\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.resolve({}, "my_own_part:part", "key", {"a": 1}) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("onee", "key: no 'onee'; did you mean 'one'"),
        (":x", "key: no ':x'"),
        ("nowhere:x", "no module 'nowhere'"),
        ("math:nothing", "has no 'nothing'"),
        ("math:pi", "expected something to call"),
    ],
)
def test_what_is_not_there_is_one_line_with_the_option(name, message):
    with pytest.raises(ConfigError, match=message):
        plugins.find({"one": abs}, name, "key")


def test_an_own_modules_failing_import_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "my_broken_part.py").write_text("import something_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_not_installed"):
        plugins.find({}, "my_broken_part:part", "key")


def test_every_public_name_is_there_and_the_list_is_sorted():
    assert list(sheepfold.__all__) == sorted(sheepfold.__all__)
    for name in sheepfold.__all__:
        assert getattr(sheepfold, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sheepfold.nonsense
