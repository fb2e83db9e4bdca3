"""`fedseg site`: what a hospital runs, and what it can look at."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedseg.cli.site_audit import app as audit_app
from fedseg.cli.site_check import check

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fedseg.app_bundle import BundledFile
    from fedseg.site.approval import Approval
    from fedseg.site.wire.site_pb2 import Description

app = typer.Typer(no_args_is_help=True, help="A hospital's side of a study: check, start, look at what happened.")
app.add_typer(audit_app, name="audit")
app.command()(check)

KitFolder = Annotated[Path, typer.Argument(help="The kit's folder.")]
SiteFile = Annotated[Path | None, typer.Option("--site", help="Site file; absent: site.toml in the kit.")]


WebConfig = Annotated[
    Path | None,
    typer.Option(help="Who may ask, as Prometheus' exporters want it told: TLS, passwords, tokens (docs/metrics.md)."),
]


@app.command()
def start(
    kit: KitFolder = Path(),
    site: SiteFile = None,
    metrics: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port on which your own Prometheus finds the site's series: 9465."),
    ] = None,
    metrics_host: Annotated[
        str, typer.Option(help="Address of that port; any but the loopback device's needs --web-config.")
    ] = "127.0.0.1",
    web_config: WebConfig = None,
) -> None:
    """Run site service and gate until Ctrl-C or SIGTERM; what ends is started again."""
    import signal

    from rich.console import Console

    from fedseg import logs
    from fedseg.kit import load_kit
    from fedseg.site.approval import approvals
    from fedseg.site.start import Household, Scraped

    console = Console(highlight=False, soft_wrap=True)
    opened = load_kit(kit)
    if not approvals(kit):
        warning = "no app bundle is approved yet; until then the gate refuses all work: fedseg site approve"
        logs.say(warning) if logs.is_json() else console.print(warning, style="yellow")
    logs.always_about(site=opened.config.site)
    tell = logs.say if logs.is_json() else lambda text: console.print(f"{_now()} {text}")
    watched = None if metrics is None else Scraped(metrics, metrics_host, web_config)
    household = Household(opened, site or kit / "site.toml", tell=tell, scraped=watched)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: household.stop.set())
    household.run()


@app.command()
def serve(
    site: Annotated[Path, typer.Argument(help="Site file.")],
    network: Annotated[
        bool,
        typer.Option("--network/--no-network", help="--no-network: do not start unless the network can be taken away."),
    ] = True,
) -> None:
    """Run the site service alone: data and device, no network. It answers on the site file's socket.

    Where the system allows it, the process gives up the network for good before it reads anything.
    """
    import logging

    from fedseg import logs
    from fedseg.errors import ConfigError
    from fedseg.site.isolation import leave_network

    if not leave_network():
        if not network:
            raise ConfigError(
                "this system grants no network namespace of one's own (root, or user namespaces for everybody); start without "
                "--no-network and take the network away otherwise: deploy/README.md"
            )
        logs.say("this process still has the network: the system grants no namespace; see deploy/README.md")

    from fedseg.site.config import load_site
    from fedseg.site.service import serve as serve_site

    logging.getLogger("fedseg").setLevel(logging.INFO)
    config = load_site(site)
    logs.always_about(site=config.name)
    serve_site(config)


@app.command()
def gate(
    kit: KitFolder = Path(),
    socket: Annotated[
        Path | None, typer.Option(help="Socket of the site service; absent: as the site file says.")
    ] = None,
    home: Annotated[Path | None, typer.Option(help="Folder for Flower's own files; absent: `gate` in the kit.")] = None,
    port: Annotated[int, typer.Option(help="Loopback port for the gate's own processes; 0: any.")] = 0,
) -> None:
    """Run the gate alone: network, no data. Connections go out to the coordinator only."""
    import logging

    from fedseg import logs
    from fedseg.errors import KitError
    from fedseg.kit import load_kit
    from fedseg.site.supernode import run_supernode

    logging.getLogger("fedseg").setLevel(logging.INFO)
    opened = load_kit(kit)
    if opened.config.role != "site":
        raise KitError(f"{kit}: is the coordinator's kit; a gate needs that of a site")
    logs.always_about(site=opened.config.site)
    run_supernode(opened, socket or _socket_of(kit), home=(home or kit / "gate").absolute(), port=port)


@app.command()
def approve(
    bundle: Annotated[Path, typer.Argument(help="App bundle, such as app.fab of the kit.")] = Path("app.fab"),
    kit: Annotated[Path | None, typer.Option(help="The kit's folder; absent: where the bundle lies.")] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print every file of the bundle in full, and decide later.")
    ] = False,
    withdraw: Annotated[
        str | None, typer.Option(help="Take an approved bundle off the list, by the first digits of its SHA-256.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Approve without asking, after you have compared the SHA-256.")
    ] = False,
) -> None:
    """Look at an app bundle and approve it by its SHA-256. The gate runs no other."""
    import getpass

    from rich.console import Console
    from rich.syntax import Syntax

    from fedseg.app_bundle import bundle_digest, bundled_files, read_bundled
    from fedseg.site import approval

    bundle = bundle / "app.fab" if bundle.is_dir() else bundle
    console, folder = Console(highlight=False), kit or bundle.resolve().parent
    if withdraw is not None:
        gone = approval.withdraw(folder, withdraw)
        console.print(f"{gone.sha256} is not approved any more; runs that it has begun are not ended", soft_wrap=True)
        return
    content = approval.read_bundle(bundle)
    files = bundled_files(content, str(bundle))
    if show:
        for file in files:
            console.rule(file.name)
            language = "toml" if file.name.endswith("toml") else "python"
            console.print(
                Syntax(read_bundled(content, file.name), language, word_wrap=True)
            )  # else the end of a line is cut
    console.print(_bundle_table(files, str(bundle)))
    digest = bundle_digest(content)
    console.print(f"SHA-256 of the whole: [bold]{digest}[/]", soft_wrap=True)
    if approval.is_approved(folder, content):
        console.print("it is approved already")
    elif show:
        console.print("to approve it, say so without --show")
    elif yes or typer.confirm("Does the coordinator name the same SHA-256, and may this code run here?"):
        approval.approve(folder, content, bundle.name, getpass.getuser())
        console.print(f"approved; recorded in {folder / approval.FILE}", soft_wrap=True)
    else:
        raise typer.Exit(1)
    _show_approvals(console, approval.approvals(folder))


@app.command()
def status(
    kit: KitFolder = Path(),
    socket: Annotated[
        Path | None, typer.Option(help="Socket of the site service; absent: as the site file says.")
    ] = None,
    json_out: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What the site service is doing now; exit 1 if it does not answer."""
    from google.protobuf.json_format import MessageToJson
    from rich.console import Console

    from fedseg.errors import SiteUnreachable
    from fedseg.site.connect import Connection

    try:
        with Connection(socket or _socket_of(kit), patience=1.0) as connection:
            found = connection.describe()
    except SiteUnreachable as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    if json_out:
        typer.echo(MessageToJson(found, preserving_proto_field_name=True))
    else:
        Console(highlight=False).print(_status_table(found, _drift_of(kit)))


