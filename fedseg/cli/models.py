"""`fedseg models` and `fedseg export`: what networks there are, and how to take one elsewhere."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def models(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: name, preset, parameters, input_size, ...")
    ] = False,
) -> None:
    """List all networks and presets with their parameter counts."""
    from rich.console import Console
    from rich.table import Table

    rows = _rows()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    console = Console()
    headings = ["name", "preset", "parameters", "input C×D×H×W", "labels", "what"]
    table = Table(*(headings if console.width >= 120 else headings[:-1]))
    for row in rows:
        cells = (
            row["name"],
            row["preset"] + (" (default)" if row["default"] else ""),
            f"{row['parameters']:,}".rjust(10),
            "×".join(map(str, (row["in_channels"], *row["input_size"]))),
            str(row["num_labels"]).rjust(6),
            row["description"],
        )
        table.add_row(*cells[: len(table.columns)])
    console.print(table)


def export(
    model: Annotated[Path, typer.Argument(help="Model file, or a result directory: its federated model.")],
    output: Annotated[Path, typer.Argument(help="File to write: .onnx or .pt2.")],
) -> None:
    """Write a trained network's inference graph for ONNX runtimes or torch.export.load, and its MODEL_CARD.md beside it."""
    from fedseg.model_file import load_model_file, model_path
    from fedseg.models.export import export_model
    from fedseg.report.card import NAME, Exported, write_exported_card
    from fedseg.words import counted

    experiment, network = load_model_file(model)
    export_model(network, output, experiment.training.patch_size, experiment.in_channels)
    size = "×".join(map(str, experiment.training.patch_size))
    channels = counted(experiment.in_channels, "channel")
    typer.echo(f"{output}: patches of {size} voxels, {channels}, any batch size")
    source = model_path(model, "federated") if model.is_dir() else model
    card = write_exported_card(Exported(output, source))
    typer.echo(card or f"{output.parent / NAME}: is no card of fedseg's, and stays as it is")


def _rows() -> list[dict[str, Any]]:
    import torch

    from fedseg.models import build_model, count_parameters, list_models

    rows = []
    for info in list_models():
        with torch.device("meta"):  # counted without memory for the weights
            network = build_model(
                info.name, preset=info.preset, in_channels=info.in_channels, num_labels=info.num_labels
            )
        rows.append(
            {
                "name": info.name,
                "preset": info.preset,
                "default": info.default,
                "parameters": count_parameters(network),
                "input_size": list(info.patch_size),
                "in_channels": info.in_channels,
                "num_labels": info.num_labels,
                "description": info.description,
            }
        )
    return rows
