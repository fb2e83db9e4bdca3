"""`fedseg report`: a run in words, tables and pictures, in one file."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    directory: Annotated[
        Path, typer.Argument(help="Result directory of a simulation, or a study's run directory (`state/run`).")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file; absent: report.html in the directory.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Method that speaks for the federation; absent: the scenario's first.")
    ] = None,
    pdf: Annotated[bool, typer.Option("--pdf/--no-pdf", help="Write the same as PDF beside it.")] = True,
) -> None:
    """Write a report that people read: one HTML file that works offline, and a PDF."""
    from fedseg.report.write import write_report

    for path in write_report(directory, output, method=method, pdf=pdf):
        typer.echo(path)
