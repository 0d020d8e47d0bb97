"""Local training of one round, four ways, on the same rows: results compared first, then useful tokens a second.

    trainer    a transformers.Trainer for each client on a shared PEFT model (as Shepherd, FlexLoRA, OpenFedLLM do)
    loop       a bare loop for each client on a shared PEFT model (as FederatedScope-LLM does): our reference engine
    alone      our cohort engine, one client a pass
    cohort     our cohort engine, all clients in one pass

    python benchmarks/train.py                      builtin:tiny and its corpus, 16 clients of 64 rows
    python benchmarks/train.py --quick              fewer rows, one repetition less
    python benchmarks/train.py --base FOLDER --source dolly --path train.jsonl.gz

Ratios within one run are the result; seconds depend on the machine. Writes benchmarks/results/<date>-<base>.{json,md}.
"""

import argparse
import contextlib
import datetime
import gc
import io
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from sheepfold.adapter import Adapter  # noqa: E402
from sheepfold.assembly import load_data  # noqa: E402
from sheepfold.config import Experiment, build  # noqa: E402
from sheepfold.data.rows import IGNORED, FederatedData  # noqa: E402
from sheepfold.engines.cohort import CohortEngine  # noqa: E402
from sheepfold.engines.injection import CohortModel  # noqa: E402
from sheepfold.engines.peft_model import PeftModelEngine  # noqa: E402
from sheepfold.local.steps import step_rows, steps_in_round  # noqa: E402
from sheepfold.messages import Assignment, Update  # noqa: E402
from sheepfold.models import load_base  # noqa: E402
from sheepfold.planning import batch_plan  # noqa: E402
from sheepfold.state import BatchPlan  # noqa: E402
from sheepfold.targets import find_targets, new_adapter  # noqa: E402

Train = Callable[[], dict[str, Adapter]]


