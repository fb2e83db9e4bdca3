"""`fedseg data`: check a cohort before it joins a federation, make phantoms, look at images."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fedseg.data.audit import Audit, Spread

app = typer.Typer(no_args_is_help=True, help="Check a cohort, make phantoms, look at images.")


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
    from fedseg.config import load_section, validate_section
    from fedseg.data.phantom import PhantomConfig, ScannerConfig, write_phantoms

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
