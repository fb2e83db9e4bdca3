"""`fedseg server runs`, `show` and `export`: runs that were, without Prometheus."""

from pathlib import Path
from typing import Annotated, Literal

import typer

RunDirectory = Annotated[
    Path, typer.Argument(help="Run directory: `state/run` of a study, or the output of a simulation.")
]
RunName = Annotated[str, typer.Option("--run", help="Run in it: federated, pooled, local-NAME, ...")]


def runs(folder: Annotated[Path, typer.Argument(help="Folder to search.")] = Path()) -> None:
    """List the runs below a folder."""
    from datetime import datetime

    from rich.console import Console
    from rich.table import Table

    from fedseg.coordinator.history import find_runs

    table = Table("run", "study", "network", "started", "state", "sites", "Dice", "best", "resumed")
    for run in find_runs(folder):
        dice, best = (f"{value:.3f}" if value is not None else "" for value in (run.dice, run.best))
        started = f"{datetime.fromtimestamp(run.started):%Y-%m-%d %H:%M}"
        state = run.state if run.finished is not None else f"{run.state} of {run.planned}"
        where = f"{run.directory} {run.run}"
        table.add_row(where, run.study, run.model, started, state, str(run.sites), dice, best, str(run.resumed or ""))
    Console(highlight=False).print(table)


def show(directory: RunDirectory, run: RunName = "federated") -> None:
    """Tell a run round by round."""
    from rich.console import Console
    from rich.table import Table

    from fedseg.coordinator.history import rounds_of, sparkline

    console, stories = Console(highlight=False), rounds_of(directory, run)
    table = Table("round", "sites", "cases", "loss", "Dice", "worst site", "MB", "seconds", "what went wrong")
    for story in stories:
        loss, dice, worst = (
            f"{value:.3f}" if value is not None else "" for value in (story.loss, story.dice, story.worst)
        )
        tries = f" ({story.attempts} tries)" if story.attempts > 1 else ""
        table.add_row(
            str(story.server_round),
            f"{story.accepted} of {story.asked}{tries}",
            str(story.cases),
            loss,
            dice,
            worst,
            f"{story.megabytes:.1f}",
            f"{story.seconds:.1f}",
            ", ".join(story.failures),
        )
    console.print(table)
    for name, values in (
        ("Dice", [story.dice for story in stories]),
        ("worst site", [story.worst for story in stories]),
        ("loss", [story.loss for story in stories]),
    ):
        if bars := sparkline(values):
            known = [value for value in values if value is not None]
            console.print(f"{name:10} {bars}  {min(known):.3f} to {max(known):.3f}", soft_wrap=True)


def export(
    directory: RunDirectory,
    run: RunName = "federated",
    kind: Annotated[
        Literal["csv", "json"], typer.Option("--as", help="csv: a line per round; json: all that is known.")
    ] = "csv",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File; absent: standard output.")] = None,
) -> None:
    """Write a run out for other programs."""
    from fedseg.coordinator.history import as_csv, as_json, rounds_of
    from fedseg.federated.checkpoint import write_durably

    text = as_csv(rounds_of(directory, run)) if kind == "csv" else as_json(directory, run) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_durably(output, text.encode())
