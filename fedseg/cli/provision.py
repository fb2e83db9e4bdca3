"""`fedseg provision`: certificates and signed kits for a study's server and hospitals."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from fedseg.coordinator.ledger import Ledger
    from fedseg.coordinator.provision import Provisioned


def provision(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the kits and the study's authority.")],
    study: Annotated[
        Path | None,
        typer.Argument(help="Study file: name, experiment, coordinator, sites. Not needed with --show."),
    ] = None,
    app: Annotated[Path | None, typer.Option(help="App bundle for all kits; absent: the one in use.")] = None,
    renew: Annotated[
        list[str] | None, typer.Option(help="Site, or `coordinator`, that gets a new certificate and kit.")
    ] = None,
    revoke: Annotated[list[str] | None, typer.Option(help="Site that may not connect any more.")] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Write all kits anew; they keep their certificates.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Only show who has which certificate.")] = False,
) -> None:
    """Make a kit for the server and for every hospital; run again to add, renew or revoke.

    Kits that exist keep every byte. The folder `authority` in OUT can admit anybody to the study: keep it offline and backed up.
    """
    from datetime import UTC

    from rich.console import Console
    from rich.markup import escape

    from fedseg.coordinator import provision as office
    from fedseg.errors import ConfigError

    console, now = Console(highlight=False), datetime.now(UTC)
    if show:
        ledger, warnings = office.standing(out, now)
        console.print(_standing(ledger, now))
    elif study is None:
        raise ConfigError("which study? Name the study file: fedseg provision study.toml -o FOLDER")
    else:
        done = office.provision(study, out, now=now, app=app, renew=renew or (), revoke=revoke or (), update=update)
        warnings = list(done.warnings)
        for part in _explain(done):
            console.print(part, soft_wrap=isinstance(part, str))
    for warning in warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)


def _explain(done: "Provisioned") -> "Iterator[Table | str]":
    from rich.markup import escape
    from rich.table import Table

    if not done.written:
        yield f"{escape(str(done.folder))}: nothing to do, every kit is there"
    else:
        table = Table("kit", "zip", "private key", title=f"Kits written for {escape(done.ledger.study)}")
        for column in table.columns:
            column.overflow = "fold"
        for name in done.written:
            site = done.ledger.site(name)
            folder = done.folder / (name if site is None else f"sites/{name}")
            key = "in the kit" if site is None or site.key_source == "made here" else "at the hospital"
            table.add_row(escape(f"{folder}/"), escape(f"{folder}.zip"), key)
        yield table
        yield (
            "Give each hospital its own zip, and only that one, over a channel that nobody else reads (encrypted mail, or by "
            "hand): it holds a private key unless the hospital brought its own. The coordinator's zip goes to the server."
        )
    yield f"[bold]{escape(str(done.folder / 'authority'))}/[/] goes to nobody: keep it offline, with a backup."
    yield f"SHA-256 of app.fab: {done.ledger.app_sha256}"
    yield f"Hospitals call to compare the fingerprint of the signing key:\n[bold]{done.fingerprint}[/]"


def _standing(ledger: "Ledger", now: datetime) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        "who", "key", "serial", "expires", "days left", "revoked", title=f"Certificates of {escape(ledger.study)}"
    )
    table.columns[0].overflow = table.columns[2].overflow = "fold"
    rows = [("server", "made here", ledger.server), ("loopback", "made here", ledger.loopback)]
    rows += [(site.name, site.key_source, site) for site in ledger.sites]
    for who, key, certificate in rows:
        if certificate is not None:
            days = (certificate.not_after - now).total_seconds() / 86400
            colour = "red" if days < 0 else "yellow" if days < 30 else "default"
            revoked = "" if certificate.revoked is None else f"[red]{certificate.revoked:%Y-%m-%d}[/]"
            expires, left = f"{certificate.not_after:%Y-%m-%d}", f"[{colour}]{days:.0f}[/]"
            table.add_row(escape(who), key, certificate.serial, expires, left, revoked)
    return table
