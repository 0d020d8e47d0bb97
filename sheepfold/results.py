"""results.json: what was asked of a run and what came of it, in one file for tables and plots of one's own.

    experiment.yaml ─▶ arguments, every option resolved
    rounds.jsonl    ─▶ rounds: loss and measures on the test set at every evaluation; seconds and bytes in all
    closing table   ─▶ its means

It holds nothing that its sources do not, so writing it again at the end of a resumed run does no harm.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sheepfold.card_facts import closing_means
from sheepfold.joining import Closing
from sheepfold.journal import RunFolder

FILE = "results.json"


def write_results(folder: RunFolder, closing: Closing | None) -> None:
    """Write the run's results.json; raises CheckpointError where the disk refuses."""
    folder.write_json(FILE, results(folder, closing))


def results(folder: RunFolder, closing: Closing | None = None) -> dict[str, Any]:
    """Return the summary of a run's folder, ready for JSON.

    rows says where the figures of all rounds were taken: `global`, the test set that no client holds, or else
    `weighted`, all clients' held-out rows together. A round's seconds are those since the run's beginning. The total is
    that of rounds and evaluations, a resumed run's all together; loading, baselines and benchmarks are not in it.
    """
    experiment, lines = folder.experiment(), folder.lines()
    judged = [line for line in lines if "held_out" in line]
    rows = "global" if any("global" in line["held_out"].get("loss", {}) for line in judged) else "weighted"
    named = experiment.federation.strategy
    found: dict[str, Any] = {
        "name": experiment.name,
        "method": named if isinstance(named, str) else " over ".join(named),
        "task": experiment.task,
        "seed": experiment.seed,
        "rows": rows,
        "rounds": [_round(line, lines, rows) for line in judged],
        "seconds": seconds(lines),
        "bytes": {way: sum(line.get(f"{way}link_bytes", 0) for line in lines) for way in ("up", "down")},
        "adapter": lines[-1]["adapter"] if lines else None,
    }
    if closing is not None:
        means = closing_means(closing.as_dict())
        found["closing"] = {m: {whose: means[m, whose] for n, whose in means if n == m} for m in closing.scores}
    return found | {"arguments": experiment.model_dump(mode="json")}


def _round(line: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], rows: str) -> dict[str, Any]:
    """Return an evaluated round's figures."""
    told: dict[str, Any] = {"round": line["round"], **_figures(line["held_out"], rows)}
    if "train_loss" in line:
        told["train_loss"] = line["train_loss"]
    if "held_out_full" in line:  # a closed model: the figures above are the emulator's
        told["full"] = _figures(line["held_out_full"], rows)
    if "teacher" in line:
        told["teacher"] = line["teacher"]
    return told | {"seconds": seconds([each for each in lines if each["round"] <= line["round"]])["total"]}


def _figures(held_out: Mapping[str, Any], rows: str) -> dict[str, float | None]:
    """Return each measure's figure on these rows; None where it was not finite."""
    by_client = [name for name in held_out if name == "clients" or name.startswith("clients_")]
    summaries = {name: value for name, value in held_out.items() if name not in by_client}
    return {name: summary[rows] for name, summary in summaries.items() if rows in summary}


def seconds(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the seconds of a journal's lines: the clients' training and the fold, the server's own, evaluation."""
    whole, server, evaluation = (
        sum(line["seconds"].get(stage, 0.0) for line in lines) for stage in ("round", "server", "evaluation")
    )
    return {"training": whole - server, "server": server, "evaluation": evaluation, "total": whole + evaluation}
