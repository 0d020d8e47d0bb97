"""Examples before a question ("shots") that give way, one by one from the last, until the prompt fits the model.

The harness cuts a prompt that is too long from the left, in silence: the description goes first and an example is left
in halves. Here the draw of examples stays the harness's, so where nothing has to give way the prompt is the same to the
letter; where something has to, it is counted.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Shots:
    """How a task's prompts came out."""

    given: Counter[int] = field(default_factory=Counter)
    """shots -> rows that had so many"""
    cut: int = 0
    """Rows that did not fit even without shots, and lost their beginning."""

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, ready for JSON."""
        return {"rows_by_shots": {str(n): self.given[n] for n in sorted(self.given, reverse=True)}, "cut": self.cut}


class Kept:
    """One of the harness's samplers, drawing once for each row: asked again for fewer, the first of the same."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.drawn: Sequence[Any] | None = None

    def sample(self, n: int, *args: Any, **kwargs: Any) -> Sequence[Any]:
        """Return n examples."""
        if self.drawn is None:
            self.drawn = list(self.sampler.sample(n, *args, **kwargs))
        return self.drawn[:n]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)


@contextlib.contextmanager
def giving_way(task: Any, model: Any) -> Iterator[Shots]:
    """Let the task's prompts drop shots until they fit, while this is open; yield the counts that it fills.

    model: see harness_model.Model; it knows what fits, and writes the template.
    """
    build, sampler, counts = task.fewshot_context, task.sampler, Shots()
    kept = Kept(sampler)

    def context(doc: Any, num_fewshot: int, **kwargs: Any) -> Any:
        kept.drawn = None
        if kwargs.get("chat_template") is not None:
            kwargs["chat_template"] = model.templates(scored=task.OUTPUT_TYPE != "generate_until")
        for shots in range(num_fewshot, -1, -1):
            made = build(doc, num_fewshot=shots, **kwargs)
            if _all_fit(task, doc, made, model, kwargs):
                counts.given[shots] += 1
                return made
        counts.given[0] += 1
        counts.cut += 1
        return made

    task.sampler, task.fewshot_context = kept, context
    try:
        yield counts
    finally:
        task.sampler = sampler
        del task.fewshot_context


def _all_fit(task: Any, doc: Any, context: Any, model: Any, kwargs: dict[str, Any]) -> bool:
    asked = {key: kwargs[key] for key in ("apply_chat_template", "chat_template") if key in kwargs}
    requests = task.construct_requests(doc=doc, ctx=context, metadata=(None, 0, 1), **asked)
    return all(model.fits(request) for request in (requests if isinstance(requests, list) else [requests]))
