"""What a round is doing and whom it is waiting for: a small file beside the run store, for those who watch.

Nothing depends on it. It is renamed into place, so that nobody reads half of it, but not synced: a round that a crash has ended
waits for nobody.
"""

import contextlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedseg.federated.phases import PHASES, Phase


@dataclass(frozen=True)
class Waiting:
    """A round that has begun and has not ended."""

    server_round: int
    """The round that is computed; for the closing evaluation the last one."""
    closing: bool
    """Whether it is the closing evaluation."""
    attempt: int
    since: float
    """When the sites were asked, in seconds since 1970."""
    asked: tuple[str, ...]
    missing: tuple[str, ...]
    """Sites that have not answered yet."""
    phase: Phase = "wait"


class WaitingFile:
    """Keeps the file of one run.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._now: Waiting | None = None

    def begin(self, server_round: int, asked: Sequence[str], attempt: int = 1, *, closing: bool = False) -> None:
        """Sites are asked."""
        phase: Phase = "evaluate" if closing else "broadcast"
        self._now = Waiting(server_round, closing, attempt, time.time(), tuple(asked), tuple(asked), phase)
        self._write()

    def enter(self, phase: Phase) -> None:
        """Another phase begins."""
        if self._now is not None:
            self._now = replace(self._now, phase=phase)
            self._write()

    def answered(self, site: str) -> None:
        """A site has answered, whatever it said."""
        if self._now is None or site not in self._now.missing:
            return
        self._now = replace(self._now, missing=tuple(name for name in self._now.missing if name != site))
        self._write()

    def end(self) -> None:
        """The round has ended."""
        self._now = None
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        if self._now is None:
            return
        aside = self._path.with_name(f"{self._path.name}.part")
        with contextlib.suppress(OSError):  # a full disk is for the store to complain of
            aside.write_text(json.dumps(asdict(self._now)))
            aside.replace(self._path)


def waiting_path(directory: Path, run: str) -> Path:
    """Where a run says what it is doing.

    Args:
        directory: of the run store.
        run: the run's name in it.
    """
    return directory / f".{run}.waiting.json"


def read_waiting(directory: Path, run: str) -> Waiting | None:
    """What the file says; None if there is none, or one that is damaged.

    Args:
        directory: of the run store.
        run: the run's name in it.
    """
    try:
        found = json.loads(waiting_path(directory, run).read_bytes())
        waiting = Waiting(**found | {"asked": tuple(found["asked"]), "missing": tuple(found["missing"])})
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    numbers = (waiting.server_round, waiting.attempt, waiting.since)
    if waiting.phase not in PHASES or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        return None
    return waiting if all(isinstance(name, str) for name in waiting.asked + waiting.missing) else None
