"""MLflow: a database in the run's directory or a server, with the model as an artifact."""

import logging
import os
import re
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedpeft.reporting.run_files import CONFIG, SUMMARY
from fedpeft.reporting.saved_runs import SavedRun
from fedpeft.reporting.trackers.base import (
    Export,
    Numbers,
    Session,
    Tracker,
    flat,
    numbers,
    settings,
    tags,
)

STATUSES = {"completed": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A server that cannot be reached must not hold each round up for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
MOST_PARAMS, MOST_CHARACTERS = 100, 6000  # parameters of one request, characters of one value


@dataclass(frozen=True)
class MLflow(Tracker):
    """Writes a run with parameters, metrics by round, the summary and the exported model.

    Args:
        tracking_uri: the store, such as ``http://HOST:PORT`` or ``sqlite:////folder/mlflow.db``;
            null for a database in the run's directory.
        experiment: holds the run; it is made if it is not there.
        artifact: keep the folder that ``fedpeft export`` writes, once the run is completed.
    """

    tracking_uri: str | None = None
    experiment: str = "fedpeft"
    artifact: bool = True

    name = "mlflow"
    module = "mlflow"

    def open(self, run: SavedRun, folder: Path, id: str | None, done: int) -> Session:
        """Begin a run, or go on with the run of this id; see ``Tracker.open``."""
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        with warnings.catch_warnings():  # MLflow's tables use what SQLAlchemy no longer likes
            warnings.simplefilter("ignore")
            return _Run(self, run, folder, id)


class _Run(Session):
    """A run of MLflow, of which nothing runs on this machine."""

    def __init__(self, tracker: MLflow, run: SavedRun, folder: Path, id: str | None) -> None:
        from mlflow import MlflowClient, entities  # an extra, which takes seconds

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._entities, self._saved, self._artifact = entities, run, tracker.artifact
        uri = tracker.tracking_uri or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        self._client = MlflowClient(uri)
        if id is None:
            place = None if tracker.tracking_uri else (folder / "artifacts").resolve().as_uri()
            self.id = self._begin(self._experiment(tracker.experiment, place))
        else:
            self.id = id
            known = self._client.get_run(id).data.metrics
            self.last = int(known.get("round", -1))
            self._client.update_run(id, "RUNNING")

    def _experiment(self, name: str, place: str | None) -> str:
        if experiment := self._client.get_experiment_by_name(name):
            return experiment.experiment_id
        try:
            return self._client.create_experiment(name, place)
        except Exception:  # another run, which began at the same time, may have made it
            if (experiment := self._client.get_experiment_by_name(name)) is None:
                raise
            return experiment.experiment_id

    def _begin(self, experiment: str) -> str:
        run = self._saved
        words = tags(run) | {"run_hash": run.hash, "run_hash_but_seed": run.hash_but_seed}
        words["run_dir"] = str(run.path.resolve())
        name = run.path.resolve().name
        id = self._client.create_run(experiment, tags=words, run_name=name).info.run_id
        try:
            self._describe(id)
        except BaseException:
            with suppress(Exception):
                self._client.set_terminated(id, STATUSES["failed"])
            raise
        return id

    def _describe(self, id: str) -> None:
        """Write the configuration."""
        run, param = self._saved, self._entities.Param
        params = [param(_name(k), str(v)[:MOST_CHARACTERS]) for k, v in settings(run).items()]
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(id, params=params[first : first + MOST_PARAMS])
        self._client.log_artifact(id, str(run.path / CONFIG))

    def write(self, round: int, numbers: Numbers) -> None:
        now = int(time.time() * 1000)
        metric = self._entities.Metric
        metrics = [metric(_name(k), float(v), now, round) for k, v in numbers.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def end(
        self, status: str, reason: str, summary: Mapping[str, Any] | None, export: Export
    ) -> str:
        self._client.set_tag(self.id, "reason", reason)
        if summary is not None:
            last = {f"summary.{k}": v for k, v in numbers(flat(summary)).items()}
            self.write(summary["final"]["round"], last)
            self._client.log_artifact(self.id, str(self._saved.path / SUMMARY))
        self._client.set_terminated(self.id, STATUSES[status])
        return self._model(export) if summary is not None and self._artifact else ""

    def _model(self, export: Export) -> str:
        """Keep the exported model; return why there is none."""
        if load_in := self._saved.config.model.get("load_in"):
            return (
                f"logger=mlflow keeps no model, because with model.load_in={load_in} its export "
                f"loads the whole base model on the CPU: fedpeft export {self._saved.path} does"
            )
        with TemporaryDirectory() as folder:
            try:
                to = Path(folder) / "model"
                export(self._saved.path, to)
            except ValueError as error:
                return f"logger=mlflow keeps no model: {error}"
            self._client.log_artifacts(self.id, str(to), "model")
        return ""

    def close(self) -> None:
        """Do nothing, because each call is complete."""


def _name(key: str) -> str:
    """Return a key without characters that MLflow has no room for."""
    return re.sub(r"[^\w./: -]", "_", key)
