"""What a round between machines costs beside the same round in one process: seconds, and memory of every process.

    python benchmarks/wire.py                    adapters of 1, 10 and 100 MB, 3 clients, 10 rounds each
    python benchmarks/wire.py --sizes 10 --clients 3 6
    python benchmarks/wire.py --quick            1 and 10 MB, 4 rounds

A server and its clients run as processes of this machine over TLS, through Flower; training is one step of one row on a
random base, so that what is left is the way there and back. Seconds are the median over the rounds, the first left out;
memory is the most that a process held. Writes benchmarks/results/<date>-wire.{json,md}.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import yaml  # noqa: E402

from tests.network.federation import Federation, write_rows  # noqa: E402
from tests.network.servers import environment  # noqa: E402

WIDTH, LAYERS, HIDDEN = 1024, 2, 2816
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
A_RANK = LAYERS * (4 * 2 * WIDTH + 3 * (WIDTH + HIDDEN)) * 4
"""Bytes of the adapter for each unit of rank"""
COLOURS = ("red", "green", "blue", "grey", "white", "black", "pink", "brown")
ROLES = {
    "coordinator": ("serverapp",),
    "superlink": ("flower-superlink",),
    "proxy": ("flower.proxy",),
    "executor": ("flower.executor",),
    "supernode": ("flower-supernode",),
}
"""Process -> what its command has in it"""


def random_base(folder: Path) -> Path:
    """Write a Llama of random weights, about 105 MB, with the built-in base's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sheepfold.config import ModelSettings
    from sheepfold.models import load_tokenizer

    tokenizer = load_tokenizer(ModelSettings(base="builtin:tiny"))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=8,
        vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def experiment(base: Path, megabytes: float, rounds: int) -> dict[str, Any]:
    """Return rounds of one step of one row, with an adapter of this size."""
    return {
        "name": "wire",
        "model": {"base": str(base), "dtype": "float32"},
        "device": "cpu",
        "adapter": {"rank": round(megabytes * 1e6 / A_RANK), "targets": list(ADAPTED)},
        "data": {"max_tokens": 32, "eval_share": 0.25, "template": "plain"},
        "train": {"steps": 1, "batch_rows": 1, "clients_per_pass": 1},
        "federation": {"rounds": rounds},
        "evaluation": {"every": 0},
    }


def rows(client: int) -> list[dict[str, str]]:
    """Return a client's rows, so that no two send the same bytes."""
    return [{"instruction": f"Name colour {client}.", "output": COLOURS[client % len(COLOURS)]}] * 4


class Watch:
    """The most memory that each process of a family held, looked at all the time; MB."""

    def __init__(self, *owners: int) -> None:
        """owners: process ids; all below them are watched too."""
        self.owners, self.most = owners, dict[str, float]()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.1):
            for owner in self.owners:
                with suppress(psutil.NoSuchProcess):
                    family = psutil.Process(owner)
                    for process in [family, *family.children(recursive=True)]:
                        with suppress(psutil.NoSuchProcess):
                            self._note(process)

    def _note(self, process: psutil.Process) -> None:
        words = " ".join(process.cmdline())
        role = next((role for role, marks in ROLES.items() if any(mark in words for mark in marks)), "other")
        peak = _peak(process.pid)
        self.most[role] = max(self.most.get(role, 0.0), peak)


def _peak(pid: int) -> float:
    """Return the most that a process ever held in memory, MB."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1000
    return 0.0


def seconds(lines: list[dict[str, Any]]) -> float:
    """Return the median round's seconds, the first one left out."""
    return statistics.median(line["seconds"]["round"] for line in lines if line["round"] > 1)


