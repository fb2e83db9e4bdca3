"""`fedseg train`: one site alone, or several pooled, with the experiment that a federation would run."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    experiment: Annotated[Path, typer.Argument(help="Experiment TOML; its rounds and local epochs say how long.")],
    data: Annotated[
        list[Path] | None, typer.Option(help="Folder with cases; several are pooled.", show_default=False)
    ] = None,
    site: Annotated[
        list[Path] | None, typer.Option(help="Site file instead of a folder; several are pooled.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Result directory.")] = Path("runs/train"),
    person: Annotated[
        str, typer.Option(help="Who is one person in --data: case, pairs, pattern:REGEX or column:FILE[:CASE:PERSON].")
    ] = "case",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto, for --data.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, for --data; absent: one per core.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Replaces the experiment's seed.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the result directory holds.")] = False,
) -> None:
    """Train one site alone, or several sites' cases pooled, without a federation."""
    from rich.console import Console

    from fedseg.cli.display import show_rounds
    from fedseg.cli.warm_start import show_warm_start
    from fedseg.config import load_experiment
    from fedseg.data.cohort import PersonRule
    from fedseg.device import usable_cores
    from fedseg.errors import ConfigError
    from fedseg.federated.site import Site
    from fedseg.simulation import train_alone
    from fedseg.site.config import SiteConfig, load_site

    if bool(data) == bool(site):
        raise ConfigError("fedseg train needs cases: --data FOLDER, or --site FILE (not both)")
    wanted = load_experiment(experiment)
    if seed is not None:
        wanted = wanted.model_copy(update={"seed": seed})
    rule = PersonRule.parse(person)
    sites = [load_site(path) for path in site or []] + [
        SiteConfig(
            name=f"folder{number}" if len(data or []) > 1 else "site",
            data=str(folder.resolve()),
            person=rule,
            device=device,
            threads=threads or usable_cores(),
        )
        for number, folder in enumerate(data or [], start=1)
    ]
    for config in sites:
        Site(config).prepare(wanted, progress=True)
    console = Console()
    show_warm_start(wanted, console)
    with show_rounds(console, wanted.federation.rounds) as display:
        path = train_alone(
            wanted, sites, "train", output, resume=resume, observe=lambda event: display.event("train", event)
        )
    console.print(f"model: {path}", highlight=False, soft_wrap=True)
