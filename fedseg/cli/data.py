"""`fedseg data`: check a cohort before it joins a federation, make phantoms, look at images, imitate other scanners."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fedseg.calibration import Measured
    from fedseg.data.audit import Audit, Spread

app = typer.Typer(no_args_is_help=True, help="Check a cohort, make phantoms, look at images, imitate other scanners.")


@app.command()
def check(
    path: Annotated[
        Path, typer.Argument(help="Folder with the cohort: Decathlon, nnU-Net raw, or images/ and labels/.")
    ],
    experiment: Annotated[
        Path | None, typer.Option(help="Experiment file to check against: labels, channels, modality.")
    ] = None,
    person: Annotated[
        str, typer.Option(help="Who is one person: case, pairs, pattern:REGEX or column:FILE[:CASE:PERSON].")
    ] = "case",
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the whole audit to this file; - is standard output.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read files.")] = 2,
) -> None:
    """Open every case and say what is wrong with which; exit 1 if a case cannot be used.

    Errors keep a case out of training. Warnings are for a person to look at. The table is the cohort's fingerprint.
    """
    from rich.console import Console

    from fedseg.config import load_experiment
    from fedseg.data.audit import audit_cohort
    from fedseg.data.cohort import PersonRule, read_cohort

    task = load_experiment(experiment).task if experiment else None
    audit = audit_cohort(read_cohort(path, PersonRule.parse(person)), task, progress=True, workers=workers)
    to_stdout = json_out == Path("-")
    if to_stdout:
        typer.echo(audit.to_json())
    elif json_out is not None:
        json_out.write_text(audit.to_json() + "\n", encoding="utf-8")
    _show(audit, path, Console(stderr=to_stdout, highlight=False))
    if audit.errors:
        raise typer.Exit(1)


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write; one that holds something else is not touched.")],
    cases: Annotated[int, typer.Option(min=1, help="Number of cases.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Decides anatomies and noise.")] = 0,
    first: Annotated[
        int, typer.Option(min=0, help="Number of the first case: distinct ranges are distinct persons.")
    ] = 0,
    shape: Annotated[tuple[int, int, int], typer.Option(help="Voxels along D H W.")] = (40, 48, 48),
    spacing: Annotated[tuple[float, float, float], typer.Option(help="Voxel spacing in mm along D H W.")] = (
        6.5,
        6.5,
        6.5,
    ),
    scanner: Annotated[
        Path | None, typer.Option(help="TOML file with noise, bias_field, gamma, blur, ...; see docs/data.md.")
    ] = None,
    preview: Annotated[Path | None, typer.Option(help="Also write a contact sheet to this PNG file.")] = None,
) -> None:
    """Write a cohort of made-up abdomens in Decathlon format; the same numbers give the same voxels."""
    from fedseg.data.phantom import PhantomConfig, ScannerConfig, write_phantoms
    from fedseg.sections import load_section, validate_section

    wanted = {"cases": cases, "seed": seed, "first": first, "shape": shape, "spacing": spacing}
    config = validate_section(PhantomConfig, json.dumps(wanted), source="fedseg data phantom")
    if scanner is not None:
        config = config.model_copy(update={"scanner": load_section(ScannerConfig, scanner)})
    write_phantoms(out, config, progress=True)
    typer.echo(f"{out}: {cases} cases, labels {config.labels}")
    if preview is not None:
        view(out, preview)


@app.command()
def view(
    path: Annotated[Path, typer.Argument(help="Folder with the cohort.")],
    out: Annotated[Path, typer.Argument(help="PNG file to write.")],
    cases: Annotated[int, typer.Option(min=1, help="Number of cases to show.")] = 6,
) -> None:
    """Draw an axial, a coronal and a sagittal section of the first cases, with labels as contours."""
    from fedseg.data.preview import preview

    typer.echo(preview(path, out, cases=cases))


@app.command()
def effects() -> None:
    """List what simulated scanners and annotators can do, with the strength of each severity."""
    from rich.table import Column, Table

    from fedseg.cli.display import wide_console
    from fedseg.data.shift.catalogue import EFFECTS, HABITS, SEVERITIES

    def strengths(five: tuple[float, ...]) -> list[str]:
        return [f"{strength:g}" for strength in five]

    console = wide_console()
    scanners = Table(Column("effect", no_wrap=True), "imitates", "strength is", *map(str, SEVERITIES), title="Scanners")
    for name, effect in EFFECTS.items():
        only = f" ({effect.modalities[0].upper()} only)" if len(effect.modalities) == 1 else ""
        scanners.add_row(name, effect.imitates + only, effect.unit, *strengths(effect.strengths))
    console.print(scanners)
    annotators = Table(
        Column("habit", no_wrap=True), "imitates", "strength is", *map(str, SEVERITIES), title="Annotators"
    )
    for name, habit in HABITS.items():
        annotators.add_row(name, habit.imitates, habit.unit, *strengths(habit.strengths))
    console.print(annotators)


@app.command()
def profiles() -> None:
    """List the scanner profiles that come with the library; a TOML file of your own can stand wherever a name can."""
    from rich.table import Column, Table

    from fedseg.cli.display import wide_console
    from fedseg.data.shift.profiles import shipped_profiles

    table = Table(Column("name", no_wrap=True), "modality", "imitates", "effects: severity (or strength)")
    for name, profile in shipped_profiles().items():
        doses = [f"{e.name} {e.severity or f'({e.amount:g})'}" for e in profile.effects]
        table.add_row(name, profile.modality.upper(), profile.description, ", ".join(doses))
    wide_console().print(table)


@app.command()
def shift(
    out: Annotated[Path, typer.Argument(help="PNG file to write.")],
    data: Annotated[Path | None, typer.Option(help="Folder with labelled cases; absent: phantoms.")] = None,
    effect: Annotated[
        list[str] | None, typer.Option(help="Effect or habit to show; several times; absent: all.", show_default=False)
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(help="Show scanners instead: a name, a TOML file, or all; several times.", show_default=False),
    ] = None,
    modality: Annotated[str, typer.Option(help="mr or ct.")] = "mr",
    seed: Annotated[int, typer.Option(min=0, help="Of the simulated site.")] = 0,
    axis: Annotated[str, typer.Option(help="Axis that looks at us: D, H or W.")] = "D",
) -> None:
    """Draw a contact sheet: a case under every effect, clean and at five severities; or two cases through every scanner.

    Underline and number: how far an image is from the clean one (RMS after a z-score), or a label from its own (1 - Dice).
    """
    import tempfile

    from fedseg.data.cohort import read_cohort
    from fedseg.data.phantom import PhantomConfig, ScannerConfig, write_phantoms
    from fedseg.data.shift.catalogue import EFFECTS, HABITS
    from fedseg.data.shift.profiles import pick_profiles, require_name
    from fedseg.data.shift.sheet import draw_sheet, effect_rows, profile_rows
    from fedseg.errors import ConfigError

    if modality not in ("mr", "ct"):
        raise ConfigError(f"--modality must be mr or ct, got {modality!r}")
    if axis not in ("D", "H", "W"):
        raise ConfigError(f"--axis must be D, H or W, got {axis!r}")
    if effect and profile:
        raise ConfigError("--effect and --profile are two different sheets; give one of them")
    names = [require_name(name) for name in effect or []]
    names = names or [*(n for n, e in EFFECTS.items() if modality in e.modalities), *HABITS]
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            scanner = ScannerConfig(modality="ct" if modality == "ct" else "mr", noise=0.01, bias_field=0.0)
            config = PhantomConfig(cases=2, shape=(40, 56, 56), spacing=(6.5, 5.5, 5.5), scanner=scanner)
            data = write_phantoms(Path(folder) / "phantoms", config)
        cases = [case for case in read_cohort(data).cases if case.label is not None]
        if not cases:
            raise ConfigError(f"{data}: no case has a label, and outlines are drawn on every picture")
        if profile:
            rows = profile_rows(cases, pick_profiles(profile, modality), seed=seed, axis="DHW".index(axis))
        else:
            rows = effect_rows(cases[0], names, seed=seed, axis="DHW".index(axis))
        typer.echo(draw_sheet(rows, out))


@app.command()
def calibrate(
    model: Annotated[Path, typer.Argument(help="Model trained on clean images: a file, or a result directory.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder with labelled cases; absent: the result directory's test cases.")
    ] = None,
    effect: Annotated[
        list[str] | None,
        typer.Option(help="Effect or habit to measure; several times; absent: all that fit.", show_default=False),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(help="Measure scanners instead: a name, a TOML file, or all; several times.", show_default=False),
    ] = None,
    spacing: Annotated[
        tuple[float, float, float] | None,
        typer.Option(help="Prepare at this spacing (mm, D H W) instead of the experiment's.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the simulated site.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = "auto",
    out: Annotated[Path | None, typer.Option("--csv", help="Also write the table to this file.")] = None,
) -> None:
    """Measure how many points of Dice a clean model loses under every effect at every severity.

    The library's severities were set so that a U-Net loses about 1, 3, 7, 15 and 30 points on hippocampus volumes.
    """
    from rich.console import Console
    from rich.progress import Progress

    from fedseg.calibration import calibrate as measure
    from fedseg.calibration import suitable, unseen_cases, write_table
    from fedseg.data.cohort import read_cohort
    from fedseg.data.shift.profiles import pick_profiles, require_name
    from fedseg.device import configure, default_threads, pick_device
    from fedseg.model_file import load_model_file

    experiment, network = load_model_file(model)
    if spacing is not None:
        experiment = experiment.model_copy(
            update={"data": experiment.data.model_copy(update={"spacing": tuple(spacing)})}
        )
    cohort = unseen_cases(model) if data is None else read_cohort(data)
    names = [require_name(name) for name in effect or []] or ([] if profile else suitable(experiment))
    place = pick_device(device)
    configure(threads=default_threads())
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Measuring", total=None)
        clean, rows = measure(
            network.to(place),
            experiment,
            cohort,
            names,
            profiles=pick_profiles(profile or [], experiment.task.modality),
            device=place,
            seed=seed,
            on_step=lambda done, total: progress.update(task, completed=done, total=total),
        )
    for whole in (False, True):
        chosen = [row for row in rows if (row.severity == 0) == whole]
        if chosen:
            console.print(_loss_table(clean, chosen))
    if out is not None:
        write_table(out, clean, rows)
        console.print(f"table: {out}", highlight=False)


def _loss_table(clean: float, rows: "list[Measured]") -> "Table":
    from rich.table import Table

    from fedseg.data.shift.catalogue import SEVERITIES

    columns = map(str, SEVERITIES) if rows[0].severity else ["points lost"]
    title = f"Points of Dice lost; clean {clean:.3f}" + ("; in brackets the strength" if rows[0].severity else "")
    table = Table("", *columns, title=title, title_justify="left")
    for name in dict.fromkeys(row.name for row in rows):
        found = [row for row in rows if row.name == name]
        table.add_row(name, *(f"{row.lost:.1f}" + (f" ({row.strength:g})" if row.severity else "") for row in found))
    return table


def _show(audit: "Audit", root: Path, console: "Console") -> None:
    from rich.markup import escape
    from rich.table import Table

    if audit.findings:
        table = Table("case", "severity", "finding", "detail", title="Findings")
        for column in table.columns[:3]:
            column.overflow = "fold"
        for finding in audit.findings:
            colour = "red" if finding.severity == "error" else "yellow"
            severity = f"[{colour}]{finding.severity}[/]"
            detail = finding.detail.replace(f"{root}/", "")
            table.add_row(escape(finding.case), severity, finding.reason, escape(detail))
        console.print(table)
    console.print(_fingerprint_table(audit))
    usable, warnings = audit.total_cases - len(audit.errors), len(audit.warnings)
    console.print(f"{usable} of {audit.total_cases} cases are usable, {warnings or 'no'} warning{'s'[: warnings != 1]}")


def _fingerprint_table(audit: "Audit") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    print_ = audit.fingerprint
    table = Table("", "min", "median", "max", title=f"{print_.cases} readable cases of {print_.persons} persons")
    for what, spreads in (("voxels", print_.shape), ("spacing mm", print_.spacing)):
        for axis, spread in zip("DHW", spreads, strict=False):
            table.add_row(f"{what} {axis}", *_numbers(spread))
    for name, spread in print_.intensity.items():
        table.add_row(f"intensity, {name} %", *_numbers(spread))
    for name, spread in print_.volumes.items():
        table.add_row(f"{escape(name)} mL (in {print_.present[name]})", *_numbers(spread, 1000))
    for what, counts in (("orientation", print_.orientations), ("stored as", print_.dtypes)):
        table.add_row(what, ", ".join(f"{name} ({count})" for name, count in counts.items()), "", "")
    return table


def _numbers(spread: "Spread", unit: float = 1) -> tuple[str, ...]:
    return tuple(f"{value / unit:.4g}" for value in (spread.minimum, spread.median, spread.maximum))