@app.command()
def metrics(
    kit: KitFolder = Path(),
    socket: Annotated[
        Path | None, typer.Option(help="Socket of the site service; absent: as the site file says.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = 9465,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but the loopback device's needs --web-config.")
    ] = "127.0.0.1",
    web_config: WebConfig = None,
    once: Annotated[bool, typer.Option("--once", help="Print the series and end; exit 1 if nobody answers.")] = False,
) -> None:
    """Show the site to your own Prometheus, which asks here; docs/hospital.md lists the series. The coordinator sees none."""
    import logging
    import threading

    from fedseg.endpoint import listen
    from fedseg.site.scrape import scraped, scraping_app, socket_in

    asked = socket or socket_in(kit / "site.toml" if kit.is_dir() else kit)
    if once:
        text = scraped(asked)
        typer.echo(text, nl=False)
        raise typer.Exit(0 if "\nfedseg_site_service_up 1\n" in text else 1)
    logging.getLogger("fedseg").setLevel(logging.INFO)
    server, _ = listen(scraping_app(asked), host, port, web_config)
    typer.echo(f"series of the site for Prometheus are on {server.url}metrics", err=True)
    threading.Event().wait()


@app.command()
def cancel(
    kit: KitFolder = Path(),
    socket: Annotated[
        Path | None, typer.Option(help="Socket of the site service; absent: as the site file says.")
    ] = None,
) -> None:
    """End the round that is running; the coordinator is told that it was cancelled."""
    from fedseg.site.connect import Connection

    with Connection(socket or _socket_of(kit), patience=5.0) as connection:
        typer.echo("the round ends at its next step" if connection.cancel() else "no round is running")


