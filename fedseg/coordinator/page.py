"""What the watching page (page.html) and `fedseg server watch` show; another process may be writing what they read."""

import contextlib
import json
import math
import re
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fedseg.coordinator.state import RUN, Store, is_locked, is_supervised, read_status, reader
from fedseg.coordinator.watch import online_nodes
from fedseg.errors import ConfigError
from fedseg.federated.waiting import Waiting, read_waiting
from fedseg.members import read_who

Point = tuple[int, float]
"""A round and a value."""
POINTS, SPARKS, EVENTS = 400, 40, 12
"""How many points a curve has at most, how many a site's small curve, and how many events are told."""


def watched(directory: Path, run: str | None = None) -> dict[str, Any]:
    """All that the watching page shows: numbers, names of sites, reason codes; no path and no case.

    Args:
        directory: a study's state folder, the run directory in it, or a simulation's run directory.
        run: which run of it; absent: `federated`, or the first.

    Returns:
        What can be written as JSON. Times are seconds since 1970, curves are lists of round and value.
    """
    folder, state = places(directory)
    with reader(folder) as store:
        names = [row["run"] for row in store("SELECT run FROM runs ORDER BY started, run")]
        chosen = run if run is not None and run in names else RUN if RUN in names or not names else str(names[0])
        found: dict[str, Any] = {"time": time.time(), "run": chosen, "runs": names}
        waiting = read_waiting(folder, chosen) if is_locked(folder / f".{chosen}.lock") else None
        rows = store("SELECT * FROM runs WHERE run = ?", chosen)
        found |= _progress(store, rows[0], waiting) if rows else _NOT_BEGUN
        found |= _study(state)
        found["state"] = _state_of(found, folder, state)
        if found["state"] != "running":
            found["expected_end"] = None
        found["waiting"] = _waiting_for(waiting) if waiting and not found["finished"] else None
        curves = _Curves(store, chosen)
        found["curves"] = curves.of_all()
        found["sites"] = _sites(store, chosen, curves, waiting, state)
        found["events"] = _events(store, chosen)
    return found


_NOT_BEGUN: dict[str, Any] = {
    "study": "", "model": "", "round": 0, "of": None, "needed": None, "started": None, "finished": None, "resumed": 0,
    "committed": None, "expected_end": None,
}  # fmt: skip


def places(directory: Path) -> tuple[Path, Path | None]:
    """The run directory, and the state folder if there is one.

    Args:
        directory: a state folder, the run directory in it, or another run directory.
    """
    if (directory / "store.sqlite").exists():
        parent = directory.absolute().parent
        return directory, parent if directory.name == "run" and (parent / "status.json").exists() else None
    if (directory / "status.json").exists():
        return directory / "run", directory
    return directory, None


def _progress(store: Store, run: sqlite3.Row, waiting: Waiting | None) -> dict[str, Any]:
    experiment = json.loads(run["experiment"])
    federation = experiment["federation"]
    last = store("SELECT * FROM rounds WHERE run = ? ORDER BY server_round DESC LIMIT 5", run["run"])
    number, committed = (last[0]["server_round"], last[0]["finished"]) if last else (0, run["started"])
    seconds = [row["seconds"] for row in last if row["server_round"]]
    left, end = federation["rounds"] - number, None
    if seconds and left > 0:
        each = statistics.median(seconds)
        begun = waiting.since if waiting else committed
        end = max(begun + each, time.time()) + (left - 1) * each
    return {
        "study": run["name"],
        "model": experiment["model"]["name"],
        "round": number,
        "of": federation["rounds"],
        "needed": federation["min_sites"],
        "started": run["started"],
        "finished": run["finished"],
        "resumed": run["resumed"],
        "committed": committed,
        "expected_end": end,
    }


def _study(state: Path | None) -> dict[str, Any]:
    """What the supervisor adds; the trouble itself is a sentence with paths and stays where it is."""
    if state is None:
        return {"restarts": 0, "trouble": False}
    try:
        status = read_status(state)
        restarts = sum(count for count in status["restarts"].values() if isinstance(count, int))
        trouble = bool(status["problem"]) and not status.get("problem_over")
        return {"study": str(status["study"]), "restarts": restarts, "trouble": trouble}
    except (ConfigError, KeyError, AttributeError):
        return {"restarts": 0, "trouble": False}


def _state_of(found: dict[str, Any], folder: Path, state: Path | None) -> str:
    if found["finished"] is not None:
        return "finished"
    if is_locked(folder / f".{found['run']}.lock"):
        return "running"
    if state is not None and (state / "stopped").exists():
        return "stopped"
    if state is not None and is_supervised(state):
        return "starting"
    return "not running" if found["started"] is not None else "not begun"


def _waiting_for(waiting: Waiting) -> dict[str, Any]:
    return {
        "round": waiting.server_round,
        "closing": waiting.closing,
        "attempt": waiting.attempt,
        "since": waiting.since,
        "phase": waiting.phase,
        "asked": len(waiting.asked),
        "sites": sorted(waiting.missing),
    }


