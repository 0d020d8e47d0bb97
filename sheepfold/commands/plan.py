"""`sheepfold plan`: a forecast, and what a few steps took, as a table for people."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sheepfold.calibration import Calibration
    from sheepfold.distillation.teacher import Foreseen
    from sheepfold.forecast import Forecast


def show(foreseen: "Forecast", measured: "Calibration | None" = None) -> None:
    """Print a forecast; measured: what a few steps of the run's own engine took."""
    from sheepfold.display import size, together
    from sheepfold.terminal import console, table

    f = foreseen
    view = table("what this run would do", "", "")
    view.show_header, view.columns[1].justify = False, "left"
    for name, value in (
        ("clients", f"{f.clients:,}, {f.cohort:,} a round, {f.rounds} rounds"),
        ("rows", f"{f.train_rows:,} for training, {f.eval_rows:,} held out{_public(f)}"),
        ("base", f"{_which(f)}{f.base_parameters:,} parameters, {size(f.base_bytes)} on {f.device}"),
        ("adapter", f"{f.adapter_numbers:,} numbers in {f.adapted_modules} modules, {size(4 * f.adapter_numbers)}"),
        (
            "work",
            f"{f.steps_a_round:,} client steps a round; {f.rows_in_all:,} rows, {f.tokens_in_all:,} tokens",
        ),
        (
            "passes",
            f"{together(f.plan)}, at most {_most(f)} a forward pass",
        ),
        ("memory", _memory(f)),
        ("traffic", _traffic(f)),
        *([("server", _server(f.server))] if f.server else []),
        *([("seconds", _seconds(measured))] if measured else []),
    ):
        view.add_row(name, value)
    console().print(view)


def _most(f: "Forecast") -> str:
    return f"{f.plan.micro_tokens:,} tokens" if f.by_tokens else f"{f.plan.micro_rows:,} rows"


def _memory(f: "Forecast") -> str:
    from sheepfold.display import size

    parts = {"libraries": f.library_bytes, "base": f.base_bytes, "full model": f.full_bytes}
    parts |= {"clients of a pass": f.pass_bytes, "activations": f.activation_bytes or 0, "fold": f.fold_bytes}
    parts |= {"server's models": f.server.bytes} if f.server else {}
    told = ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
    if f.sharded:
        return f"{told}, of a whole model; each process has its share of it, and the journal has the first one's peak"
    if f.peak_bytes is None:
        return f"{told}; activations are not foreseen for this method, the journal has the peak"
    return f"{size(f.peak_bytes)} at its peak: {told}"


def _traffic(f: "Forecast") -> str:
    from sheepfold.display import size

    if f.downlink_bytes is None or f.uplink_bytes is None:
        return "not foreseen for this method; the journal counts it"
    return f"{size(f.downlink_bytes)} down and {size(f.uplink_bytes)} up in round 1"


def _seconds(m: "Calibration") -> str:
    from sheepfold.display import size

    in_all = f"{m.run_s:,.0f}" if m.run_s >= 10 else f"{m.run_s:.1f}"
    return (
        f"{in_all} in all: {m.round_s:,.1f} a round, {m.evaluation_s:,.1f} an evaluation ({m.evaluations}); from "
        f"{m.steps} steps at {m.tokens_a_second:,.0f} tokens a second, with {size(m.peak_bytes)} in use"
    )


def _public(f: "Forecast") -> str:
    return f", {f.public_rows:,} the server's" if f.public_rows else ""


def _server(s: "Foreseen") -> str:
    from sheepfold.display import size

    kept = f"every saved state holds {size(s.state_bytes)} of what it learns" if s.state_bytes else "it learns nothing"
    return f"a teacher of {s.parameters:,} parameters; {size(s.bytes)} with the server's copy of the student; {kept}"


def _which(f: "Forecast") -> str:
    return "" if f.full_parameters is None else f"an emulator of {f.full_parameters:,} parameters: "
