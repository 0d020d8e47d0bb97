"""A client machine's file: read from its own folder, and every mistake in it is one line."""

import pytest

from sheepfold.errors import ConfigError
from sheepfold.node.policy import Policy
from sheepfold.node.settings import read_node

PLAIN = "name: ward-7\nserver: fold.example.org:8443\nca: ca.crt\nkey: keys/own.key\ndata: rows.jsonl\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "keys").mkdir()
    for name in ("ca.crt", "keys/own.key", "rows.jsonl"):
        (tmp_path / name).write_text("")
    return tmp_path


def written(folder, text):
    (folder / "node.yaml").write_text(text)
    return folder / "node.yaml"


def test_paths_are_taken_from_the_files_own_folder(folder, monkeypatch):
    monkeypatch.chdir("/")
    (folder / "gentle.yaml").write_text("max_rank: 4\n")
    (folder / "base").mkdir()
    node = read_node(written(folder, PLAIN + "policy: gentle.yaml\nmodel: base\n"))
    assert (node.ca, node.key) == (folder / "ca.crt", folder / "keys" / "own.key")
    assert (node.data, node.model) == (str(folder / "rows.jsonl"), str(folder / "base"))
    assert node.folder == folder / "ward-7"
    assert node.policy == Policy(max_rank=4)
    assert node.ledger.parent == node.folder


def test_names_of_sets_and_bases_stay_names(folder):
    (folder / "dolly").mkdir()  # a folder of that name does not hide the set
    text = PLAIN.replace("rows.jsonl", "dolly") + "model: owner/base\nfolder: own\npolicy: {generation: true}\n"
    node = read_node(written(folder, text))
    assert (node.data, node.model, node.folder) == ("dolly", "owner/base", folder / "own")
    assert node.policy == Policy(generation=True)
    assert read_node(written(folder, PLAIN.replace("rows.jsonl", "owner/set"))).data == "owner/set"


def test_what_is_told_to_others_has_no_places_of_this_machine_in_it(folder):
    node = read_node(written(folder, PLAIN))
    assert node.unnamed(f"{node.data}: row 3 of {node.folder}/runs") == "(its data): row 3 of (its folder)/runs"


WRONG = {
    "nothing": ("", r"node.yaml: name is missing; it is this machine's name"),
    "a typing error": (PLAIN + "polcy: {}\n", r"unknown key 'polcy'; did you mean 'policy'\?"),
    "one in the policy": (PLAIN + "policy: {max_rnk: 4}\n", r"'policy.max_rnk'; did you mean 'max_rank'\?"),
    "a policy that is none": (PLAIN + "policy: {max_rank: 0}\n", r"policy.max_rank: found 0; input should be greater"),
    "no policy file": (PLAIN + "policy: none.yaml\n", r"none.yaml: no such policy file; leave `policy` out"),
    "a server without a port": (
        PLAIN.replace(":8443", ""), r"server: found 'fold.example.org'; expected host:port, such as"
    ),
    "a name like a path": (PLAIN.replace("ward-7", "../ward"), r"name: found '../ward'; .* without slashes"),
    "no key": (PLAIN.replace("keys/own.key", "other.key"), r"key: no such file .*/other.key; `sheepfold certs"),
    "no rows": (PLAIN.replace("rows.jsonl", "gone.jsonl"), r"data: no such file or folder .*/gone.jsonl; expected a"),
    "no mapping": ("- name\n", r"node.yaml: expected `key: value` lines, found a list"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line(folder, case):
    text, why = WRONG[case]
    with pytest.raises(ConfigError, match=why) as raised:
        read_node(written(folder, text))
    assert "\n" not in str(raised.value)


def test_no_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml: no such node file; docs/deploy.md has one"):
        read_node(tmp_path / "none.yaml")
