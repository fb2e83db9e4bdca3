"""`fedseg experiment`: check an experiment file, and the schema that editors understand."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Check an experiment file; print its JSON schema.")


@app.command()
def check(file: Annotated[Path, typer.Argument(help="Experiment TOML.")]) -> None:
    """Validate an experiment and print it in full, defaults included."""
    from fedseg.config import load_experiment

    experiment = load_experiment(file)
    typer.echo(json.dumps(experiment.model_dump(mode="json"), indent=2))
    typer.echo(f"{file}: valid, digest {experiment.digest()[:16]}", err=True)


@app.command()
def schema(
    scenario: Annotated[bool, typer.Option("--scenario", help="Of a scenario instead.")] = False,
) -> None:
    """Print the JSON schema of experiment files."""
    from fedseg.config import Experiment
    from fedseg.scenario import Scenario

    typer.echo(json.dumps((Scenario if scenario else Experiment).model_json_schema(), indent=2))
