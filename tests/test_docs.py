"""The documents stay true: their Python runs, their commands exit with 0, their experiment files are valid.

Each document is one story, told from top to bottom in a folder of its own, which has the clone's recipes in it.

    ```python              is executed; the blocks of a document share one namespace
    ```python, ```yaml     whose first line is a comment with a file's name (# own.yaml) is also written to that file
    ```yaml                is a whole or partial experiment
    ```console, ```sh      lines that begin with `sheepfold` or `$ sheepfold` go through the command line; runs of the
                           demo are made smaller (SMALLER)
    <!-- not run: why -->  on the line above a block leaves it alone, or checks only that its options exist
"""

import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from sheepfold import cli
from sheepfold.config import build
from tests.marks import mostly_slow

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}

BLOCK = re.compile(r"^(?P<fence>`{3,})(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=fence)[ ]*$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^>]*\S) -->\s*\Z")
FILE_NAME = re.compile(r"\A# (?P<name>[\w./-]+\.\w+)\n")


SMALLER = {
    "recipes/demo.yaml": (
        "data.partition.holdout_per_category=1",
        "train.steps=1",
        "train.batch_rows=2",
        "evaluation.rows_per_client=2",
        "evaluation.generation.max_new_tokens=4",
    )
}
"""Experiment file -> what is added to a `run` of it: its full size takes a minute, and documents run it often."""


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int
    runs: bool


def blocks(text: str) -> list[Block]:
    """Return a document's code blocks, in order."""
    return [
        Block(found["language"], found["text"], text.count("\n", 0, found.start()) + 1, not _left_alone(text, found))
        for found in BLOCK.finditer(text)
    ]


def _left_alone(text: str, found: re.Match[str]) -> bool:
    return NOT_RUN.search(text[: found.start()].rstrip("\n")) is not None


def commands(text: str) -> list[list[str]]:
    """Return the words of every sheepfold command; a line's end in a backslash goes on."""
    lines = (line.strip().removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines())
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"sheepfold(\s|$)", line)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with the clone's recipes, to be in; modules made there are forgotten afterwards."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHEEPFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    modules, threads = set(sys.modules), torch.get_num_threads()
    torch.set_num_threads(1)  # models are tiny here: two threads only wait for each other where cores are shared
    yield tmp_path
    torch.set_num_threads(threads)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("name", mostly_slow(DOCUMENTS, quick=["README.md"]))
def test_a_document_runs_from_top_to_bottom(name, folder, monkeypatch):
    namespace: dict[str, object] = {"__name__": "document"}
    for block in blocks(DOCUMENTS[name].read_text(encoding="utf-8")):
        where = f"{name}:{block.line}"
        if block.runs and (named := FILE_NAME.match(block.text)):
            (folder / named["name"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / named["name"]).write_text(block.text, encoding="utf-8")
        if block.language == "yaml" and block.runs:
            build(yaml.safe_load(block.text), source=where)
        if block.language == "python" and block.runs:
            exec(compile(block.text, where, "exec"), namespace)
        if block.language in ("console", "sh"):
            for words in commands(block.text):
                assert_it_works(words, where, monkeypatch) if block.runs else assert_it_exists(words, where)


def assert_it_works(words: list[str], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [word for word in words if word.endswith(".yaml")] or ["recipes/demo.yaml"]
    smaller = SMALLER.get(files[0], ()) if words[0] == "run" else ()
    monkeypatch.setattr(sys, "argv", ["sheepfold", *words, *smaller])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None), f"{where}: sheepfold {shlex.join(words)} ended with {end.value.code}"


def assert_it_exists(words: list[str], where: str) -> None:
    """Check a command that cannot run here: it is one of ours, and its recipe and options exist."""
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    known |= {group.name for group in cli.app.registered_groups}
    assert not words or words[0].startswith("-") or words[0] in known, f"{where}: no command {words[0]!r}"
    for recipe in (word for word in words if word.startswith("recipes/")):
        assert (ROOT / recipe).is_file(), f"{where}: no {recipe}"
    for path in (word.partition("=")[0] for word in words if "=" in word and not word.startswith("-")):
        section = build({})
        for part in path.split("."):
            if isinstance(section, Mapping):
                break  # arguments that a method, not the file, knows
            assert hasattr(section, part), f"{where}: no option {path}"
            section = getattr(section, part)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_comment_about_a_block_is_one_that_is_understood(name):
    text = DOCUMENTS[name].read_text(encoding="utf-8")
    for found in re.finditer(r"<!--\s*not[ -]run.*?-->", text, re.DOTALL | re.IGNORECASE):
        assert NOT_RUN.fullmatch(found[0]), f"{name}: {found[0]!r}: expected <!-- not run: reason -->"
        assert text[found.end() :].lstrip("\n").startswith("```"), f"{name}: {found[0]!r} is not above a block"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_inside_the_project_leads_somewhere(name):
    text = BLOCK.sub("", DOCUMENTS[name].read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (DOCUMENTS[name].parent / path).resolve() if path else DOCUMENTS[name]
        assert file.exists(), f"{name}: {target} leads nowhere"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{name}: no heading for {target}"


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?)\s*$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_a_block_knows_its_language_its_line_and_whether_it_runs():
    python = "a\n\n```python\nx = 1\n```\n\n"
    text = python + "<!-- not run: needs a hub -->\n```sh\n$ sheepfold run \\\n  a=1  # why\nls\n```\n"
    first, second = blocks(text)
    assert (first.language, first.text, first.line, first.runs) == ("python", "x = 1\n", 3, True)
    assert (second.runs, commands(second.text)) == (False, [["run", "a=1"]])


@pytest.mark.parametrize("line", ["sheepfold runn", "sheepfold run recipes/no.yaml", "sheepfold run train.stepz=1"])
def test_a_command_that_is_left_alone_must_still_exist(line):
    with pytest.raises(AssertionError, match=r"docs/x.md:1: no "):
        assert_it_exists(commands(line)[0], "docs/x.md:1")
