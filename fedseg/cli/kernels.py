"""`fedseg kernels`: what computes Bi-WKV, the operator of RWKV-UNet, on this machine."""

import json
from typing import Annotated, Any

import typer


def kernels(
    build: Annotated[
        bool,
        typer.Option("--build", help="Compile now what can be compiled, and compare everything with the definition."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which implementations of Bi-WKV can run here, and which is used; FEDSEG_BI_WKV=torch|cpp|triton chooses another."""
    from rich.console import Console
    from rich.table import Table

    rows = _rows(build)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        table = Table(title="Bi-WKV", title_justify="left")
        headings = ["name", "device", "used", "state", *(["largest error"] if build else [])]
        for heading in headings:
            table.add_column(heading)
        for row in rows:
            used = ", ".join(row["used_on"])
            state = row["unavailable"] or row["build"] or row["what"]
            error = "" if row["error"] is None else f"{row['error']:.1e}"
            table.add_row(row["name"], ", ".join(row["devices"]), used, state, *([error] if build else []))
        Console().print(table)
    if any(row["error"] is not None and not row["error"] < LARGEST_ERROR for row in rows):
        raise typer.Exit(1)


LARGEST_ERROR = 1e-4
"""Of values and gradients, relative to the largest of each; a build that exceeds it is broken."""


def _rows(build: bool) -> list[dict[str, Any]]:
    import warnings

    import torch

    from fedseg.errors import ModelError
    from fedseg.layers.kernels import IMPLEMENTATIONS, chosen, native
    from fedseg.layers.kernels.build import find

    rows: list[dict[str, Any]] = []
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says it
        in_use = {device: chosen(device) for device in devices}
    for name, one in IMPLEMENTATIONS.items():
        reason, error = one.unavailable(), None
        device = next((device for device in devices if device in one.devices), None)
        if build and reason is None and device is not None:
            try:
                error = _largest_error(one.call, device)
            except ModelError as failure:
                reason = str(failure)
        path = find(native.SOURCE) if name == "cpp" else None
        rows.append(
            {
                "name": name,
                "devices": list(one.devices),
                "what": one.what,
                "used_on": [device for device in devices if in_use[device] == name],
                "unavailable": reason,
                "build": None if path is None else str(path),
                "error": error,
            }
        )
    return rows


def _largest_error(call: Any, device: str) -> float:
    """Largest difference from the definition, of the values and all gradients, each relative to its largest number."""
    import torch

    from fedseg.layers.kernels.reference import bi_wkv_reference

    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 203, 37), (2, 203, 37), (37,), (37,)]
    inputs = [(2 * torch.randn(shape, generator=generator)).to(device).requires_grad_() for shape in shapes]
    weight = torch.randn(shapes[0], generator=generator).to(device)
    found = []
    for compute in (call, bi_wkv_reference):
        y = compute(*inputs)
        found.append([y.detach(), *torch.autograd.grad((y * weight).sum(), inputs)])
    return max(float((ours - exact).abs().max() / exact.abs().max()) for ours, exact in zip(*found, strict=True))
