"""What a writer is, and what it is given."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Protocol

from fedseg.errors import ConfigError

FAILURES = "failures"
"""Name of the text of a round."""
Known = Set[tuple[str, int]]
"""Values that are written already, by name and round."""


@dataclass(frozen=True)
class RunFacts:
    """One run, whatever becomes of it."""

    run: str
    """`federated`, `pooled`, ..."""
    study: str
    identity: str
    """Differs between any two runs and stays when a run is resumed."""
    started: float
    """Seconds since 1970."""
    finished: float | None
    parameters: Mapping[str, str | float | bool]
    """The experiment, flat: `federation.rounds`, ..."""
    experiment: str
    """The experiment as JSON."""


@dataclass(frozen=True)
class RoundFacts:
    """What is new of a committed round; its scores come a round later."""

    server_round: int
    time: float
    """When it was committed, in seconds since 1970."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Numbers by name; `/` groups them."""
    failures: str = ""
    """A line for each site without an update."""


class Writer(Protocol):
    """Takes a run to another program. Whoever calls it never gives it a value that it knows already."""

    def begin(self, run: RunFacts) -> Known:
        """Open the place of this run, new or not, and say what is there; a text counts as `FAILURES`."""

    def round(self, facts: RoundFacts) -> None:
        """Write what is new of a round, durably enough for the program to show it at once."""

    def end(self, run: RunFacts) -> None:
        """Note that the run is finished."""

    def close(self) -> None:
        """Let go of everything, finished or not."""


def make_writer(kind: str, output: str) -> Writer:
    """The writer of a kind, `tensorboard` or `mlflow`.

    Args:
        kind: which.
        output: a folder, or for MLflow also the address of a tracking server.

    Raises:
        ConfigError: the program's package is not installed.
    """
    try:
        if kind == "tensorboard":
            from fedseg.coordinator.writers.tensorboard import TensorBoardWriter

            return TensorBoardWriter(output)
        from fedseg.coordinator.writers.mlflow import MlflowWriter

        return MlflowWriter(output)
    except ImportError as error:
        raise ConfigError(
            f"--as {kind}: {error}; install it with `pip install 'fedseg[{kind}]'`, or export to csv or json"
        ) from error
