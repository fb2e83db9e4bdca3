"""The run store: SQLite beside the checkpoints, and the one atomic step that ends a round.

A result directory holds `store.sqlite` and `checkpoints/`. A round ends when its database transaction commits: the row of
the round names its checkpoint, which was synced and renamed before. A crash before the commit leaves a checkpoint that no
row names; it is removed when the run is resumed. A crash after the commit loses nothing.
"""

import fcntl
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fedseg.config import Experiment
from fedseg.errors import StoreError
from fedseg.federated.checkpoint import load_state, save_state
from fedseg.federated.faults import reach
from fedseg.federated.phases import Phase, PhaseClock
from fedseg.federated.rounds import AcceptedUpdate, RoundReport, ServerState
from fedseg.federated.software import software
from fedseg.federated.waiting import WaitingFile, waiting_path
from fedseg.federated.weights import digest

log = logging.getLogger(__name__)

CHECKPOINTS_KEPT = 2
VERSION = 4

SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    run TEXT PRIMARY KEY, name TEXT NOT NULL, experiment TEXT NOT NULL, digest TEXT NOT NULL,
    started REAL NOT NULL, finished REAL, resumed INTEGER NOT NULL DEFAULT 0, software TEXT);
CREATE TABLE IF NOT EXISTS rounds (
    run TEXT NOT NULL REFERENCES runs, server_round INTEGER NOT NULL, attempts INTEGER NOT NULL, asked TEXT NOT NULL,
    seconds REAL NOT NULL, finished REAL NOT NULL, checkpoint TEXT NOT NULL, checkpoint_sha256 TEXT NOT NULL,
    weights_sha256 TEXT NOT NULL, PRIMARY KEY (run, server_round));
CREATE TABLE IF NOT EXISTS updates (
    run TEXT NOT NULL REFERENCES runs, server_round INTEGER NOT NULL, site TEXT NOT NULL, status TEXT NOT NULL,
    reason TEXT, num_cases INTEGER, norm REAL, bytes INTEGER, seconds REAL, training TEXT, quarantined TEXT,
    manifest TEXT, cosine REAL);
CREATE TABLE IF NOT EXISTS metrics (
    run TEXT NOT NULL REFERENCES runs, server_round INTEGER NOT NULL, site TEXT NOT NULL, name TEXT NOT NULL,
    value REAL NOT NULL, PRIMARY KEY (run, server_round, site, name));
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL REFERENCES runs, time REAL NOT NULL, kind TEXT NOT NULL,
    server_round INTEGER, site TEXT, detail TEXT);
CREATE TABLE IF NOT EXISTS phases (
    run TEXT NOT NULL REFERENCES runs, server_round INTEGER NOT NULL, phase TEXT NOT NULL, seconds REAL NOT NULL,
    PRIMARY KEY (run, server_round, phase));
