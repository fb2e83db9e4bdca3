"""Event files for TensorBoard. Every start writes a new file; TensorBoard reads all files of a folder as one run."""

import contextlib
import functools
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from fedseg.coordinator.writers.writer import FAILURES, Known, RoundFacts, RunFacts
from fedseg.processes import only_one

EVERYTHING = {SCALARS: 0, TENSORS: 0}
"""0: read every value, not a sample."""
EXPERIMENT, STATE = "experiment", "state"
_TEXT = "/text_summary"
"""What `add_text` appends to a name."""


class TensorBoardWriter:
    """Writes `FOLDER/STUDY/RUN-IDENTITY/events.out.tfevents.*`."""

    def __init__(self, output: str) -> None:
        self._output = Path(output)
        self._known: Known = frozenset()
        self._open = contextlib.ExitStack()
        self._folder: Path

    def begin(self, run: RunFacts) -> Known:
        """See `Writer`.

        Raises:
            ConfigError: another process is writing this run there.
        """
        folder = self._folder = self._output / run.study / f"{run.run}-{run.identity}"
        folder.mkdir(parents=True, exist_ok=True)
        self._open.enter_context(
            only_one(folder / ".lock", f"{folder}: another process is writing this run; end it, or use another folder")
        )
        self._known = _known(folder)
        if (EXPERIMENT, 0) not in self._known:
            metrics = {"dice/mean": 0.0, "dice/worst": 0.0}  # only their names count
            for summary in hparams(dict(run.parameters), metrics)[:2]:
                self._events.file_writer.add_summary(summary, walltime=run.started)
            self._events.add_text(EXPERIMENT, f"```\n{run.experiment}\n```", 0, run.started)
            self._events.flush()
        return self._known

    def round(self, facts: RoundFacts) -> None:
        """See `Writer`."""
        for name, value in facts.values.items():
            self._events.add_scalar(name, value, facts.server_round, facts.time)
        if facts.failures:
            lines = facts.failures.replace("\n", "  \n")  # a line of its own in Markdown, too
            self._events.add_text(FAILURES, lines, facts.server_round, facts.time)
        self._events.flush()

    def end(self, run: RunFacts) -> None:
        """See `Writer`."""
        if (STATE, 0) not in self._known:
            self._events.file_writer.add_summary(hparams({}, {})[2], walltime=run.finished)
            self._events.add_text(STATE, "finished", 0, run.finished)
            self._events.flush()

    def close(self) -> None:
        """See `Writer`."""
        self._open.close()

    @functools.cached_property
    def _events(self) -> SummaryWriter:
        """Made when there is something to write, since it makes a file."""
        return self._open.enter_context(SummaryWriter(str(self._folder)))


def _known(folder: Path) -> Known:
    """What earlier files hold; a half-written value at the end of one, of a process that was killed, does not count."""
    held = EventAccumulator(str(folder), size_guidance=EVERYTHING)
    if any(folder.glob("events.out.tfevents.*")):
        held.Reload()
    scalars = {(name, event.step) for name in held.Tags()[SCALARS] for event in held.Scalars(name)}
    texts = {
        (name.removesuffix(_TEXT), event.step)
        for name in held.Tags()[TENSORS]
        if name.endswith(_TEXT)
        for event in held.Tensors(name)
    }
    return scalars | texts
