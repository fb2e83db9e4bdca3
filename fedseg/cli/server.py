"""`fedseg server`: what the coordinator runs, and what can be seen of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from fedseg.cli import history

if TYPE_CHECKING:
    from rich.console import Console, Group

app = typer.Typer(no_args_is_help=True, help="The coordinator's side of a study: start, watch, stop, go on.")
for command in (history.runs, history.show, history.export):
    app.command()(command)

KitFolder = Annotated[Path, typer.Argument(help="The coordinator's kit.")]
State = Annotated[
    Path | None, typer.Option(help="Folder for everything that is to survive; absent: `state` in the kit.")
]


Health = Annotated[
    int | None, typer.Option(help="Loopback port of the gRPC health service; absent: the one after the SuperLink's.")
]
WaitForSites = Annotated[
    int,
    typer.Option(help="Sites that must be connected before round 1; 0: the experiment's quorum, as in later rounds."),
]
Fence = Annotated[bool, typer.Option("--fence/--no-fence", help="Run nginx with the kit's nginx.conf, too.")]
Stay = Annotated[
    bool, typer.Option("--stay", help="When the study is finished, wait for SIGTERM: for what would start it again.")
]
MetricsPort = Annotated[
    int | None,
    typer.Option(
        min=0, max=65535, help="Port on which Prometheus finds the study's series, and a browser the page: 9464."
    ),
]
MetricsHost = Annotated[
    str, typer.Option(help="Address of that port; any but the loopback device's needs --web-config.")
]
Host = Annotated[str, typer.Option(help="Address to listen on; any but the loopback device's needs --web-config.")]
WebConfig = Annotated[
    Path | None,
    typer.Option(help="Who may ask, as Prometheus' exporters want it told: TLS, passwords, tokens (docs/metrics.md)."),
]


@app.command()
def start(
    kit: KitFolder = Path(),
    state: State = None,
    health: Health = None,
    wait_for_sites: WaitForSites = 0,
    fence: Fence = False,
    stay: Stay = False,
    metrics: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
    web_config: WebConfig = None,
) -> None:
    """Run the study until it is finished. Whatever dies on the way is started again, after its last finished round.

    A supervisor that was killed goes on when it is started again. After `fedseg server stop` it wants to be told: resume.
    """
    from fedseg.errors import ConfigError

    folder = state or kit / "state"
    if (folder / "stopped").exists():
        raise ConfigError(
            f"{folder}: the study was stopped on {(folder / 'stopped').read_text().strip()}; `fedseg server resume` goes on"
        )
    _run(kit, folder, health, wait_for_sites, fence, stay, _Metrics(metrics, metrics_host, web_config))


@app.command()
def resume(
    kit: KitFolder = Path(),
    state: State = None,
    health: Health = None,
    wait_for_sites: WaitForSites = 0,
    fence: Fence = False,
    stay: Stay = False,
    metrics: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
    web_config: WebConfig = None,
) -> None:
    """Go on with a study that was stopped, after its last finished round."""
    folder = state or kit / "state"
    (folder / "stopped").unlink(missing_ok=True)
    _run(kit, folder, health, wait_for_sites, fence, stay, _Metrics(metrics, metrics_host, web_config))


@app.command()
def stop(kit: KitFolder = Path(), state: State = None) -> None:
    """Stop a study. The round that is running is lost, everything before it is kept."""
    import os
    import signal
    import time
    from datetime import datetime

    from fedseg.coordinator.state import is_supervised, read_status, supervisor

    folder = state or kit / "state"
    read_status(folder)
    (folder / "stopped").write_text(f"{datetime.now():%Y-%m-%d %H:%M:%S}\n")
    pid = supervisor(folder)
    if pid is None:
        typer.echo("it was not running; `fedseg server resume` goes on with it")
        return
    os.kill(pid, signal.SIGTERM)
    for _ in range(600):
        if not is_supervised(folder):
            typer.echo(f"stopped after round {read_status(folder)['rounds']}; `fedseg server resume` goes on with it")
            return
        time.sleep(0.1)
    typer.echo(f"process {pid} has not ended within a minute", err=True)
    raise typer.Exit(1)


@app.command()
def status(
    kit: KitFolder = Path(),
    state: State = None,
    json_out: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """How far the study is, who is connected, and what is wrong; exit 1 unless it is running or finished."""
    import json

    from rich.console import Console

    from fedseg.coordinator.state import is_supervised, read_status
    from fedseg.coordinator.watch import overview

    folder = state or kit / "state"
    found = read_status(folder)
    found["supervised"] = is_supervised(folder)
    found |= overview(folder)
    if json_out:
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(found, Console(highlight=False))
    if not (found["supervised"] or found["state"] == "finished"):
        raise typer.Exit(1)


@app.command()
def logs(
    kit: KitFolder = Path(),
    state: State = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="So many lines.")] = 40,
    superlink: Annotated[bool, typer.Option("--superlink", help="The SuperLink's instead of the run's.")] = False,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as it grows.")] = False,
) -> None:
    """The end of the run's log."""
    import time
    from collections import deque

    from fedseg.errors import ConfigError

    folder = state or kit / "state"
    path = folder / ("superlink.log" if superlink else "run/server.log")
    if not path.exists():
        raise ConfigError(f"{path}: there is no log yet; has `fedseg server start` been run with this kit and --state?")
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in deque(file, maxlen=lines):
            typer.echo(line, nl=False)
        while follow:
            if line := file.readline():
                typer.echo(line, nl=False)
            else:
                time.sleep(0.3)