CREATE TABLE IF NOT EXISTS requests (
    run TEXT NOT NULL REFERENCES runs, server_round INTEGER NOT NULL, site TEXT NOT NULL, bytes INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS updates_by_round ON updates (run, server_round);
PRAGMA user_version = 4;
"""

CHANGES = {
    2: "ALTER TABLE updates ADD COLUMN manifest TEXT",
    3: "ALTER TABLE updates ADD COLUMN cosine REAL",
    4: "ALTER TABLE runs ADD COLUMN software TEXT",
}
"""What makes an older store one of this version, beside the tables that it does not have."""

SiteScores = Mapping[str, Mapping[str, float]]
"""Means of metrics by site."""


class RunStore:
    """One run (`federated`, `pooled`, `local-A`, ...) in a result directory.

    Args:
        directory: the result directory; made if absent.
        run: the run's name in it, usable as a file name.

    Raises:
        StoreError: the directory's database is no run store.
    """

    def __init__(self, directory: Path, run: str = "federated") -> None:
        self.directory, self.run = directory, run
        self._lock: IO[bytes] | None = None
        self.waiting = WaitingFile(waiting_path(directory, run))
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(directory / "store.sqlite", timeout=60, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version < VERSION:
                version = self._take_over()
        except sqlite3.DatabaseError as error:
            raise StoreError(f"{directory / 'store.sqlite'}: not a run store: {error}") from error
        if version > VERSION:
            raise StoreError(
                f"{directory / 'store.sqlite'}: run store version {version} is not {VERSION}; use the release that wrote it"
            )

    def close(self) -> None:
        """Close the database and let others run the run."""
        self._db.close()
        if self._lock is not None:
            self._lock.close()

    def begin(self, experiment: Experiment, state: ServerState) -> None:
        """Record a new run with its initial state.

        Raises:
            StoreError: the directory holds this run already, or another process is running it.
        """
        self._claim()
        if self._row("SELECT 1 FROM runs WHERE run = ?", self.run):
            raise StoreError(
                f"{self.directory}: holds run {self.run!r} already; resume it (--resume) or choose another --output"
            )
        self._commit(state, _initial_report(), {}, experiment)

    def resume(self, experiment: Experiment) -> ServerState | None:
        """The state after the last finished round, or None if the run never began.

        Leftovers of a crash are removed. If the newest checkpoint is damaged, the run goes back to the one before it.

        Raises:
            StoreError: the run belongs to another experiment, another process is running it, or no checkpoint is
                readable.
        """
        self._claim()
        row = self._row("SELECT digest, experiment, software FROM runs WHERE run = ?", self.run)
        if row is None:
            return None
        if row[0] != experiment.digest():
            changed = _differences(json.loads(row[1]), json.loads(experiment.to_json()))
            raise StoreError(
                f"{self.directory}: run {self.run!r} has another experiment; changed: {', '.join(changed)}"
            )
        state = self._newest_readable_state()
        self._prune(state.server_round)
        self._db.execute("UPDATE runs SET resumed = resumed + 1 WHERE run = ?", (self.run,))
        self.event("resumed", state.server_round, detail=_other_software(row[2]))
        return state

    def commit_round(
        self, state: ServerState, report: RoundReport, scores: Mapping[int, SiteScores] | None = None
    ) -> None:
        """End a round: checkpoint, round, updates and metrics in one atomic step.

        Args:
            state: after the round.
            report: what happened in it.
            scores: means of metrics by round and site, for the weights that the round started from.
        """
        self._commit(state, report, scores or {}, None)

    def sent(self, server_round: int, sites: Sequence[str], size: int) -> None:
        """Record that sites were asked, whatever becomes of it.

        Args:
            server_round: which round is computed.
            sites: who was asked.
            size: bytes of arrays that each of them was sent.
        """
        with self._transaction():
            self._db.executemany(
                "INSERT INTO requests VALUES (?, ?, ?, ?)", [(self.run, server_round, site, size) for site in sites]
            )

    def finish(self, server_round: int, metrics: SiteScores, phases: Mapping[Phase, float] | None = None) -> None:
        """Record the closing evaluation and mark the run as finished.

        Args:
            server_round: the last one.
            metrics: means by site.
            phases: seconds that it took.
        """
        with self._transaction():
            self._write_metrics(server_round, metrics)
            self._write_phases(server_round, phases or {})
            self._db.execute("UPDATE runs SET finished = ? WHERE run = ?", (time.time(), self.run))
        reach("final-written")

    def is_finished(self) -> bool:
        """Whether the closing evaluation is in."""
        return bool(self._row("SELECT 1 FROM runs WHERE run = ? AND finished IS NOT NULL", self.run))

    def event(self, kind: str, server_round: int | None = None, site: str | None = None, detail: str = "") -> None:
        """Record that something happened."""
        self._db.execute(
            "INSERT INTO events (run, time, kind, server_round, site, detail) VALUES (?, ?, ?, ?, ?, ?)",
            (self.run, time.time(), kind, server_round, site, detail),
        )

    def metrics(self, name: str) -> dict[int, dict[str, float]]:
        """One metric by round and site."""
        query = "SELECT server_round, site, value FROM metrics WHERE run = ? AND name = ? ORDER BY server_round, site"
        found: dict[int, dict[str, float]] = {}
        for server_round, site, value in self._db.execute(query, (self.run, name)):
            found.setdefault(server_round, {})[site] = value
        return found

    def rows(self, query: str, *values: object) -> list[dict[str, Any]]:
        """The rows of a read-only query as dicts."""
        cursor = self._db.execute(query, values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def checkpoint_path(self, server_round: int) -> Path:
        """Where the state after a round is kept."""
        return self.directory / "checkpoints" / f"{self.run}-round-{server_round:04d}.safetensors"

    def _take_over(self) -> int:
        """Make a new store, or one of an earlier release, one of this version; returns the version that it has now."""
        with self._transaction():
            version = int(self._db.execute("PRAGMA user_version").fetchone()[0])  # another process may have been faster
            if version < VERSION:
                for newer in range(version + 1, VERSION + 1) if version else ():
                    self._db.execute(CHANGES[newer])
                for statement in SCHEMA.split(";"):
                    self._db.execute(statement)
        return max(version, VERSION)

    def _claim(self) -> None:
        """Keep other processes from running the same run; the system lets go when this one ends, however it ends."""
        if self._lock is not None:
            return
        lock = (self.directory / f".{self.run}.lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise StoreError(
                f"{self.directory}: another process is running {self.run!r}; wait for it or end it"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
        lock.flush()
        self._lock = lock

    def _commit(
        self,
        state: ServerState,
        report: RoundReport,
        metrics: Mapping[int, SiteScores],
        experiment: Experiment | None,
    ) -> None:
        path, clock = self.checkpoint_path(state.server_round), PhaseClock("checkpoint")
        sha256 = save_state(path, state)
        with self._transaction():
            if experiment is not None:
                self._db.execute(
                    "INSERT INTO runs (run, name, experiment, digest, started, software) VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        self.run,
                        experiment.name,
                        experiment.to_json(),
                        experiment.digest(),
                        time.time(),
                        json.dumps(software()),
                    ),
                )
            reach("store-begun")
            self._db.execute(
                "INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (self.run, state.server_round, report.attempts, json.dumps(report.asked), report.seconds, time.time(),
                 path.name, sha256, digest(state.weights)),
            )  # fmt: skip
            self._write_updates(report)
            self._write_phases(state.server_round, report.phases)
            for server_round, by_site in metrics.items():
                self._write_metrics(server_round, by_site)
            reach("store-written")
        reach("store-committed")
        self._write_phases(state.server_round, clock.seconds())  # known only now; if a crash comes first, it never is
        self._prune(state.server_round)
        reach("checkpoints-pruned")

    def _write_updates(self, report: RoundReport) -> None:
        insert = "INSERT INTO updates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        for update in report.accepted:
            self._notice_changed_data(report.server_round, update)
            self._db.execute(
                insert,
                (self.run, report.server_round, update.site, "accepted", None, update.num_cases, update.norm,
                 update.num_bytes, update.seconds, json.dumps(dict(update.training)), json.dumps(dict(update.quarantined)),
                 update.manifest, update.cosine),
            )  # fmt: skip
        for failure in report.failures:
            values = (self.run, report.server_round, failure.site, failure.kind, failure.reason)
            self._db.execute(insert, (*values, None, None, None, None, None, None, None, None))

    def _notice_changed_data(self, server_round: int, update: AcceptedUpdate) -> None:
        """A site whose data manifest has another digest than in its last round trains on other data."""
        row = self._row(
            "SELECT manifest, server_round FROM updates WHERE run = ? AND site = ? AND manifest != '' AND server_round < ? "
            "ORDER BY server_round DESC LIMIT 1",
            self.run,
            update.site,
            server_round,
        )
        if row and update.manifest and row[0] != update.manifest:
            about = {"round": server_round, "site": update.site}
            log.warning("the data of %s have changed since round %d", update.site, row[1], extra=about)
            self.event("data-changed", server_round, update.site, f"since round {row[1]}")

    def _write_metrics(self, server_round: int, metrics: SiteScores) -> None:
        for site, values in metrics.items():
            self._db.executemany(
                "INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?, ?)",
                [(self.run, server_round, site, name, value) for name, value in values.items()],
            )

    def _write_phases(self, server_round: int, phases: Mapping[Phase, float]) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO phases VALUES (?, ?, ?, ?)",
            [(self.run, server_round, phase, seconds) for phase, seconds in phases.items()],
        )

    def _newest_readable_state(self) -> ServerState:
        query = (
            "SELECT server_round, checkpoint, checkpoint_sha256 FROM rounds WHERE run = ? ORDER BY server_round DESC"
        )
        problem = ""
        for server_round, name, sha256 in self._db.execute(query, (self.run,)).fetchall():
            try:
                state = load_state(self.directory / "checkpoints" / name, sha256)
            except StoreError as error:
                problem = str(error)
                continue
            if problem:
                self._go_back_to(server_round, problem)
            return state
        raise StoreError(
            f"{self.directory}: run {self.run!r} has no readable checkpoint: {problem or 'it has no rounds'}"
        )

    def _go_back_to(self, server_round: int, problem: str) -> None:
        with self._transaction():
            for table in ("rounds", "updates", "phases"):
                self._db.execute(f"DELETE FROM {table} WHERE run = ? AND server_round > ?", (self.run, server_round))
            self._db.execute("DELETE FROM metrics WHERE run = ? AND server_round >= ?", (self.run, server_round))
            self._db.execute("UPDATE runs SET finished = NULL WHERE run = ?", (self.run,))
        self.event("went-back", server_round, detail=problem)

    def _prune(self, server_round: int) -> None:
        kept = {
            self.checkpoint_path(number).name for number in range(server_round - CHECKPOINTS_KEPT + 1, server_round + 1)
        }
        for path in (self.directory / "checkpoints").glob(f"*{self.run}-round-*.safetensors*"):
            if path.name.lstrip(".").startswith(f"{self.run}-round-") and path.name not in kept:
                path.unlink(missing_ok=True)

    def _row(self, query: str, *values: object) -> Any:
        return self._db.execute(query, values).fetchone()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _initial_report() -> RoundReport:
    return RoundReport(server_round=0, attempts=0, asked=(), accepted=(), failures=(), seconds=0.0)


def _other_software(recorded: str | None) -> str:
    """How the libraries differ from those with which a run began; empty if they do not, or nobody knows."""
    before, now = json.loads(recorded or "{}"), software()
    changed = [name for name in now if before and before.get(name) != now[name]]
    return ", ".join(f"{name} {before.get(name, 'absent')} -> {now[name]}" for name in changed)


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{prefix} {old!r} -> {new!r}"]
    keys = sorted(old.keys() | new.keys())
    return [
        line for key in keys for line in _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    ]