class _Curves:
    """Dice and loss of every site by round."""

    def __init__(self, store: Store, run: str) -> None:
        self.dice: dict[str, list[Point]] = {}
        self.loss: dict[str, list[Point]] = {}
        scores = "SELECT site, server_round, value FROM metrics WHERE run = ? AND name = 'dice' ORDER BY server_round"
        for row in store(scores, run):
            if math.isfinite(row["value"]):
                self.dice.setdefault(row["site"], []).append((row["server_round"], row["value"]))
        losses = "SELECT site, server_round, training FROM updates WHERE run = ? AND training IS NOT NULL ORDER BY server_round"
        for row in store(losses, run):
            loss = json.loads(row["training"]).get("loss")
            if isinstance(loss, int | float) and math.isfinite(loss):
                self.loss.setdefault(row["site"], []).append((row["server_round"], loss))

    def of_all(self) -> dict[str, list[Point]]:
        """By round: mean and worst site's Dice of the weights after it, mean loss of the sites while they trained in it."""
        return {
            "dice": _by_round(self.dice, statistics.fmean),
            "dice_worst": _by_round(self.dice, min),
            "loss": _by_round(self.loss, statistics.fmean),
        }


def _by_round(curves: dict[str, list[Point]], summary: Callable[[Iterable[float]], float]) -> list[Point]:
    values: dict[int, list[float]] = {}
    for curve in curves.values():
        for number, value in curve:
            values.setdefault(number, []).append(value)
    return _thinned([(number, summary(values[number])) for number in sorted(values)])


def _thinned(curve: list[Point]) -> list[Point]:
    step = -(-len(curve) // POINTS)
    return curve if step <= 1 else sorted({*curve[::step], curve[-1]})


def _sites(
    store: Store, run: str, curves: _Curves, waiting: Waiting | None, state: Path | None
) -> list[dict[str, Any]]:
    asked = store("SELECT asked FROM rounds WHERE run = ? ORDER BY server_round DESC LIMIT 1", run)
    names = {row["site"] for row in store("SELECT DISTINCT site FROM updates WHERE run = ?", run)}
    names |= {*curves.dice, *(json.loads(asked[0]["asked"]) if asked else ()), *(waiting.asked if waiting else ())}
    nodes = _nodes(state)
    last = {row["site"]: row for row in store(_LAST_ANSWER, run)}
    accepted = {row["site"]: dict(row) for row in store(_LAST_UPDATE, run)}
    rows = []
    for name in sorted(names | set(nodes)):
        answer, update = last.get(name), accepted.get(name)
        dice, loss = curves.dice.get(name, []), curves.loss.get(name, [])
        connected = nodes.get(name, False) if state is not None else None
        rows.append(
            {
                "name": name,
                "state": _site_state(name, connected, waiting),
                "seen": answer["finished"] if answer else None,
                "round": update["server_round"] if update else None,
                "cases": update["num_cases"] if update else None,
                "quarantined": sum(json.loads(update["quarantined"]).values()) if update else None,
                "dice": dice[-1][1] if dice else None,
                "dice_curve": dice[-SPARKS:],
                "cosine": update.get("cosine") if update else None,
                "loss": loss[-1][1] if loss else None,
                "loss_curve": loss[-SPARKS:],
                "said": answer["status"] if answer else "",
                "reason": _code(answer["reason"]) if answer else "",
            }
        )
    return rows


_LAST_ANSWER = (
    "SELECT u.site, u.status, u.reason, r.finished, max(u.rowid) FROM updates u JOIN rounds r USING (run, server_round) "
    "WHERE u.run = ? GROUP BY u.site"
)
_LAST_UPDATE = "SELECT *, max(rowid) FROM updates WHERE run = ? AND status = 'accepted' GROUP BY site"


def _site_state(name: str, connected: bool | None, waiting: Waiting | None) -> str:
    if connected is False:
        return "not connected"
    if waiting is None or name not in waiting.asked:
        return "idle"
    return "asked" if name in waiting.missing else "answered"


def _nodes(state: Path | None) -> dict[str, bool]:
    """Sites with a registered key, and whether they are connected."""
    if state is None:
        return {}
    with contextlib.suppress(ConfigError):
        online = online_nodes(state / "superlink.db")
        return {member.name: node in online for node, member in read_who(state / "sites.json").items()}
    return {}


_TOLD_WITH_DETAIL = ("repeated", "data-changed")
_TOLD_WITH_CODE = ("abstained", "failed", "late", "refused")


def _events(store: Store, run: str) -> list[dict[str, Any]]:
    """What happened lately, the newest first; what happens again and again is told once."""
    newest = "SELECT * FROM events WHERE run = ? ORDER BY id DESC LIMIT 1000"
    events: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in store(newest, run):
        kind, site = row["kind"], row["site"] or ""
        detail = ""  # what went back to an older checkpoint says so with its path
        if kind in _TOLD_WITH_DETAIL:
            detail = row["detail"] or ""
        elif kind in _TOLD_WITH_CODE:
            detail = _code(row["detail"])
        told = {
            "time": row["time"],
            "kind": kind,
            "round": row["server_round"],
            "site": site,
            "detail": detail,
            "times": 0,
        }
        event = events.setdefault((kind, site, detail), told)
        event["times"] += 1
        event["first"] = row["server_round"]
    return list(events.values())[:EVENTS]


def _code(reason: str | None) -> str:
    """A reason as it stands if it looks like one; a site could have sent anything."""
    return reason if reason and re.fullmatch(r"[\w.-]{1,60}", reason) else ""