def experiment(args: argparse.Namespace) -> Experiment:
    """Return one round of the benchmark as an experiment: batch 4 in micro-batches of 2, LoRA r 8 on q, k, v and o."""
    rows = args.clients * args.rows
    return build(
        {
            "model": {"base": args.base},
            "cache": tempfile.mkdtemp(),
            "adapter": {"targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
            "data": {
                "source": args.source,
                "path": args.path,
                "rows": rows,
                "eval_share": 0.0,
                "max_tokens": 512,
                "partition": {"by": "iid", "clients": args.clients},
            },
            "train": {"epochs": 1, "batch_rows": 4, "micro_rows": 2, "lr": 3e-4},
        }
    )


def ways(made: Experiment, data: FederatedData) -> dict[str, Callable[[], Train]]:
    """Return, by name, functions that set up a way of training and return what is timed."""

    def base() -> Any:
        return load_base(made.model, made.device)

    start = first_adapter(made)
    sites = list(start.pairs)
    work = [Assignment(c, 0, start, made.train.lr) for c in data.clients]
    rows = {c: r.train for c, r in data.clients.items()}
    numbers = sum(t.numel() for t in start.tensors().values())

    def ours(clients_per_pass: int) -> Train:
        loaded = base()
        plan = batch_plan(made.train, numbers, len(work), loaded.device)
        plan = BatchPlan(min(clients_per_pass, plan.clients_per_pass), plan.micro_rows, plan.micro_tokens)
        cohort = CohortModel(loaded.model, find_targets(loaded.model, made.adapter.targets))
        engine = CohortEngine(cohort, data.tokens, rows, made.train, made.adapter, seed=made.seed, plan=plan)
        return lambda: adapters(engine.train(work))

    def loop() -> Train:
        plan = BatchPlan(1, made.train.micro_rows or made.train.batch_rows, 0)
        engine = PeftModelEngine(
            base().model, sites, data.tokens, rows, made.train, made.adapter, seed=made.seed, plan=plan
        )
        return lambda: adapters(engine.train(work))

    return {
        "trainer": lambda: trainers(made, data, base().model, sites, start),
        "loop": loop,
        "alone": lambda: ours(1),
        "cohort": lambda: ours(len(work)),
    }


def first_adapter(made: Experiment) -> Adapter:
    """Return where every client starts."""
    sites = find_targets(load_base(made.model, made.device).model, made.adapter.targets)
    return new_adapter(sites, made.adapter.rank, made.adapter.alpha, made.seed)


def adapters(answers: Any) -> dict[str, Adapter]:
    """Return the updates' adapters; everybody must have trained."""
    updates = list(answers)
    assert all(isinstance(u, Update) for u in updates)
    return {u.client: u.adapter for u in updates}


def trainers(made: Experiment, data: FederatedData, model: Any, sites: list[str], start: Adapter) -> Train:
    """A Trainer for each client on one PEFT model, fed our rows in our order so that results can be compared."""
    import transformers
    from torch.utils.data import SequentialSampler

    from sheepfold.engines.carriers import LoraCarrier

    transformers.logging.set_verbosity_error()
    carrier = LoraCarrier(model, sites, 0.0)
    carrier.write(start)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([r["ids"] for r in rows], batch_first=True)
        labels = pad([r["labels"] for r in rows], batch_first=True, padding_value=IGNORED)
        lengths = torch.tensor([len(r["ids"]) for r in rows])
        return {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        }

    def train() -> dict[str, Adapter]:
        done = {}
        for client, own in data.clients.items():
            carrier.write(start)
            steps = steps_in_round(made.train, len(own.train))
            order = np.concatenate(
                [step_rows(made.seed, client, own.train, made.train.batch_rows, s) for s in range(steps)]
            )
            pairs = [data.tokens.row(int(n)) for n in order]
            micro = made.train.micro_rows or made.train.batch_rows
            arguments = transformers.TrainingArguments(
                output_dir=tempfile.mkdtemp(), per_device_train_batch_size=micro,
                gradient_accumulation_steps=made.train.batch_rows // micro, num_train_epochs=1,
                learning_rate=made.train.lr, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
                save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False, logging_strategy="no",
                use_cpu=not torch.cuda.is_available(), bf16=False,
            )  # fmt: skip
            trainer = InOrder(
                model=carrier.model, args=arguments, data_collator=collate,
                train_dataset=[{"ids": ids, "labels": labels} for ids, labels in pairs],
            )  # fmt: skip
            with contextlib.redirect_stdout(io.StringIO()):  # a summary for each client
                trainer.train()
            done[client] = carrier.read()
        return done

    return train


def gap(left: dict[str, Adapter], right: dict[str, Adapter], start: Adapter) -> float:
    """Return the norm of the difference of two ways' adapters as a share of what training changed, over all clients.

    Single numbers say less: AdamW's first steps go by a gradient's sign, so one that is zero up to rounding may go
    either way by a whole learning rate. In float64 the ways agree to 1e-14 (tests/engines/test_cohort.py).
    """
    apart = moved = 0.0
    for client, one in left.items():
        origin = start.tensors()
        for name, a in one.tensors().items():
            apart += float((a - right[client].tensors()[name]).double().square().sum())
            moved += float((a - origin[name]).double().square().sum())
    return (apart / moved) ** 0.5


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="builtin:tiny")
    parser.add_argument("--source", default="corpus")
    parser.add_argument("--path")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rows", type=int, default=64, help="rows of each client")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--ways", default="trainer,loop,alone,cohort")
    parser.add_argument("--quick", action="store_true", help="16 rows a client, 3 repetitions")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.repeat = 16, 3
    made = experiment(args)
    data = load_data(made, load_base(made.model, "cpu").tokenizer)
    useful = sum(data.tokens.length(int(n)) for c in data.clients.values() for n in c.train)
    results: dict[str, dict[str, float]] = {}
    reference: dict[str, Adapter] = {}
    first, start = "", first_adapter(made)
    for name, make in ways(made, data).items():
        if name not in args.ways.split(","):
            continue
        train = make()
        done = train()  # also the warm-up
        reference, first = (reference, first) if reference else (done, name)
        difference = gap(reference, done, start)
        if not difference < 0.01:
            raise SystemExit(f"{name} trains something else: its updates differ from {first}'s by {difference:.1%}")
        seconds = []
        for _ in range(args.repeat):
            began = time.perf_counter()
            train()
            seconds.append(time.perf_counter() - began)
        results[name] = {"seconds": statistics.median(seconds), "difference": difference}
        results[name]["tokens_per_second"] = useful / results[name]["seconds"]
        del train
        gc.collect()
        print(f"{name}: {results[name]['tokens_per_second']:,.0f} useful tokens/s", flush=True)
    write(args, results, useful)


def write(args: argparse.Namespace, results: dict[str, dict[str, float]], useful: int) -> None:
    """Print the table and write it beside this file, dated, with the machine."""
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    today, base = datetime.date.today().isoformat(), Path(args.base.replace(":", "-")).name
    first = next(iter(results))
    head = f"{today}, {base} on {args.source}: {args.clients} clients of {args.rows} rows, {useful:,} useful tokens"
    lines = [f"# Local training of one round, {head}", "", f"{machine}; median of {args.repeat}.", ""]
    lines += [f"| way | useful tokens/s | times {first} | updates differ by |", "|---|---:|---:|---:|"]
    for name, r in results.items():
        ratio = r["tokens_per_second"] / results[first]["tokens_per_second"]
        lines.append(f"| {name} | {r['tokens_per_second']:,.0f} | {ratio:.2f} | {r['difference']:.1e} |")
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    stem = f"{today}-{base}-{args.source}-{args.clients}x{args.rows}"
    (folder / f"{stem}.md").write_text(text)
    facts = {
        "machine": machine,
        "arguments": vars(args) | {"base": base, "path": None},
        "useful_tokens": useful,
        "results": results,
    }
    (folder / f"{stem}.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
