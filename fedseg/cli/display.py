"""What a person sees while a simulation runs: a table of rounds and a bar for everything else that takes long."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedseg import logs
from fedseg.federated.driver import Event
from fedseg.federated.messages import SiteFailure
from fedseg.federated.narrate import narrate
from fedseg.federated.rounds import AcceptedUpdate

log = logging.getLogger(__name__)

ROWS_SHOWN = 12
TICK_SECONDS = 0.25


def wide_console() -> Console:
    """The terminal; or, where the output goes elsewhere, lines long enough for any table."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=180)


def show_rounds(console: Console, rounds: int) -> "RoundsDisplay | RoundsLog":
    """What shows a simulation: to people, or to whatever collects logs.

    Args:
        console: for people.
        rounds: number of rounds of each run.
    """
    return RoundsLog() if logs.is_json() else RoundsDisplay(console, rounds)


class RoundsLog:
    """Tells the log of a simulation."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def event(self, run: str, event: Event) -> None:
        """Take in what happened in a run."""
        with logs.about(run=run):
            narrate(event)

    def progress(self, task: str, done: int, total: int) -> None:
        """Take in how far something is."""
        if done >= total:
            log.info("%s: done (%d)", task, total)


@dataclass
class _Row:
    """One round of one run."""

    asked: int = 0
    answered: int = 0
    failures: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    megabytes: float = 0.0
    seconds: float | None = None
    dice: Mapping[str, float] = field(default_factory=dict)
    """Of the weights after this round, by site; known once the next round has scored them."""

    @property
    def loss(self) -> float | None:
        return sum(self.losses) / len(self.losses) if self.losses else None


class RoundsDisplay:
    """Shows a simulation on a terminal live, elsewhere (a log, a pipe) one line per round.

    Args:
        console: where to show it.
        rounds: number of rounds of each run.
    """

    def __init__(self, console: Console, rounds: int) -> None:
        self._console, self._rounds = console, rounds
        self._rows: dict[tuple[str, int], _Row] = {}
        self._progress = Progress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._finished: set[str] = set()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(self, console=self._console, refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __rich__(self) -> Group:
        shown = list(self._rows.items())[-ROWS_SHOWN:]
        return Group(_table(shown, self._rounds), self._progress) if shown else Group(self._progress)

    def event(self, run: str, event: Event) -> None:
        """Take in what happened in a run."""
        if event.kind == "finished":
            self._score(run, event.server_round, event.scores)
            return
        row = self._rows.setdefault((run, event.server_round), _Row())
        if event.kind == "round":
            row.asked, row.answered, row.failures = len(event.asked), 0, []
        elif isinstance(event.answer, SiteFailure):
            row.failures.append(f"{event.answer.site}: {event.answer.kind} ({event.answer.reason})")
        elif isinstance(event.answer, AcceptedUpdate):
            row.answered += 1
            row.megabytes += event.answer.num_bytes / 1e6
            row.losses.append(event.answer.training.get("loss", float("nan")))
        elif event.kind == "finished-round" and event.report is not None:
            row.seconds = event.report.seconds
            self._score(run, event.server_round - 1, event.scores)
            if self._live is None:
                self._say(run, event.server_round, row)

    def progress(self, task: str, done: int, total: int) -> None:
        """Take in how far something is."""
        if task in self._finished:
            return
        if done >= total:
            self._finished.add(task)
        if self._live is None:
            if done >= total:
                self._console.print(f"{task}: done ({total})", highlight=False)
            return
        if task not in self._tasks:
            self._tasks[task] = self._progress.add_task(task, total=total)
        self._progress.update(self._tasks[task], completed=done, total=total)

    def _score(self, run: str, server_round: int, scores: Mapping[str, Mapping[str, float]] | None) -> None:
        dice = {site: means["dice"] for site, means in (scores or {}).items() if "dice" in means}
        if dice and server_round > 0:
            self._rows.setdefault((run, server_round), _Row()).dice = dice
            if self._live is None:
                mean = sum(dice.values()) / len(dice)
                self._console.print(
                    f"{run}: Dice after round {server_round}: {mean:.3f}; {_worst(dice)}", highlight=False
                )

    def _say(self, run: str, server_round: int, row: _Row) -> None:
        failures = f"; {', '.join(row.failures)}" if row.failures else ""
        self._console.print(
            f"{run}: round {server_round}/{self._rounds}: {row.answered} of {row.asked} sites, "
            f"loss {row.loss or float('nan'):.3f}, {row.seconds or 0:.1f} s{failures}",
            highlight=False,
        )


def _table(rows: list[tuple[tuple[str, int], _Row]], rounds: int) -> Table:
    table = Table(title="Rounds", title_justify="left", expand=False)
    for heading in ("run", "round", "sites", "loss", "Dice", "worst site", "MB up", "s"):
        table.add_column(heading, justify="left" if heading in ("run", "worst site") else "right")
    for (run, number), row in rows:
        mean = f"{sum(row.dice.values()) / len(row.dice):.3f}" if row.dice else ""
        table.add_row(
            run,
            f"{number}/{rounds}",
            f"{row.answered}/{row.asked}" if row.asked else "",
            "" if row.loss is None else f"{row.loss:.3f}",
            mean,
            _worst(row.dice) if row.dice else ("; ".join(row.failures)[:40]),
            f"{row.megabytes:.1f}",
            "…" if row.seconds is None else f"{row.seconds:.1f}",
            style=None if not row.failures else "yellow",
        )
    return table


def _worst(dice: Mapping[str, float]) -> str:
    site = min(dice, key=lambda name: dice[name])
    return f"{site} {dice[site]:.3f}"
