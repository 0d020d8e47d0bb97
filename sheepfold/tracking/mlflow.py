"""MLflow: a tracking server by its address, or a folder of files."""

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sheepfold.tracking.base import Start
from sheepfold.tracking.running import Status

ROUND, ADAPTER = "sheepfold.round", "sheepfold.adapter"
LONGEST, MOST = 500, 100
"""Characters of a parameter's value, and parameters in one call, that every MLflow server takes."""


class MLflow:
    """One run of MLflow; `id` is that run's."""

    def __init__(self, start: Start) -> None:
        uri = _uri(start)
        # MLflow refuses its file store unless asked for it by name, and the other stores need a server or SQLAlchemy.
        if uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a server that is away must not hold up a run
        from mlflow import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=uri)
        self.id = start.id or self._new(start)
        if start.id:
            self._client.update_run(self.id, status="RUNNING")
        told = self._client.get_run(self.id).data.tags.get(ROUND)
        self.last: int | None = None if told is None else int(told)

    def _new(self, start: Start) -> str:
        from mlflow.entities import Param

        project = start.arguments.get("project", "sheepfold")
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        made = self._client.create_run(experiment, run_name=start.name, tags=dict(start.facts))
        run: str = made.info.run_id
        params = [Param(key, str(value)[:LONGEST]) for key, value in start.config.items()]
        for at in range(0, len(params), MOST):
            self._client.log_batch(run, params=params[at : at + MOST])
        return run

    def round(
        self, round: int, scalars: Mapping[str, float], spreads: Mapping[str, Sequence[float]], adapter: str
    ) -> None:
        """Log scalars and each spread's least, median and most; the adapter's hash and the round become tags."""
        from mlflow.entities import RunTag

        values = dict(scalars)
        for name, each in spreads.items():
            values |= {f"{name}.min": min(each), f"{name}.median": statistics.median(each), f"{name}.max": max(each)}
        tags = [RunTag(ROUND, str(round)), RunTag(ADAPTER, adapter)]
        self._client.log_batch(self.id, metrics=_metrics(values, round), tags=tags)

    def figures(self, round: int, scalars: Mapping[str, float]) -> None:
        """Log single figures as metrics."""
        values = list(scalars.items())
        for at in range(0, len(values), MOST):
            self._client.log_batch(self.id, metrics=_metrics(dict(values[at : at + MOST]), round))

    def close(self, status: Status) -> None:
        """Mark the run as finished or failed; one that goes on stays marked as running."""
        if status != "open":
            self._client.set_terminated(self.id, status=status.upper())


def _metrics(values: Mapping[str, float], round: int) -> list[Any]:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(name, value, now, round) for name, value in values.items()]


def _uri(start: Start) -> str:
    """Return the store: `uri`, else the folder `dir`, else what MLflow's own variable says, else ./mlruns."""
    if "dir" not in start.arguments and (named := start.arguments.get("uri") or os.environ.get("MLFLOW_TRACKING_URI")):
        return named
    return Path(start.arguments.get("dir", "mlruns")).resolve().as_uri()


begin = MLflow
