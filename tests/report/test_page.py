"""The page says what the facts are, and nothing more."""

import json
import re
import shutil
from html import unescape

import pytest

from sheepfold.evaluation.benchmarks.results import Report, Score, TaskResult
from sheepfold.report import dumbbells, page, words
from sheepfold.report.facts import read_run
from tests.report.conftest import HOSTILE, journal, renamed


def text(html: str) -> str:
    """Return what a reader reads."""
    plain = re.sub(r"<(script|style).*?</\1>", " ", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", plain)))


def section(html: str, name: str) -> str:
    found = re.search(rf'<section id="{name}".*?</section>', html, re.DOTALL)
    assert found, name
    return text(found[0])


@pytest.fixture(scope="module")
def made(ran):
    return page.content([read_run(ran)])


def test_the_verdict_comes_first_and_has_the_journals_figures(ran, facts, made):
    lines, verdict = journal(ran), " ".join(words.verdict(facts))
    ends = [line["held_out"]["loss"]["weighted"] for line in (lines[0], lines[-1])]
    assert f"from {ends[0]:.3f} to {ends[1]:.3f} nats per token" in verdict
    assert ("fell" in verdict) == (ends[1] < ends[0])
    scores = json.loads((ran / "closing.json").read_text())["scores"]["loss"]
    better = sum(scores[f"client-{i}"]["personal"] < scores[f"client-{i}"]["local"] for i in range(4))
    assert f"{better} of 4 clients' own rows by held-out loss" in verdict
    answers = sum(len(line["clients"]) for line in lines[1:])
    sent = sum(line["uplink_bytes"] for line in lines[1:])
    assert f"A client sent {words.size(sent / answers)} a round on average" in verdict
    assert made.index(verdict[:40]) < made.index("<section")


def test_without_baselines_the_verdict_says_what_is_not_known(copied):
    folder = copied(baselines=[], evaluation__metrics=[], personal__finetune_steps=None)
    (folder / "closing.json").unlink()
    assert "Whether joining beat training alone is not known" in " ".join(words.verdict(read_run(folder)))
    assert "Not known" in section(page.content([read_run(folder)]), "joining")


def test_a_loss_that_rose_is_not_called_a_fall(copied):
    def worse(line):
        line["held_out"]["loss"]["weighted"] = 3.0 + line["round"]
        return line | {"rose": line["round"] > 0}

    facts = read_run(copied(lines=worse))
    said = " ".join(words.verdict(facts))
    assert "held-out loss rose from 3.000 to 5.000" in said
    assert "its lowest was 3.000, before round 1" in said
    assert "it rose in 2 rounds (1, 2)" in section(page.content([facts]), "rounds")


def test_every_score_of_the_closing_table_is_on_the_page(ran, made):
    shown = section(made, "joining")
    scores = json.loads((ran / "closing.json").read_text())["scores"]
    for measure, table in scores.items():
        for client in (f"client-{i}" for i in range(4)):
            row = [
                words.figure(table[client][w], measure)
                for w in ("base", "local", "federated", "personal", "centralised")
            ]
            assert f"{client} {' '.join(row)}" in shown


def test_a_clients_score_says_on_how_many_rows_it_rests(ran, copied, made):
    data = json.loads((ran / "data.json").read_text())
    counts = [rows["eval"] for rows in data["clients"].values()]
    assert f"A client's own score rests on {min(counts)}" in section(made, "joining")
    data["clients"]["client-0"]["eval"] = max(counts) + 70
    folder = copied()
    (folder / "data.json").write_text(json.dumps(data))
    most = max(counts) + 70
    low = min(rows["eval"] for rows in data["clients"].values())
    assert f"rests on {low} to {most} held-out rows, by client" in section(page.content([read_run(folder)]), "joining")


def test_an_adapter_cut_to_a_clients_rank_is_not_called_one_it_takes_home(copied, made):
    assert "personal adapter, which a client takes home" in section(made, "joining")
    folder = copied(personal__finetune_steps=None)
    shutil.rmtree(folder / "personal")
    shown = section(page.content([read_run(folder)]), "joining")
    assert "the shared adapter cut to the client's own rank" in shown
    assert "takes home" not in shown


def test_marks_of_equal_scores_do_not_cover_each_other(facts):
    scores = {"a": {"base": 0.1, "local": 0.5, "federated": 0.5, "personal": 0.5}, "b": {"local": 0.2, "personal": 0.9}}
    drawn = dumbbells.dumbbells(["a", "b"], scores, "exact_match", "personal")
    marks = {trace.name: dict(zip(trace.text, trace.y, strict=True)) for trace in drawn.data if trace.mode == "markers"}
    heights = [marks[name]["a"] for name in ("alone", "federated", "personal")]
    assert len(set(heights)) == 3
    assert max(heights) - min(heights) < 0.9
    assert marks["base"]["a"] == 0
    assert marks["alone"]["b"] == marks["personal"]["b"] == 1


def test_bytes_and_seconds_are_the_journals(ran, made):
    shown = section(made, "cost")
    for line in journal(ran)[1:]:
        sizes = f"{words.size(line['uplink_bytes'])} {words.size(line['downlink_bytes'])}"
        assert f"{line['round']} {len(line['clients'])} {sizes}" in shown
        assert f"{line['seconds']['forward']:.2f} {line['seconds']['backward']:.2f}" in shown


def test_the_heat_map_has_every_count(facts, made):
    shown = section(made, "data")
    for client, row in zip(facts.table.clients, facts.table.rows, strict=True):
        assert f"{client} {' '.join(str(n) if n else '·' for n in row)} {row.sum()}" in shown


def test_skipped_steps_and_absences_are_told_with_their_reasons(copied):
    def damage(line):
        if line["round"] == 2:
            first, second, *_ = line["clients"]
            line["clients"][first] |= {"skipped_steps": 2, "why_skipped": "the loss was nan"}
            del line["clients"][second]
            line["absent"] = {second: "no answer within 30 s"}
        return line

    folder = copied(lines=damage)
    data = json.loads((folder / "data.json").read_text()) | {"dropped": {"without an answer": 7}, "notes": ["a note"]}
    (folder / "data.json").write_text(json.dumps(data))
    shown = section(page.content([read_run(folder)]), "faults")
    assert "without an answer 7" in shown
    assert "a note" in shown
    assert "2 optimizer steps of" in shown
    assert "the loss was nan" in shown
    assert "1 time a sampled client sent no update" in shown
    assert "no answer within 30 s" in shown


def test_an_older_run_says_that_it_did_not_count(copied):
    folder = copied()
    data = json.loads((folder / "data.json").read_text())
    del data["categories"], data["ranks"], data["versions"]
    (folder / "data.json").write_text(json.dumps(data))
    made = page.content([read_run(folder)])
    assert "did not write down its clients' categories" in section(made, "data")
    assert "this run did not write down" in section(made, "ranks")


def test_of_many_clients_the_largest_are_shown_and_the_rest_counted(copied):
    folder = copied()
    data = json.loads((folder / "data.json").read_text())
    names = [f"c{i}" for i in range(1600)]
    data["categories"] = {"names": ["a", "b"], "rows": {n: {str(i % 2): i + 1} for i, n in enumerate(names)}}
    (folder / "data.json").write_text(json.dumps(data))
    shown = section(page.content([read_run(folder)]), "data")
    assert "The 40 clients with the most rows are shown; the other 1,560 are one line" in shown
    assert "c1599 · 1,600 1,600" in shown
    assert "c1559 " not in shown
    rest = sum(range(1, 1561))
    assert f"1,560 others 608,400 609,180 {rest:,}" in shown


def test_benchmark_results_are_shown_and_a_broken_file_is_named(copied):
    folder = copied()
    results = {
        name: TaskResult({"acc,none": Score(value, 0.01)}, 40) for name, value in (("algebra", 0.3), ("law", 0.1))
    }
    results["mmlu"] = TaskResult({"acc,none": Score(0.2)}, 80, ("algebra", "law"))
    Report(("mmlu",), {"federated": "0" * 64}, {"federated": results}, {}).write(folder / "eval" / "a.json")
    (folder / "eval" / "b.json").write_text("{")
    theirs = {"gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A", "alias": "gsm8k"}}
    (folder / "eval" / "c.json").write_text(json.dumps({"results": theirs}))
    (folder / "eval" / "d.json").write_text('{"results": [1]}')
    shown = section(page.content([read_run(folder)]), "benchmarks")
    assert "mmlu federated acc 0.2000 – 80 a.json" in shown
    assert "algebra federated acc 0.3000 0.0100 40 a.json" in shown
    assert shown.index("gsm8k") < shown.index("of their parts") < shown.index("algebra")
    assert "gsm8k – exact_match (strict-match) 0.2500 – – c.json" in shown
    assert "b.json: cannot be read" in shown
    assert "d.json: its results are not laid out" in shown


def test_hostile_names_are_text_everywhere(copied):
    folder = copied(name="x")
    renamed(folder)
    inside = page.content([read_run(folder)])
    assert "<script>alert" not in inside
    assert "<img" not in inside
    assert 'a"b' not in re.sub(r">[^<]*<", "><", inside), "a quotation mark outside of text"
    for figure in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', inside, re.DOTALL):
        json.loads(figure)
    assert HOSTILE[0] in text(inside)


def test_status_is_honest_about_a_run_that_went_quiet(copied):
    folder = copied(keep=2, federation__rounds=9)
    facts = read_run(folder)
    assert words.status(facts, facts.heard + 12) == "Round 1 of 9, running: the last line of the journal is 12 s old."
    assert "no longer running as it seems" in words.status(facts, facts.heard + 4000)
    assert words.status(facts) == "Not finished: round 1 of 9."


def test_the_file_asks_no_other_place_for_anything(made):
    whole = page.whole("t", made)
    ours = whole.replace(page.whole("t", "").split("<script>")[1], "")
    assert not re.search(r'(src|href)="(?!#|data:,)', ours)
    assert "default-src 'none'" in whole
