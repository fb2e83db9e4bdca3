"""Runs for MLflow: in a SQLite file of its own, or on a tracking server. Its telemetry is off."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before it is imported: it looks only then
os.environ["DO_NOT_TRACK"] = "true"

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from fedseg.coordinator.writers.writer import FAILURES, Known, RoundFacts, RunFacts
from fedseg.errors import StoreError

logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells at length how it makes its tables

IDENTITY = "fedseg.identity"
"""Tag by which a run is found again."""
BATCH = 100
"""Parameters that MLflow takes at once; it takes more metrics."""
LONGEST = 5000
"""Characters of a text; MLflow takes a few more."""


class MlflowWriter:
    """Writes a run of the experiment that is called like the study."""

    def __init__(self, output: str) -> None:
        self._folder = None if ":" in output or output == "databricks" else Path(output).absolute()
        self._uri = output if self._folder is None else f"sqlite:///{self._folder / 'mlflow.db'}"
        self._client: MlflowClient
        self._run: Run

    def begin(self, run: RunFacts) -> Known:
        """See `Writer`.

        Raises:
            StoreError: MLflow cannot be reached, or refuses something; so everywhere here.
        """
        with _explained(self._uri):
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._client = MlflowClient(tracking_uri=self._uri)
            found = self._client.get_experiment_by_name(run.study)
            experiment = self._make_experiment(run.study) if found is None else found.experiment_id
            runs = self._client.search_runs([experiment], f"tags.`{IDENTITY}` = '{run.identity}'")
            if not runs:
                self._run = self._client.create_run(
                    experiment, round(run.started * 1000), {IDENTITY: run.identity}, run_name=run.run
                )
            else:
                self._run = runs[0]
                if run.finished is None and self._run.info.status != "RUNNING":
                    self._client.update_run(self._number, status="RUNNING")
            parameters = [Param(name, str(value)[:LONGEST]) for name, value in run.parameters.items()]
            for start in range(0, len(parameters), BATCH):
                self._client.log_batch(self._number, params=parameters[start : start + BATCH])
            return self._known()

    def round(self, facts: RoundFacts) -> None:
        """See `Writer`."""
        milliseconds, number = round(facts.time * 1000), facts.server_round
        metrics = [Metric(name, value, milliseconds, number) for name, value in facts.values.items()]
        tags = [RunTag(f"{FAILURES}/{number}", facts.failures[:LONGEST])] if facts.failures else []
        with _explained(self._uri):
            for start in range(0, len(metrics), BATCH):
                self._client.log_batch(self._number, metrics=metrics[start : start + BATCH])
            self._client.log_batch(self._number, tags=tags)

    def end(self, run: RunFacts) -> None:
        """See `Writer`."""
        assert run.finished is not None
        with _explained(self._uri):
            self._client.set_terminated(self._number, "FINISHED", round(run.finished * 1000))

    def close(self) -> None:
        """See `Writer`; every value was sent when it was given."""

    @property
    def _number(self) -> str:
        return str(self._run.info.run_id)

    def _make_experiment(self, study: str) -> str:
        place = None if self._folder is None else (self._folder / "artifacts").as_uri()  # otherwise `mlruns` right here
        return str(self._client.create_experiment(study, artifact_location=place))

    def _known(self) -> Known:
        data = self._client.get_run(self._number).data
        metrics = {
            (name, metric.step)
            for name in data.metrics
            for metric in self._client.get_metric_history(self._number, name)
        }
        tags = {(FAILURES, int(name.rsplit("/", 1)[1])) for name in data.tags if name.startswith(f"{FAILURES}/")}
        return metrics | tags


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        raise StoreError(f"MLflow at {uri}: {error}; mend that, and give the same command again: it goes on") from error
