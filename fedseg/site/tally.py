"""What a site has done so far, in numbers: begun from the audit log, and told of every entry that is added to it.

So counters go on after a restart. Figures of training and scores are kept only where the policy let them leave: the gate, which
runs a program of the coordinator's, can ask the same socket as the hospital's own monitoring.
"""

import logging
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fedseg import errors
from fedseg.data.reasons import Reason
from fedseg.errors import AuditError, FedsegError
from fedseg.site.chain import Entry, entries
from fedseg.site.policy import Policy

log = logging.getLogger(__name__)

KINDS = ("train", "evaluate")
DECISIONS = ("allowed", "refused", "abstained", "cancelled", "failed")
OTHER = "other"
"""Stands for every code that is not in one of these lists, so that nobody can make a label up."""
RULES = ("kind", *Policy.model_fields, OTHER)
ERRORS = (
    *sorted(
        name
        for name, found in vars(errors).items()
        if isinstance(found, type) and issubclass(found, FedsegError) and found is not FedsegError
    ),
    "OutOfMemoryError",
    OTHER,
)
"""Classes of errors that are counted by name."""
STRUCTURES_SHOWN = 256
"""Of the last scores; a study names its structures itself."""


class Tally:
    """Counts, and the last figures; one thread adds while others read.

    Args:
        log_path: audit log with which to begin; absent: from nothing.
    """

    def __init__(self, log_path: Path | None = None) -> None:
        self.lock = threading.Lock()
        """Whoever reads more than one figure holds it."""
        self.requests: Counter[tuple[str, str]] = Counter()
        """By kind and decision."""
        self.refusals: Counter[str] = Counter()
        """By rule of the policy."""
        self.failures: Counter[str] = Counter()
        """By class of error."""
        self.counts: Counter[str] = Counter()
        """`epochs`, `steps`, `received_bytes`, `sent_bytes`, `hit` and `miss` of the cache, `unwritten` audit entries."""
        self.entries = 0
        """Of the audit log."""
        self.server_round: int | None = None
        self.last: dict[str, float] = {}
        """Of the last request or training: `seconds`, `loss`, `wait_ratio`, `images_per_second`, `training_cases`,
        `validation_cases`, `drift_alarm`, `unusual_cases`, and `answered`: seconds since 1970."""
        self.dice: dict[str, float] = {}
        """Mean over the validation cases by structure, as last scored."""
        self.quarantined: Counter[str] | None = None
        """Cases by reason; None: the policy keeps that at home, or nothing was asked yet."""
        if log_path is not None and log_path.exists():
            try:
                for entry in entries(log_path):
                    self.take(entry)
            except AuditError as error:
                log.warning("counters begin with a part of the audit log only: %s", error)

    def take(self, entry: Entry) -> None:
        """Count an entry of the log, whichever release has written it."""
        with self.lock:
            self.entries = entry.seq
            if entry.entry.get("event") == "request":
                self._request(entry)

    def unwritten(self) -> None:
        """Count an entry that could not be written."""
        with self.lock:
            self.counts["unwritten"] += 1

    def _request(self, entry: Entry) -> None:
        told, asked, left = entry.entry, entry.asked, _mapping(entry.entry.get("left"))
        kind, decided = _known(asked.get("kind"), KINDS), _known(told.get("decided"), DECISIONS)
        self.requests[kind, decided] += 1
        self.counts["received_bytes"] += _count(asked.get("bytes"))
        self.counts["sent_bytes"] += _count(left.get("bytes"))
        for outcome in ("hit", "miss"):
            self.counts[outcome] += _count(_mapping(told.get("cache")).get(outcome))
        self.server_round = _count(asked.get("server_round")) or self.server_round
        self._keep(seconds=told.get("seconds"))
        if decided == "refused":
            self.refusals[_known(told.get("rule"), RULES)] += 1
        elif decided == "failed":
            self.failures[_known(left.get("reason"), ERRORS)] += 1
        elif decided == "allowed":
            self._answered(entry, told)
            if kind == "train":
                self._trained(told, asked, left)

    def _answered(self, entry: Entry, told: Mapping[str, Any]) -> None:
        self._keep(answered=datetime.fromisoformat(entry.time).timestamp(), training_cases=told.get("cases"))
        self._keep(validation_cases=told.get("validation_cases"))
        self._looked(_mapping(told.get("drift")))
        if isinstance(found := told.get("dice"), dict) and found:
            self.dice = {
                name: value for name, value in [*found.items()][:STRUCTURES_SHOWN] if _number(value) is not None
            }
        if isinstance(found := told.get("quarantined"), dict):
            self.quarantined = Counter()
            for reason, count in found.items():
                self.quarantined[_known(reason, (*Reason, OTHER))] += _count(count)

    def _looked(self, drift: Mapping[str, Any]) -> None:
        if drift.get("may_leave"):
            self._keep(drift_alarm=float(bool(drift.get("alarm"))), unusual_cases=drift.get("unusual"))

    def _trained(self, told: Mapping[str, Any], asked: Mapping[str, Any], left: Mapping[str, Any]) -> None:
        allowed = left.get("training")
        figures = {
            name: number
            for name, value in _mapping(told.get("training")).items()
            if isinstance(allowed, list) and name in allowed and (number := _number(value)) is not None
        }
        self.counts["epochs"] += _count(asked.get("local_epochs"))
        self.counts["steps"] += int(figures.get("steps", 0))
        seconds, patches = figures.get("seconds", 0.0), _number(told.get("patches"))
        self._keep(loss=figures.get("loss"))
        if seconds > 0:
            if "data_seconds" in figures:
                self._keep(wait_ratio=figures["data_seconds"] / seconds)
            if patches is not None and "steps" in figures:
                self._keep(images_per_second=patches / seconds)

    def _keep(self, **figures: Any) -> None:
        self.last |= {name: number for name, value in figures.items() if (number := _number(value)) is not None}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """A number of the log; a loss that was not finite stands there as text."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _count(value: Any) -> int:
    return max(int(_number(value) or 0), 0)


def _known(code: Any, known: Collection[str]) -> str:
    return str(code) if code in known else OTHER


def in_full(counts: Mapping[str, int], codes: Iterable[str]) -> list[tuple[str, int]]:
    """Zeros too, or the first of a kind would not look like an increase."""
    return [(str(code), counts.get(code, 0)) for code in codes]
