"""Runs that were: found in folders, told round by round, and written out for other programs."""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedseg.coordinator.state import Store, reader
from fedseg.errors import StoreError

BARS = "▁▂▃▄▅▆▇█"
DEEPEST = 4
"""Levels of folders below the one that is searched."""


@dataclass(frozen=True)
class RunSummary:
    """One run in a run directory."""

    directory: str
    run: str
    study: str
    model: str
    started: float
    finished: float | None
    rounds: int
    planned: int
    resumed: int
    sites: int
    dice: float | None
    """Mean over the sites of the newest scored weights."""
    best: float | None

    @property
    def state(self) -> str:
        """`finished`, or how far it is."""
        return "finished" if self.finished is not None else f"after round {self.rounds}"


@dataclass(frozen=True)
class RoundStory:
    """One committed round."""

    server_round: int
    finished: float
    seconds: float
    attempts: int
    asked: int
    accepted: int
    cases: int
    loss: float | None
    """Mean over the sites."""
    megabytes: float
    """Of arrays that came from the sites."""
    dice: float | None
    """Of the weights after this round, mean over the sites."""
    worst: float | None
    cosine: float | None
    """Lowest of the sites, of the angle between a site's update and the joint one."""
    farthest: str
    """The site that it is of; empty if none is known."""
    failures: list[str] = field(default_factory=list)


def find_runs(folder: Path) -> Iterator[RunSummary]:
    """Every run below a folder, newest last in each directory.

    Raises:
        StoreError: there is none.
    """
    _check_is_folder(folder)
    found = False
    for directory in sorted(
        {path.parent for depth in range(DEEPEST) for path in folder.glob("*/" * depth + "store.sqlite")}
    ):
        with reader(directory) as store:
            for run in store("SELECT * FROM runs ORDER BY started"):
                found = True
                yield _summary(directory, run, store)
    if not found:
        raise StoreError(
            f"{folder}: holds no run store (store.sqlite), nor does a folder in it; name a result directory"
        )


def rounds_of(directory: Path, run: str) -> list[RoundStory]:
    """The rounds of a run.

    Raises:
        StoreError: the directory has no such run.
    """
    _check_is_folder(directory)
    with reader(directory) as store:
        names = [row["run"] for row in store("SELECT run FROM runs")]
        if run not in names:
            raise StoreError(f"{directory}: holds no run {run!r}; it holds {', '.join(names) or 'none'}")
        scores = _dice(store, run)
        return [
            _story(store, run, row, scores.get(row["server_round"], []))
            for row in store("SELECT * FROM rounds WHERE run = ? AND server_round > 0 ORDER BY server_round", run)
        ]


def as_csv(stories: Sequence[RoundStory]) -> str:
    """One line per round."""
    text = io.StringIO()
    names = [name for name in RoundStory.__dataclass_fields__ if name != "failures"]
    writer = csv.writer(text)
    writer.writerow([*names, "failures"])
    for story in stories:
        writer.writerow([*(getattr(story, name) for name in names), "; ".join(story.failures)])
    return text.getvalue()


def as_json(directory: Path, run: str) -> str:
    """Everything that the store knows of a run: rounds, updates by site, scores, events, and the experiment."""
    stories = rounds_of(directory, run)
    with reader(directory) as store:
        document: dict[str, Any] = {
            "run": run,
            "experiment": json.loads(store("SELECT experiment FROM runs WHERE run = ?", run)[0]["experiment"]),
            "rounds": [asdict(story) for story in stories],
        }
        for table in ("updates", "metrics", "events", "phases", "requests"):
            document[table] = [
                {key: value for key, value in dict(row).items() if key not in ("run", "id")}
                for row in store(f"SELECT * FROM {table} WHERE run = ?", run)
            ]
    return json.dumps(document, indent=1)


def sparkline(values: Sequence[float | None]) -> str:
    """Values as small bars; a gap where there is none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        BARS[round((value - low) * scale)] if value is not None and math.isfinite(value) else " " for value in values
    )


def _check_is_folder(path: Path) -> None:
    if not path.is_dir():
        raise StoreError(f"{path}: no such folder; name a result directory, or `state/run` of a study")


def _summary(directory: Path, run: Any, store: Store) -> RunSummary:
    name, experiment = run["run"], json.loads(run["experiment"])
    scores = _dice(store, name)
    means = {number: sum(values) / len(values) for number, values in scores.items()}
    return RunSummary(
        directory=str(directory),
        run=name,
        study=run["name"],
        model=experiment["model"]["name"],
        started=run["started"],
        finished=run["finished"],
        rounds=store("SELECT max(server_round) AS n FROM rounds WHERE run = ?", name)[0]["n"] or 0,
        planned=experiment["federation"]["rounds"],
        resumed=run["resumed"],
        sites=store("SELECT count(DISTINCT site) AS n FROM updates WHERE run = ?", name)[0]["n"],
        dice=means[max(means)] if means else None,
        best=max(means.values()) if means else None,
    )


def _dice(store: Store, run: str) -> dict[int, list[float]]:
    """Mean Dice of each site, by the round after which the scored weights were."""
    found: dict[int, list[float]] = {}
    for row in store("SELECT server_round, value FROM metrics WHERE run = ? AND name = 'dice' ORDER BY site", run):
        found.setdefault(row["server_round"], []).append(row["value"])
    return found


def _story(store: Store, run: str, row: Any, dice: Sequence[float]) -> RoundStory:
    updates = store("SELECT * FROM updates WHERE run = ? AND server_round = ? ORDER BY site", run, row["server_round"])
    accepted = [update for update in updates if update["status"] == "accepted"]
    losses = [json.loads(update["training"]).get("loss") for update in accepted]
    known = [loss for loss in losses if loss is not None]
    cosines = [(update["cosine"], update["site"]) for update in map(dict, accepted) if update.get("cosine") is not None]
    cosine, farthest = min(cosines, default=(None, ""))
    return RoundStory(
        server_round=row["server_round"],
        finished=row["finished"],
        seconds=row["seconds"],
        attempts=row["attempts"],
        asked=len(json.loads(row["asked"])),
        accepted=len(accepted),
        cases=sum(update["num_cases"] for update in accepted),
        loss=sum(known) / len(known) if known else None,
        megabytes=sum(update["bytes"] for update in accepted) / 1e6,
        dice=sum(dice) / len(dice) if dice else None,
        worst=min(dice) if dice else None,
        cosine=cosine,
        farthest=farthest,
        failures=[f"{u['site']}: {u['status']} ({u['reason']})" for u in updates if u["status"] != "accepted"],
    )
