"""`fedseg personalise`: a site's own network, of what the sites share and what stayed here."""

from pathlib import Path
from typing import Annotated

import typer


def personalise(
    model: Annotated[Path, typer.Argument(help="Model file of a federation in which tensors stayed at the sites.")],
    site: Annotated[Path, typer.Option(help="This site's file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model file to write.")],
) -> None:
    """Join a federation's model with the tensors that stayed at this site, for `fedseg predict` and `fedseg evaluate`."""
    from fedseg.model_file import read_model_file, save_site_model
    from fedseg.site.config import load_site

    config = load_site(site)
    save_site_model(output, read_model_file(model), config.state_folder, config.name)
    typer.echo(f"{output}: the network of {config.name}; it does not leave this site")
