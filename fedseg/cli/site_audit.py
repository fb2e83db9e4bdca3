"""`fedseg site audit`: what a site was asked, what it decided and what left, and whether the log of it is whole."""

import json
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedseg.site.chain import Entry

app = typer.Typer(no_args_is_help=True, help="Check and read the log of what a site was asked and what left it.")

LogPath = Annotated[Path, typer.Argument(help="The log, or the site file or kit whose log it is.", metavar="PATH")]


@app.command()
def verify(
    path: LogPath,
    head: Annotated[
        str | None, typer.Option(help="SHA-256 of a line that was noted elsewhere; the log must still hold it.")
    ] = None,
) -> None:
    """Check that no line of a log was changed, removed, added or moved; exit 1 if one was.

    The SHA-256 of the last line stands for the whole log: whoever notes it elsewhere can later show that the log is the same.
    """
    from fedseg.site import chain

    log = _log_of(path)
    verdict = chain.verify(log, head)
    if verdict.problem is not None:
        where = "" if verdict.line is None else f":{verdict.line}"
        typer.echo(f"{log}{where}: {verdict.problem}")
        if verdict.line is not None and verdict.line > 1:
            typer.echo(f"the lines before {verdict.line} are as they were written")
        raise typer.Exit(1)
    span = f", {verdict.first} to {verdict.last}" if verdict.entries else ""
    typer.echo(f"{log}: {verdict.entries} entries{span}; nothing was changed\nhead {verdict.head}")


@app.command()
def show(
    path: LogPath,
    last: Annotated[int, typer.Option(min=1, help="How many entries, from the end.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON, one a line.")] = False,
) -> None:
    """List what a site was asked, what it decided, and what left; the log is not verified."""
    from fedseg.site.chain import entries

    found = deque(entries(_log_of(path)), maxlen=last)
    if as_json:
        for entry in found:
            typer.echo(entry.line().decode().rstrip("\n"))
        return
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("when (UTC)", no_wrap=True)
    for heading in ("round", "asked", "decided", "cases", "seconds", "left"):
        table.add_column(heading, justify="right" if heading in ("round", "cases", "seconds") else "left")
    for entry in found:
        table.add_row(*(escape(_printable(cell)) for cell in _row(entry)))
    Console(highlight=False).print(table)


def _log_of(path: Path) -> Path:
    if path.is_dir():
        path = path / "site.toml"
    if path.suffix != ".toml":
        return path
    from fedseg.site.config import load_site

    return load_site(path).audit_log


def _row(entry: "Entry") -> tuple[str, ...]:
    """The cells of a table; an entry of another program, or of another release, must not stop it."""
    asked, told = entry.asked, entry.entry
    when = entry.time.replace("T", " ")[:16]
    if told.get("event") != "request":
        details = [
            f"{key} {_short(value)}" for key, value in told.items() if isinstance(value, str | int) and key != "event"
        ]
        return when, "", str(told.get("event", "?")), ", ".join(details), "", "", _torn(entry)
    what = " ".join(str(asked[key]) for key in ("kind", "study", "model") if key in asked)
    decided = str(told.get("decided", "?"))
    if told.get("rule"):
        decided += f": {told['rule']}"
    seconds = told.get("seconds")
    cells = (
        asked.get("server_round"),
        what,
        decided,
        told.get("cases"),
        f"{seconds:.1f}" if isinstance(seconds, int | float) else None,
        _left(told.get("left")) + _torn(entry),
    )
    return when, *("" if cell is None else str(cell) for cell in cells)


def _left(left: Any) -> str:
    if not isinstance(left, dict) or "sha256" not in left:
        return f"code {left['reason']}" if isinstance(left, dict) and "reason" in left else "nothing"
    size, tensors = left.get("bytes"), left.get("tensors")
    parts = [f"{size / 1e6:.3f} MB"] if isinstance(size, int) else []
    if isinstance(tensors, dict):
        parts.append(f"{tensors.get('count')} tensors")
    return ", ".join([*parts, _short(left["sha256"])])


def _torn(entry: "Entry") -> str:
    return f" (a crash left {', '.join(str(one.get('file')) for one in entry.torn)})" if entry.torn else ""


def _short(value: Any) -> str:
    """Of a SHA-256 the first digits; `--json` has it all."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:8] if len(text) == 64 else text if len(text) <= 40 else f"{text[:40]}..."


def _printable(text: str) -> str:
    """A peer's words must not steer the terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
