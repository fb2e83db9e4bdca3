"""`fedseg site check`: one table of what is ready and what is not."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from fedseg.site.finding import Finding

_COLOURS = {"ok": "green", "attention": "yellow", "not ready": "bold red"}


def check(
    kit: Annotated[Path, typer.Argument(help="The kit's folder.")] = Path(),
    site: Annotated[Path | None, typer.Option("--site", help="Site file; absent: site.toml in the kit.")] = None,
    json_out: Annotated[bool, typer.Option("--json", help="As JSON, on standard output.")] = False,
    network: Annotated[bool, typer.Option(help="Look for the coordinator.")] = True,
    training: Annotated[bool, typer.Option(help="Train one step on made-up volumes.")] = True,
) -> None:
    """Look at everything that the study needs here; exit 1 if something is not ready.

    Nothing is changed, and nothing of this hospital is sent.
    """
    from dataclasses import asdict

    from rich.console import Console

    from fedseg.site.check import check_site

    console, found = Console(highlight=False), []
    if not json_out:
        console.print(_row("[bold]what", "[bold]state", "[bold]found"))
    for finding in check_site(kit, site, network=network, training=training, progress=not json_out):
        found.append(finding)
        if not json_out:
            console.print(_as_row(finding))
    ready = all(finding.state != "not ready" for finding in found)
    if json_out:
        typer.echo(json.dumps({"ready": ready, "findings": [asdict(finding) for finding in found]}, indent=1))
    else:
        console.print("\nThis site is ready." if ready else "\n[bold red]This site is not ready.[/]")
    raise typer.Exit(0 if ready else 1)


def _as_row(finding: "Finding") -> "Table":
    from rich.markup import escape

    found = escape(finding.found) + (f"\n[dim]→ {escape(finding.remedy)}[/]" if finding.remedy else "")
    return _row(finding.name, f"[{_COLOURS[finding.state]}]{finding.state}[/]", found)


def _row(name: str, state: str, found: str) -> "Table":
    """A table of one row, so that it can be printed as soon as it is known."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=12)
    table.add_column(width=9)
    table.add_column(overflow="fold")
    table.add_row(name, state, found)
    return table