@app.command()
def drift(
    model: Annotated[
        Path, typer.Argument(help="Model file, or a result directory, of a federation with a fingerprint.")
    ],
    kit: KitFolder = Path(),
    site: SiteFile = None,
) -> None:
    """Compare this site's images with those that a network was trained on; exit 1 if they are unlike. Nothing leaves."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from fedseg.data.features import align_all, describe
    from fedseg.data.preprocess import prepare_cohort
    from fedseg.drift import drift_of, site_drift
    from fedseg.errors import ModelError
    from fedseg.federated.site import Site
    from fedseg.model_file import read_model_file
    from fedseg.site.config import load_site

    file = read_model_file(model)
    if not file.fingerprint:
        raise ModelError(f"{model}: holds no fingerprint of the images it was trained on; data.fingerprint was not set")
    config = load_site(site or (kit / "site.toml" if kit.is_dir() else kit))
    task, data, cache = file.experiment.task, file.experiment.data, Path(config.cache)
    prepared = prepare_cohort(Site(config).cohort(), task, data, cache, shift=config.shift, progress=True)
    cases = align_all(prepared.cases, data, file.fingerprint)
    console = Console(highlight=False)
    with Progress(console=console, transient=True) as progress:
        found = {
            case.name: describe(case)
            for case in progress.track(cases, total=len(prepared.cases), description="Looking")
        }
    table = Table("case", "distance", "what is different")
    for name, features in found.items():
        one = drift_of(features, file.fingerprint)
        if one.alarm:
            table.add_row(name, f"{one.distance:.1f}", ", ".join(one.words))
    together = site_drift(list(found.values()), file.fingerprint)
    if table.row_count:
        console.print(table)
    console.print(str(together), soft_wrap=True)
    if together.alarm:
        raise typer.Exit(1)


def _drift_of(kit: Path) -> str:
    """What the service last found of the site's images, from its audit log."""
    from fedseg.errors import FedsegError
    from fedseg.site.audit import last_drift
    from fedseg.site.config import load_site

    try:
        found = last_drift(load_site(kit / "site.toml" if kit.is_dir() else kit).audit_log)
    except FedsegError:  # only the socket was named
        return "unknown"
    if found is None:
        return "not compared"
    told = f"{found['unusual']} of {found['cases']} unlike those of the others, {found['expected']} would be chance"
    return f"[yellow]{told}: {', '.join(found['words'])}[/]" if found["alarm"] else told


def _socket_of(kit: Path) -> Path:
    from fedseg.site.config import load_site

    return Path(load_site(kit / "site.toml" if kit.is_dir() else kit).socket)


def _now() -> str:
    from datetime import datetime

    return f"{datetime.now():%Y-%m-%d %H:%M:%S}"


def _bundle_table(files: "list[BundledFile]", title: str) -> "Table":
    from rich.table import Table

    table = Table("file", "bytes", "SHA-256", title=title)
    for file in files:
        table.add_row(file.name, str(file.size), file.sha256)
    return table


def _show_approvals(console: "Console", known: "list[Approval]") -> None:
    from rich.table import Table

    table = Table("SHA-256", "approved", "by", "file", title="Approved here")
    for approval in known:
        table.add_row(approval.sha256[:16], f"{approval.approved:%Y-%m-%d %H:%M}", approval.by, approval.name)
    console.print(table)


def _status_table(found: "Description", images: str) -> "Table":
    from datetime import datetime

    from rich.table import Table

    def moment(seconds: float) -> str:
        return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}" if seconds else "never"

    progress = found.progress
    doing = f"{progress.phase} {progress.done}/{progress.total}" if found.state == "busy" else "nothing"
    table = Table(show_header=False, title=f"Site {found.site}")
    for row in (
        ("state", found.state),
        ("doing", doing),
        ("device", found.device),
        ("release", found.version),
        ("running since", moment(found.started)),
        ("last answer", moment(found.answered)),
        ("training images", images),
        ("requests answered", str(found.rounds_answered)),
        ("requests not answered", str(found.rounds_refused)),
    ):
        table.add_row(*row)
    return table