@app.command()
def metrics(
    directory: Annotated[Path, typer.Argument(help="Result directory of a study or of a simulation.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = 9464,
    host: Host = "127.0.0.1",
    web_config: WebConfig = None,
    once: Annotated[bool, typer.Option("--once", help="Print the series and end.")] = False,
) -> None:
    """Show a run to Prometheus, while it runs and afterwards; docs/metrics.md lists the series."""
    import threading

    from prometheus_client import CollectorRegistry, generate_latest

    from fedseg.coordinator.exporter import RunCollector, serve
    from fedseg.errors import ConfigError

    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such folder; name the result directory of a study or of a simulation")
    if once:
        registry = CollectorRegistry()
        registry.register(RunCollector(directory))
        typer.echo(generate_latest(registry).decode(), nl=False)
        return
    server, _ = serve(directory, host, port, web_config=web_config)
    typer.echo(
        f"{directory}: the page to watch is {server.url}, series for Prometheus are on {server.url}metrics", err=True
    )
    threading.Event().wait()


@app.command()
def watch(
    directory: Annotated[
        Path, typer.Argument(help="The coordinator's kit, its state folder, or the result directory of a simulation.")
    ] = Path(),
    state: Annotated[Path | None, typer.Option(help="The state folder, if it is not `state` in the kit.")] = None,
    web: Annotated[bool, typer.Option("--web", help="As a page for a browser instead of here.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0: any that is free.")] = 9464,
    host: Host = "127.0.0.1",
    web_config: WebConfig = None,
    run: Annotated[str | None, typer.Option(help="Which run of a simulation; absent: the federated one.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
) -> None:
    """Watch rounds and sites while a study or a simulation runs, and afterwards. Ctrl-C ends watching, not the study."""
    import contextlib
    import threading
    import time

    from fedseg.errors import ConfigError

    folder = state or (directory / "state" if (directory / "kit.toml").exists() else directory)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name a kit, a state folder (--state) or a result directory")
    with contextlib.suppress(KeyboardInterrupt):
        if web:
            from fedseg.coordinator.exporter import serve

            server, _ = serve(folder, host, port, web_config=web_config)
            typer.echo(f"{folder} on {server.url} ; Ctrl-C ends watching, not the study", err=True)
            threading.Event().wait()

        from rich.console import Console
        from rich.live import Live

        from fedseg.coordinator.page import watched

        console = Console(highlight=False)
        if once:
            console.print(_seen(watched(folder, run)))
            return
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(_seen(watched(folder, run)), refresh=True)
                time.sleep(2)


@app.command()
def web_password() -> None:
    """Ask for a password and print the line that lets its user in, for `basic_auth_users` of a web configuration."""
    import json

    from fedseg.web_auth import hash_password

    user = typer.prompt("user name", err=True)
    secret = typer.prompt("password", hide_input=True, confirmation_prompt=True, err=True)
    if ":" in user:
        raise typer.BadParameter(f"a user name has no colon, got {user!r}")
    try:
        typer.echo(f"  {json.dumps(user, ensure_ascii=False)}: {hash_password(secret)}")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def web_token(
    file: Annotated[Path, typer.Argument(help="New file for the token: `credentials_file` of a scrape configuration.")],
) -> None:
    """Draw a token into a file that only you can read, and print the line for `bearer_tokens` of a web configuration."""
    import hashlib
    import json
    import os
    import secrets

    from fedseg.errors import ConfigError

    token = secrets.token_urlsafe(32)
    try:
        with open(file, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as opened:
            opened.write(token + "\n")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be made: {error.strerror}; name a file that is not there yet") from None
    typer.echo(f"  {json.dumps(file.stem, ensure_ascii=False)}: {hashlib.sha256(token.encode()).hexdigest()}")


class _Metrics(NamedTuple):
    """Where series and page are shown."""

    port: int | None
    host: str
    web_config: Path | None


def _run(
    kit: Path, state: Path, health: int | None, wait_for_sites: int, fence: bool, stay: bool, metrics: _Metrics
) -> None:
    import signal
    from datetime import datetime

    from rich.console import Console

    from fedseg import logs
    from fedseg.coordinator.fence import SUPERLINK_PORT
    from fedseg.coordinator.supervisor import Plan, Supervisor
    from fedseg.errors import KitError
    from fedseg.kit import load_kit

    opened = load_kit(kit)
    if opened.config.role != "coordinator":
        raise KitError(f"{kit}: is the kit of site {opened.config.site}; the server needs the coordinator's")
    console = Console(highlight=False, soft_wrap=True, markup=False)
    port = opened.config.superlink_port or SUPERLINK_PORT
    plain = not logs.is_json()  # else the log says it all
    supervisor = Supervisor(
        Plan(
            opened,
            state.absolute(),
            port,
            health or port + 1,
            wait_for_sites,
            fence=fence,
            metrics_port=metrics.port,
            metrics_host=metrics.host,
            web_config=metrics.web_config,
        ),
        tell=lambda text: console.print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}") if plain else None,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stop.set())
    if supervisor.run():
        end = f"the study is finished; its model is {supervisor.plan.run_directory / 'models'}"
        console.print(end) if plain else logs.say(end)
        if stay:
            supervisor.stop.wait()


def _show(found: dict[str, Any], console: "Console") -> None:
    from datetime import datetime

    from rich.markup import escape
    from rich.table import Table

    state = found["state"] if found["supervised"] or found["state"] in ("finished", "stopped") else "not running"
    of = "" if found["of"] is None else f" of {found['of']}"
    console.print(f"[bold]{escape(found['study'])}[/]: {state}, round {found['rounds']}{of}")
    if found["problem"]:
        since = found.get("problem_began")  # a status of an earlier release does not say
        when = f" since {datetime.fromtimestamp(since):%Y-%m-%d %H:%M:%S}" if since else ""
        title = f"[dim]trouble{when}, over now:[/]" if found.get("problem_over") else f"[yellow]trouble{when}:[/]"
        console.print(f"{title} {escape(found['problem'])}", soft_wrap=True)
    restarts = ", ".join(f"{name} {count}" for name, count in found["restarts"].items() if count)
    if restarts:
        console.print(f"started again: {restarts}")
    table = Table("site", "connected", "last round", "last answer", "Dice", "what it said")
    for site in found["sites"]:
        moment = f"{datetime.fromtimestamp(site['seen']):%Y-%m-%d %H:%M}" if site["seen"] else "never"
        dice = f"{site['dice']:.3f}" if site["dice"] is not None else ""
        table.add_row(site["name"], site["node"], str(site["round"] or ""), moment, dice, site["said"])
    console.print(table)


def _seen(found: dict[str, Any]) -> "Group":
    """What `watch` shows in a terminal."""
    from datetime import datetime

    from rich.console import Group
    from rich.markup import escape
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    def clock(seconds: float | None) -> str:
        return "never" if seconds is None else f"{datetime.fromtimestamp(seconds):%d %b %H:%M:%S}"

    name = escape(found["study"] or "fedseg")
    heading = f"[bold]{name}[/] ({found['run']}): {found['state']}, round {found['round']} of {found['of'] or '?'}"
    if found["expected_end"] is not None:
        heading += f", expected end {clock(found['expected_end'])}"
    lines = [heading]
    if waiting := found["waiting"]:
        others = len(waiting["sites"]) - 8
        names = ", ".join(waiting["sites"][:8]) + (f" and {others} more" if others > 0 else "")
        lines.append(f"waiting for {escape(names) or 'nobody'} since {clock(waiting['since'])}")
    table = Table("site", "state", "last answer", "cases", "Dice", "loss", "said last", pad_edge=False)
    for site in found["sites"]:
        said = f"{site['said']} ({site['reason']})" if site["reason"] else site["said"]
        scores = [f"{site[key]:.3f}" if site[key] is not None else "" for key in ("dice", "loss")]
        cases = str(site["cases"]) if site["cases"] is not None else ""
        table.add_row(escape(site["name"]), site["state"], clock(site["seen"]), cases, *scores, escape(said))
    events = []
    for event in found["events"][:5]:
        words = " ".join(filter(None, (event["site"], event["kind"], event["detail"])))
        events.append(escape(f"{clock(event['time'])} round {event['round']}: {words}"))
    return Group(*lines, ProgressBar(total=found["of"] or 1, completed=found["round"]), table, *events)
