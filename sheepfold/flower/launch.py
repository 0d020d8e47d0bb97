"""Flower's runs: a job's begins, ends, and says how it is. Each raises Unreachable where the SuperLink is not there."""

import hashlib
import json

from sheepfold.errors import TrainingError
from sheepfold.flower import jobs
from sheepfold.flower.bundle import CONFIG, bundle
from sheepfold.flower.fold import Fold
from sheepfold.flower.superlink import running


def start_run(fold: Fold, job: jobs.Job) -> int:
    """Start a run that coordinates a job, and return Flower's number for it. Raises TrainingError where it does not."""
    from flwr.common.serde import fab_to_proto, user_config_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.fab import Fab

    content = bundle()
    fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
    told = json.dumps({"job": job.id})  # nodes may read it: the experiment is in the job, and they get the charter
    with running(fold).control() as control:
        answer = control.StartRun(StartRunRequest(fab=fab, override_config=user_config_to_proto({CONFIG: told})))
    if not answer.HasField("run_id"):
        raise TrainingError(f"{job.id}: Flower started no run; see {fold.logs}")
    return int(answer.run_id)


def run_status(fold: Fold, run: int) -> str:
    """Return how a run is: pending, starting, running, or finished: and how it ended."""
    from flwr.proto.control_pb2 import ListRunsRequest

    with running(fold).control() as control:
        found = control.ListRuns(ListRunsRequest(run_id=run)).run_dict[run].status
    return ":".join(part for part in (found.status, found.sub_status) if part)


def stop_run(fold: Fold, run: int) -> None:
    """Stop a run; one that has ended is left alone."""
    from flwr.proto.control_pb2 import StopRunRequest

    if not run_status(fold, run).startswith("finished"):
        with running(fold).control() as control:
            control.StopRun(StopRunRequest(run_id=run))
