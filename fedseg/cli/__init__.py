"""The `fedseg` command. Commands import what they need when they run, so that `--help` answers at once."""

import logging
import signal
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fedseg import __version__, logs
from fedseg.cli import (
    data,
    experiment,
    kernels,
    models,
    personalise,
    predict,
    provision,
    report,
    server,
    simulate,
    site,
    train,
    warm_start,
)
from fedseg.errors import FedsegError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Hospitals train one 3D segmentation network together; no volume leaves its hospital.",
)
for command in (
    simulate.simulate,
    simulate.results,
    train.train,
    report.report,
    predict.evaluate,
    predict.predict,
    personalise.personalise,
    models.models,
    models.export,
    kernels.kernels,
    warm_start.warm_start,
    provision.provision,
):
    app.command()(command)
app.add_typer(data.app, name="data")
app.add_typer(experiment.app, name="experiment")
app.add_typer(site.app, name="site")
app.add_typer(server.app, name="server")


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is going on to stderr.")] = False,
    log_format: Annotated[
        logs.Format,
        typer.Option(envvar=logs.FORMAT, help="Lines of the log on stderr; json is for whatever collects logs."),
    ] = "text",
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    logs.set_up(log_format, logging.INFO if verbose else logging.ERROR)


def main() -> None:
    """Run the command; expected errors become one readable message and exit code 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception on its way out ends the worker processes
    try:
        app()
    except FedsegError as error:
        if logs.is_json():
            logging.getLogger("fedseg").error(str(error))
        else:
            Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
