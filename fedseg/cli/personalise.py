"""`fedseg personalise`: a site's own network, of what the sites share and what stayed here."""

from pathlib import Path
from typing import Annotated

import typer


def personalise(
    model: Annotated[Path, typer.Argument(help="Model file of a federation.")],
    site: Annotated[Path, typer.Option(help="This site's file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model file to write.")],
    epochs: Annotated[
        int,
        typer.Option(min=0, help="Go on alone for up to so many epochs; kept only if the validation cases prefer it."),
    ] = 0,
) -> None:
    """Make a federation's model this site's own, for `fedseg predict` and `fedseg evaluate`.

    Tensors that stayed at this site are joined with the others; with --epochs the site trains on. Nothing leaves it.
    """
    from fedseg.errors import ModelError
    from fedseg.model_file import read_model_file, save_personal_model, save_site_model
    from fedseg.site.config import load_site

    config, source = load_site(site), model
    file = read_model_file(model)
    if file.experiment.federation.personal_lambda is not None:
        save_personal_model(output, file, config.state_folder, config.name)
        source = output
    elif file.missing:
        save_site_model(output, file, config.state_folder, config.name)
        source = output
    elif not epochs:
        raise ModelError(
            f"{model}: the model is complete, nothing of it stayed at the sites; --epochs 5 would train on from it"
        )
    if epochs:
        from fedseg.simulation import personalise_file

        found = personalise_file(config, source, output, epochs)
        for candidate in found.tried:
            typer.echo(f"{candidate.mean:.4f} mean Dice of the validation persons: {candidate}")
        typer.echo(f"kept: {found.kept}")
    typer.echo(f"{output}: the network of {config.name}; it does not leave this site")
