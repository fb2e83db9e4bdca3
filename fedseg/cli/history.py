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
    """Tell a run round by round; the cosine is the lowest of the sites, between their update and the joint one."""
    from rich.console import Console
    from rich.table import Table

    from fedseg.coordinator.history import rounds_of, sparkline

    console, stories = Console(highlight=False), rounds_of(directory, run)
    table = Table("round", "sites", "cases", "loss", "Dice", "worst site", "cosine", "MB", "seconds", "what went wrong")
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
            f"{story.cosine:.2f} {story.farthest}" if story.cosine is not None else "",
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
        Literal["csv", "json", "tensorboard", "mlflow"],
        typer.Option("--as", help="csv: a line per round; json: all that is known; or for one of these programs."),
    ] = "csv",
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="File of csv or json (absent: standard output); folder for TensorBoard; folder or server for MLflow.",
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="TensorBoard and MLflow: go on until the run is finished.")
    ] = False,
) -> None:
    """Write a run out for other programs; for TensorBoard and MLflow what is there already is not written again."""
    from fedseg.coordinator.history import as_csv, as_json, rounds_of
    from fedseg.errors import ConfigError
    from fedseg.federated.checkpoint import write_durably

    if kind in ("tensorboard", "mlflow"):
        _copy(directory, run, kind, output, follow)
        return
    if follow:
        raise ConfigError(f"--follow: {kind} is written once; --as tensorboard and --as mlflow can follow a run")
    text = as_csv(rounds_of(directory, run)) if kind == "csv" else as_json(directory, run) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_durably(Path(output), text.encode())


def _copy(directory: Path, run: str, kind: str, output: str | None, follow: bool) -> None:
    from fedseg.coordinator.writers.copy import copy_run
    from fedseg.coordinator.writers.writer import make_writer
    from fedseg.errors import ConfigError

    if output is None:
        place = "a folder" if kind == "tensorboard" else "a folder or the address of a tracking server"
        raise ConfigError(f"--output: --as {kind} needs {place}")
    if follow and not (directory / "store.sqlite").exists():
        typer.echo(f"waiting for a run in {directory}")
    try:
        new = copy_run(directory, run, make_writer(kind, output), follow=follow)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    typer.echo(f"{output}: {new} new values of {run}")