def in_process(folder: Path, options: Mapping[str, Any], clients: int) -> dict[str, Any]:
    """Return what a round costs with everything in one process."""
    files = folder / "rows"
    files.mkdir(parents=True)
    for i in range(clients):
        write_rows(files / f"client-{i}.jsonl", rows(i))
    data = {**options["data"], "source": str(files), "partition": {"by": "files"}}
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump({**options, "data": data, "output": str(folder / "runs")}))
    command = [str(Path(sys.executable).parent / "sheepfold"), "run", str(path)]
    began = subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL)
    with Watch(began.pid) as watch:
        assert began.wait() == 0
    [journal] = folder.glob("runs/*/rounds.jsonl")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    return {"seconds": seconds(lines), "hash": lines[-1]["adapter"], "memory": watch.most["other"]}


def between(folder: Path, options: Mapping[str, Any], clients: int) -> dict[str, Any]:
    """Return what a round costs between processes, over Flower."""
    names = [f"client-{i}" for i in range(clients)]
    with Federation(folder, names) as federation:
        federation.server.start()
        for i, name in enumerate(names):
            federation.node(name, rows(i), policy={"max_rank": WIDTH})
            federation.join(name)
        federation.there()
        assert federation.server.process is not None
        owners = [federation.server.process.pid, *(p.pid for p in federation.clients.values())]
        with Watch(*owners) as watch:
            lines = federation.run(options).finish(3600)
    return {
        "seconds": seconds(lines),
        "hash": lines[-1]["adapter"],
        "memory": watch.most,
        "uplink": lines[-1]["uplink_bytes"] / clients,
    }


def main() -> None:
    """Measure, print a table and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 10, 100], help="MB of the adapter")
    parser.add_argument("--clients", type=int, nargs="+", default=[3])
    parser.add_argument("--rounds", type=int, default=11, help="the first one is not counted")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.rounds = [1, 10], 5
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        base = random_base(Path(temporary) / "base")
        for clients in args.clients:
            for size in args.sizes:
                options = experiment(base, size, args.rounds)
                here = in_process(Path(temporary) / f"here-{clients}-{size}", options, clients)
                apart = between(Path(temporary) / f"apart-{clients}-{size}", options, clients)
                assert here["hash"] == apart["hash"], "other bits between machines than in one process"
                results.append({"clients": clients, "megabytes": size, "here": here, "apart": apart})
                print(row(results[-1], results[0]), flush=True)
    write(args, results)


SERVER = ("coordinator", "superlink")
HEAD = (
    "| adapter, MB | clients | s a round, one process | between machines | overhead | one process, MB | coordinator | "
    "SuperLink | proxy | executor | SuperNode | coordinator grows by, in payloads | SuperLink |\n|" + "---|" * 13
)


def row(result: Mapping[str, Any], least: Mapping[str, Any]) -> str:
    """Return a line of the table; least: the result with the smallest adapter, from which memory grows."""
    here, apart, memory = result["here"], result["apart"], result["apart"]["memory"]
    more = (apart["uplink"] - least["apart"]["uplink"]) / 1e6
    grown = [f"{(memory[r] - least['apart']['memory'][r]) / more:.1f}" if more > 0 else "" for r in SERVER]
    cells = [
        f"{apart['uplink'] / 1e6:.1f}", result["clients"], f"{here['seconds']:.2f}", f"{apart['seconds']:.2f}",
        f"{apart['seconds'] - here['seconds']:.2f}", f"{here['memory']:.0f}",
        *(f"{memory[role]:.0f}" for role in ("coordinator", "superlink", "proxy", "executor", "supernode")), *grown,
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def write(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Write the table and the figures."""
    args.out.mkdir(parents=True, exist_ok=True)
    day = datetime.date.today().isoformat()
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {psutil.virtual_memory().total / 2**30:.0f} GiB"
    text = "\n".join(
        [
            "# Rounds between machines beside rounds in one process",
            "",
            f"{day}, {machine}; server and all clients on this machine, over TLS; median of {args.rounds - 1} rounds; "
            "one step of one row a client; the same bits both ways.",
            "",
            HEAD,
            *(row(result, min(results, key=lambda r: r["megabytes"])) for result in results),
            "",
        ]
    )
    (args.out / f"{day}-wire.md").write_text(text)
    (args.out / f"{day}-wire.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"{time.monotonic() - began:.0f} s in all")
