"""`fedseg simulate` and `fedseg results`: federations on one machine, and how their methods compare."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from fedseg.expected import Outcome


def simulate(
    scenario: Annotated[Path, typer.Argument(help="Scenario file: an experiment, and the sites to imagine.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Result directory, of several seeds with a folder for each; absent: runs/<scenario file's name>.",
        ),
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
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="Replaces the experiment's seed; give several for a study of them.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Replaces the experiment's number of rounds.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the result directory holds.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard what the result directory holds.")] = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html and report.pdf, too.")] = True,
) -> None:
    """Simulate a federation: train it, its pooled and local-only counterparts, and compare them."""
    from functools import partial

    from rich.console import Console

    from fedseg.cli.display import show_rounds
    from fedseg.cli.warm_start import show_warm_start
    from fedseg.device import pick_device, usable_cores
    from fedseg.errors import ConfigError
    from fedseg.report.figures import draw_figures, draw_study
    from fedseg.report.tables import of_seed
    from fedseg.report.write import write_report
    from fedseg.scenario import load_scenario
    from fedseg.simulation import Machine, discard, refuse_results
    from fedseg.simulation import simulate as run

    if resume and overwrite:
        raise ConfigError("--resume goes on with results and --overwrite discards them; give one of the two")
    if twice := [number for number in seed or () if (seed or []).count(number) > 1]:
        raise ConfigError(f"--seed {twice[0]} is given twice; seeds of one study differ")
    output = output or Path("runs") / scenario.stem
    if seed is not None and len(seed) > 1:
        if (output / "result.json").exists() or (output / "store.sqlite").exists():
            raise ConfigError(f"{output} holds the results of one seed; choose another --output for several")
        wanted = {of_seed(output, number): load_scenario(scenario, seed=number, rounds=rounds) for number in seed}
    else:
        wanted = {output: load_scenario(scenario, seed=seed[0] if seed else None, rounds=rounds)}
    devices = tuple(str(pick_device(name)) for name in device or ["auto"])
    machine = Machine(workers or usable_cores(), devices, threads, engine)
    for folder in wanted:  # before hours of work on the first
        if overwrite:
            discard(folder)
        elif not resume:
            refuse_results(folder)
    console, seconds, written = Console(), 0.0, list[tuple[str, Path]]()
    for folder, of_one in wanted.items():
        if len(wanted) > 1:
            console.rule(f"seed {of_one.experiment.seed}")
        show_warm_start(of_one.experiment, console)
        with show_rounds(console, of_one.experiment.federation.rounds) as display:
            seconds += run(of_one, folder, machine, resume=resume, show=display)["seconds"]
            written += [("Results", folder / name) for name in ("result.json", "scores.csv")]
            written += [("Report", path) for path in (write_report(folder)[:1] if report else [])]
            pictures = draw_figures(folder, partial(display.progress, "pictures"))
            written += [("Pictures", path) for path in pictures]
    _show([*wanted])
    if len(wanted) > 1:
        written.append(("Pictures", draw_study([*wanted], output / "study.png")))
    console.print(f"{seconds:.0f} s.", highlight=False)
    for kind in dict.fromkeys(kind for kind, _ in written):
        paths = ", ".join(str(path) for name, path in written if name == kind)
        console.print(f"{kind}: {paths}", highlight=False, soft_wrap=True)


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
    from fedseg.errors import ConfigError
    from fedseg.report.tables import with_seeds

    directories = [folder for directory in directories for folder in with_seeds(directory)]
    outcomes = _show(directories, against)
    if picture is not None:
        from fedseg.report.figures import draw_study

        typer.echo(f"Picture: {draw_study(directories, picture)}")
    if check and not outcomes:
        raise ConfigError("--check: the scenario's file expected nothing of this simulation, which is no success")
    if check and not all(outcome.met for outcome in outcomes):
        raise typer.Exit(1)


def _show(directories: list[Path], against: list[str] | None = None) -> "list[Outcome]":
    """Print all tables; returns what was expected, and whether it came out."""
    from fedseg.cli.display import wide_console
    from fedseg.errors import ConfigError
    from fedseg.expected import against_expected
    from fedseg.report.study_tables import difference_table, expected_table, interval_table
    from fedseg.report.tables import Result, comparison_table, load_result, method_table, robustness_table, site_table
    from fedseg.study import Study

    studies: dict[str, list[Result]] = {}
    for directory in directories:
        result = load_result(directory)
        studies.setdefault(result["name"], []).append(result)
    console = wide_console()
    if len(studies) > 1:
        if against:
            raise ConfigError(f"--against compares the methods of one study; these are {', '.join(studies)}")
        console.print(comparison_table([*studies.values()]))
    else:
        study = Study(directories)
        tables = (
            method_table(study.results),
            interval_table(study),
            difference_table(study, against),
            site_table(study.results),
            robustness_table(study.results),
            expected_table(study.results),
        )
        console.print(*(table for table in tables if table is not None), sep="\n")
    return [outcome for results in studies.values() for outcome in against_expected(results)]
