"""What has been measured, in SQLite: one row for each network, view, case and structure, committed case by case."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from fedseg.errors import StoreError
from fedseg.metrics import LabelScore
from fedseg.robustness.confidence import Confidence
from fedseg.robustness.measure import Measured, Scored
from fedseg.robustness.uncertainty import Doubt

VERSION = 1

SCHEMA = """
CREATE TABLE IF NOT EXISTS scores (
    model TEXT NOT NULL, view TEXT NOT NULL, case_name TEXT NOT NULL, structure TEXT NOT NULL, dice REAL NOT NULL,
    hd95 REAL, surface_dice REAL, volume_predicted REAL NOT NULL, volume_reference REAL NOT NULL,
    PRIMARY KEY (model, view, case_name, structure)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS confidences (
    model TEXT NOT NULL, view TEXT NOT NULL, case_name TEXT NOT NULL, voxels TEXT NOT NULL, confidence TEXT NOT NULL,
    correct TEXT NOT NULL, brier REAL NOT NULL, PRIMARY KEY (model, view, case_name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS doubts (
    model TEXT NOT NULL, view TEXT NOT NULL, case_name TEXT NOT NULL, augmented REAL NOT NULL, heads REAL,
    PRIMARY KEY (model, view, case_name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS skipped (
    view TEXT NOT NULL, case_name TEXT NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (view, case_name)) WITHOUT ROWID;
PRAGMA user_version = 1;
"""

Key = tuple[str, str]
"""SHA-256 of a network, and key of a view."""


@dataclass(frozen=True)
class Found:
    """All that has been measured, by network and view, then by case."""

    scored: dict[Key, dict[str, Scored]]
    doubts: dict[Key, dict[str, Doubt]]
    skipped: dict[str, dict[str, str]]
    """Reasons by view and case."""


class RobustnessStore:
    """A file of measurements; the views' keys and the networks' hashes say what they are of.

    Args:
        path: the file; made where it is missing.

    Raises:
        StoreError: it is something else, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _errors(path):
            self._database = sqlite3.connect(path, timeout=30.0)
            version = self._database.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise StoreError(f"{path}: has version {version}, this fedseg knows {VERSION}; remove it to begin anew")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.executescript(SCHEMA)

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def add(self, view: str, case: str, measured: Measured) -> None:
        """Keep what became of one case: all of it, or nothing if the process dies."""
        with _errors(self.path), self._database as database:
            if measured.skipped:
                database.execute("INSERT OR REPLACE INTO skipped VALUES (?, ?, ?)", (view, case, measured.skipped))
            for model, scored in measured.scored.items():
                database.executemany(
                    "INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [(model, view, case, name, *astuple(score)) for name, score in scored.labels.items()],
                )
                sums = scored.confidence
                bins = (json.dumps(values) for values in (sums.voxels, sums.confidence, sums.correct))
                database.execute(
                    "INSERT OR REPLACE INTO confidences VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (model, view, case, *bins, sums.brier),
                )
            for model, doubt in measured.doubts.items():
                database.execute(
                    "INSERT OR REPLACE INTO doubts VALUES (?, ?, ?, ?, ?)",
                    (model, view, case, doubt.augmented, doubt.heads),
                )

    def read(self) -> Found:
        """All that is there."""
        found = Found({}, {}, {})
        with _errors(self.path):
            for model, view, case, name, *values in self._database.execute("SELECT * FROM scores"):
                score = LabelScore(*(float("nan") if value is None else value for value in values))  # SQLite has no NaN
                empty = Scored({}, Confidence((), (), (), 0.0))
                found.scored.setdefault((model, view), {}).setdefault(case, empty).labels[name] = score
            for model, view, case, *bins, brier in self._database.execute("SELECT * FROM confidences"):
                voxels, sums, correct = (tuple(json.loads(one)) for one in bins)
                confidence = Confidence(voxels, sums, correct, brier)
                cases = found.scored[model, view]
                cases[case] = Scored(cases[case].labels, confidence)
            for model, view, case, augmented, heads in self._database.execute("SELECT * FROM doubts"):
                found.doubts.setdefault((model, view), {})[case] = Doubt(augmented, heads)
            for view, case, reason in self._database.execute("SELECT * FROM skipped"):
                found.skipped.setdefault(view, {})[case] = reason
        return found


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {error}; remove it to measure everything anew") from error
