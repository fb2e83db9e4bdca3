"""Write a network's inference graph to a file that runs without this library."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fedseg.errors import ModelError
from fedseg.layers.kernels.exported import LARGEST_DECAY
from fedseg.layers.rwkv import SpatialMix

INPUT, OUTPUT = "image", "logits"
"""Names of the graph's input `(B, C, D, H, W)` and output `(B, K, D, H, W)`."""


def export_model(model: nn.Module, path: Path, patch_size: Sequence[int], in_channels: int) -> None:
    """Export a network for patches of one size and batches of any.

    The suffix of `path` decides: `.onnx` is for ONNX runtimes (needs `pip install "fedseg[onnx]"`), `.pt2` for
    `torch.export.load`. The model is not changed.

    Args:
        model: any network of `build_model`; its evaluation mode is exported.
        path: file to write, replaced if it exists.
        patch_size: input size in voxels `(D, H, W)`, fixed in the graph.
        in_channels: channels of the input.

    Raises:
        ModelError: the suffix is another, the packages for ONNX are not installed, or the network's decays are too large for
            the plain operations of which an exported Bi-WKV consists.
    """
    suffix = path.suffix.lower()
    if suffix not in (".onnx", ".pt2"):
        raise ModelError(f"{path}: a network is exported to .onnx or .pt2, got {path.suffix or 'no suffix'!r}")
    _require_plain_decays(model, path)
    device = next(model.parameters()).device
    image_BCDHW = torch.zeros(2, in_channels, *patch_size, device=device)  # of one, the exporter would fix the batch
    with _ready_for_export(model):
        program = torch.export.export(model, (image_BCDHW,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        if suffix == ".pt2":
            torch.export.save(program, path)
        else:
            _write_onnx(program, path)


def _require_plain_decays(model: nn.Module, path: Path) -> None:
    for name, module in model.named_modules():
        if isinstance(module, SpatialMix) and module.decay.abs().max() > LARGEST_DECAY:
            raise ModelError(
                f"{path}: {name}.decay reaches {module.decay.abs().max():g}; an exported graph computes Bi-WKV out of plain"
                f" operations, which hold up to {LARGEST_DECAY:g}"
            )


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    try:
        import onnxscript  # type: ignore[import-not-found, unused-ignore]  # noqa: F401 - torch needs it, and says so less clearly
    except ImportError:
        raise ModelError(f'{path}: ONNX needs more packages: pip install "fedseg[onnx]"') from None
    converted = torch.onnx.export(
        program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], external_data=False, verbose=False
    )
    assert converted is not None
    converted.save(path)


@contextmanager
def _ready_for_export(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and channels-first layout, which other runtimes expect; both as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    layout = getattr(model, "memory_format", None)
    model.eval()
    if layout is not None:
        model.memory_format = "contiguous"  # type: ignore[assignment]
    try:
        with torch.no_grad():
            yield
    finally:
        if layout is not None:
            model.memory_format = layout
        for module, training in modes:
            module.training = training
