"""`fedseg simulate` and `fedseg results`: federations on one machine, and how their methods compare."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def simulate(
    scenario: Annotated[Path, typer.Argument(help="Scenario file: an experiment, and the sites to imagine.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Result directory; absent: runs/<scenario file's name>.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes; absent: one per core. Results do not depend on it.")
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="cpu, cuda, cuda:1, auto; give several to deal them out to the sites.")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads per site; part of what makes results repeatable.")
    ] = 1,
    engine: Annotated[
        Literal["local", "flower"], typer.Option(help="Worker processes of our own, or Flower's simulation on Ray.")
    ] = "local",
    seed: Annotated[int | None, typer.Option(min=0, help="Replaces the experiment's seed.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Replaces the experiment's number of rounds.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the result directory holds.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard what the result directory holds.")] = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html and report.pdf, too.")] = True,
) -> None:
    """Simulate a federation: train it, its pooled and local-only counterparts, and compare them."""
    from rich.console import Console

    from fedseg.cli.display import show_rounds
    from fedseg.cli.warm_start import show_warm_start
    from fedseg.device import pick_device
    from fedseg.errors import ConfigError
    from fedseg.report.figures import draw_figures
    from fedseg.report.write import write_report
    from fedseg.scenario import load_scenario
    from fedseg.simulation import Machine, discard
    from fedseg.simulation import simulate as run

    if resume and overwrite:
        raise ConfigError("--resume goes on with results and --overwrite discards them; give one of the two")
    output = output or Path("runs") / scenario.stem
    wanted = load_scenario(scenario, seed=seed, rounds=rounds)
    devices = tuple(str(pick_device(name)) for name in device or ["auto"])
    machine = Machine(workers or usable_cores(), devices, threads, engine)
    if overwrite:
        discard(output)
    console = Console()
    show_warm_start(wanted.experiment, console)
    with show_rounds(console, wanted.experiment.federation.rounds) as display:
        result = run(wanted, output, machine, resume=resume, show=display)
        pictures = draw_figures(output, lambda done, total: display.progress("pictures", done, total))
        reports = write_report(output) if report else []
    _show([output])
    console.print(
        f"{result['seconds']:.0f} s. Results: {output / 'result.json'}, {output / 'scores.csv'}", highlight=False
    )
    if reports:
        console.print(f"Report: {reports[0]}", highlight=False, soft_wrap=True)
    console.print("Pictures: " + ", ".join(str(picture) for picture in pictures), highlight=False, soft_wrap=True)


def results(
    directories: Annotated[
        list[Path], typer.Argument(help="Result directories; those of one study become mean ± SD, different ones rows.")
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(help="Compare every method with these, person by person; absent: the first, pooled and local."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Also draw every method at every hospital, the mean over seeds, to this PNG file."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Fail if a figure is not what the scenario's file expects.")
    ] = False,
) -> None:
    """Show the comparison of finished simulations again, over several seeds, or of several studies side by side."""
    missed = _show(directories, against)
    if picture is not None:
        from fedseg.report.figures import draw_study

        typer.echo(f"Picture: {draw_study(directories, picture)}")
    if check and missed:
        raise typer.Exit(1)


def usable_cores() -> int:
    """Cores that this process may use."""
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _show(directories: list[Path], against: list[str] | None = None) -> int:
    """Print all tables; returns how many figures are not as expected."""
    from fedseg.cli.display import wide_console
    from fedseg.expected import against_expected
    from fedseg.report.study_tables import difference_table, expected_table, interval_table
    from fedseg.report.tables import comparison_table, load_result, method_table, robustness_table, site_table
    from fedseg.study import Study

    studies: dict[str, list[Path]] = {}
    for directory in directories:
        studies.setdefault(load_result(directory)["name"], []).append(directory)
    found = {name: [load_result(directory) for directory in one] for name, one in studies.items()}
    console = wide_console()
    if len(studies) > 1:
        console.print(comparison_table(list(found.values())))
        return sum(not row["met"] for results in found.values() for row in against_expected(results))
    study, results = Study(directories), next(iter(found.values()))
    tables = (
        method_table(results),
        interval_table(study),
        difference_table(study, against),
        site_table(results),
        robustness_table(results),
        expected_table(results),
    )
    console.print(*(table for table in tables if table is not None), sep="\n")
    return sum(not row["met"] for row in against_expected(results))
