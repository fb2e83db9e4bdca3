"""`fedseg warm-start`: what a file of pretrained weights gives to an experiment's network, before anything is trained."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fedseg.config import Experiment


def warm_start(
    experiment: Annotated[Path, typer.Argument(help="Experiment TOML.")],
    weights: Annotated[
        Path | None, typer.Option(help="Safetensors file; absent: the experiment's model.pretrained.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="The decoder too, not only the encoder.")] = False,
) -> None:
    """Show which pretrained weights an experiment's network would start from, and which do not fit."""
    from rich.console import Console

    from fedseg.config import load_experiment
    from fedseg.errors import ConfigError

    wanted = load_experiment(experiment)
    changed: dict[str, str] = {} if weights is None else {"pretrained": str(weights.resolve())}
    if everything:
        changed["pretrained_part"] = "all"
    wanted = wanted.model_copy(update={"model": wanted.model.model_copy(update=changed)})
    if wanted.model.pretrained is None:
        raise ConfigError(f"{experiment}: model.pretrained is not set; name a file there or with --weights")
    show_warm_start(wanted, Console(), details=True)


def show_warm_start(experiment: "Experiment", console: "Console", *, details: bool = False) -> None:
    """Print the report, if the experiment has a warm start.

    Args:
        experiment: what would be trained.
        console: where to print.
        details: list names too.
    """
    from fedseg.federated.networks import new_model, warm_start

    report = warm_start(new_model(experiment), experiment)
    if report is None:
        return
    console.print(f"warm start from {report}", highlight=False, soft_wrap=True)
    if details:
        _list(console, "loaded", report.loaded)
    _list(console, "of another shape, kept fresh", report.misfits)
    _list(console, "not in the file, kept fresh", report.absent)
    if details:
        _list(console, "in the file, not used", report.unread)


def _list(console: "Console", what: str, names: Iterable[str]) -> None:
    for name in names:
        console.print(f"  {what}: {name}", highlight=False, markup=False)
