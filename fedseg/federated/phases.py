"""What a round is doing, and for how long it did it: every moment of an attempt belongs to one phase.

`broadcast`  until the fleet has handed over the requests, as far as it can tell: over Flower until Flower has them, with workers
             until the instructions lie in shared memory, in one process no time at all
`wait`       until the last answer, what is received and decoded meanwhile included
`aggregate`  screening and folding updates between two answers; then joining them and stepping the weights
`evaluate`   the closing evaluation, as a whole; all other scores ride on answers that are waited for anyway
`checkpoint` writing the state and committing the round
"""

import time
from collections.abc import Callable
from typing import Literal, get_args

Phase = Literal["broadcast", "wait", "aggregate", "evaluate", "checkpoint"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class PhaseClock:
    """Adds up seconds by phase; their sum is the time since it was made.

    Args:
        phase: the first one.
        tell: is told of every further one.
    """

    def __init__(self, phase: Phase, tell: Callable[[Phase], None] = lambda _: None) -> None:
        self._begun = self._since = time.monotonic()
        self._phase, self._tell = phase, tell
        self._seconds: dict[Phase, float] = {}

    def enter(self, phase: Phase) -> None:
        """Another phase begins."""
        self._add()
        self._phase = phase
        self._tell(phase)

    def elapsed(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._begun

    def seconds(self) -> dict[Phase, float]:
        """Until now, by phase."""
        self._add()
        return dict(self._seconds)

    def _add(self) -> None:
        now = time.monotonic()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._since = now
