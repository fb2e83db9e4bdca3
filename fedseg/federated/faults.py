"""Named points at which a test can kill the process, to prove that a run survives it.

`FEDSEG_FAULT=checkpoint-renamed:3` sends SIGKILL to the process when it reaches that point for the third time. Without
the variable a point costs one dictionary look-up.
"""

import os
import signal
from collections import Counter

WRITE_POINTS = (
    "round-begun",
    "update-folded",
    "checkpoint-begun",
    "checkpoint-written",
    "checkpoint-renamed",
    "store-begun",
    "store-written",
    "store-committed",
    "checkpoints-pruned",
    "final-written",
)
"""Every named point of a round, in the order in which it is passed."""

_reached: Counter[str] = Counter()


def reach(point: str) -> None:
    """Die here if the environment says so."""
    fault = os.environ.get("FEDSEG_FAULT")
    if not fault:
        return
    name, _, count = fault.partition(":")
    if name == point:
        _reached[point] += 1
        if _reached[point] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)
