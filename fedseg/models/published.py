"""Weights that the authors of a network released, read by their names.

A released checkpoint names the same tensors differently and may lay them out differently. For each network that has a
released counterpart, `published_names` says what each of our tensors is called there; a new network registers a function.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import singledispatch

import torch
from torch import Tensor, nn

from fedseg.errors import ModelError
from fedseg.models.mlru import Block, MLRUPlusPlus

_SHOWN = 12
"""Most names of one kind that an error lists."""


def load(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy a released checkpoint into a network; either everything is loaded or nothing.

    Args:
        model: a network with a released counterpart, built with the options of that checkpoint.
        state_dict: tensors by their released names, `module.` in front or not. Counters (`num_batches_tracked`) may be
            missing, and so may our network's auxiliary heads: those in the checkpoint are then left unread.

    Raises:
        ModelError: the network has no released counterpart, or names are missing or unknown, or shapes do not fit.
    """
    names = published_names(model)
    given = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    ours = model.state_dict()
    needed = {name for name in names.values() if not name.endswith("num_batches_tracked")}
    faults = [
        *_list("missing", sorted(needed - given.keys())),
        *_list(
            "unknown", sorted(name for name in given.keys() - set(names.values()) if not _may_go_unread(model, name))
        ),
        *_list("of another shape", _misfits(names, ours, given)),
    ]
    if faults:
        kind = type(model).__name__
        raise ModelError(f"the checkpoint does not fit this {kind}, nothing was loaded; {'; '.join(faults)}")
    with torch.no_grad():
        for name, theirs in names.items():
            if theirs in given:
                ours[name].copy_(_as_ours(theirs, given[theirs], ours[name]))


@singledispatch
def published_names(model: nn.Module) -> dict[str, str]:
    """Released name of each tensor of a network's state dict, by our name.

    Raises:
        ModelError: the network has no released counterpart.
    """
    raise ModelError(f"{type(model).__name__} has no released counterpart whose weights could be loaded")


@published_names.register
def _(model: MLRUPlusPlus) -> dict[str, str]:
    """Source: the released checkpoints of MLRU++ (arXiv 2507.16122)."""
    names: dict[str, str] = {}
    for level, stage in enumerate(model.encoder):
        start = f"unetr_pp_encoder.downsample_layers.{level}"
        names[f"downs.{level}.0.weight"] = f"{start}.0.conv.weight"
        names |= {f"downs.{level}.1.{part}": f"{start}.1.{part}" for part in ("weight", "bias")}
        for index, block in enumerate(stage.children()):
            names |= _block_names(block, f"encoder.{level}.{index}", f"unetr_pp_encoder.stages.{level}.{index}")
    for level, stage in enumerate(model.decoder):
        for index, block in enumerate(stage.children()):
            names |= _block_names(block, f"decoder.{level}.{index}", f"decoder{level + 3}.decoder_block.0.{index}")
    for level in range(len(model.ups)):
        names[f"ups.{level}.weight"] = f"decoder{level + 2}.transp_conv.conv.weight"
    for head in range(len(model.heads)):
        names |= {f"heads.{head}.{part}": f"out{head + 1}.conv.conv.{part}" for part in ("weight", "bias")}
    for conv in ("conv1", "conv2"):
        names[f"skip.{conv}.weight"] = f"encoder1.{conv}.conv.weight"
        names[f"last.{conv}.weight"] = f"decoder2.decoder_block.0.{conv}.conv.weight"
    if model.skip.shortcut is not None:
        names["skip.shortcut.weight"] = "encoder1.conv3.conv.weight"
    return names


def _block_names(block: nn.Module, ours: str, theirs: str) -> dict[str, str]:
    """Names of one block: our part's name, then theirs, for each of the tensors that our part has."""
    assert isinstance(block, Block)
    parts = dict(_block_parts(len(block.residual), len(block.attention.scales.scales)))
    names = {"gamma": "gamma", "position": "pos_embed"}
    for name in block.state_dict():
        part, _, tensor = name.rpartition(".")
        names.setdefault(name, f"{parts.get(part, part)}.{tensor}")
    return {f"{ours}.{name}": f"{theirs}.{names[name]}" for name in block.state_dict()}


def _block_parts(residuals: int, kernels: int) -> Iterator[tuple[str, str]]:
    yield from {
        "norm": "norm",
        "attention.gate.squeeze": "epa_block.epa.fc1",
        "attention.gate.excite": "epa_block.epa.fc2",
        "attention.gate.spatial": "epa_block.epa.sa_conv",
        "attention.scales.expand": "epa_block.mscb.pconv1.0",
        "attention.scales.expand_norm": "epa_block.mscb.pconv1.1",
        "attention.scales.reduce": "epa_block.mscb.pconv2.0",
        "attention.scales.reduce_norm": "epa_block.mscb.pconv2.1",
        "project": "conv8.1",
    }.items()
    for kernel in range(kernels):
        yield f"attention.scales.scales.{kernel}", f"epa_block.mscb.msdc.dwconvs.{kernel}.0"
        yield f"attention.scales.scale_norms.{kernel}", f"epa_block.mscb.msdc.dwconvs.{kernel}.1"
    for index in range(residuals):
        for half in (1, 2):
            yield f"residual.{index}.conv{half}", f"conv5{index + 1}.conv{half}.conv"
            yield f"residual.{index}.norm{half}", f"conv5{index + 1}.norm{half}"


def _may_go_unread(model: nn.Module, name: str) -> bool:
    """Whether a name belongs to an auxiliary head that this network was built without."""
    return isinstance(model, MLRUPlusPlus) and len(model.heads) == 1 and name.startswith(("out2.", "out3."))


def _as_ours(name: str, theirs: Tensor, ours: Tensor) -> Tensor:
    """A released tensor in our layout: position embeddings `(1, N, C)` become `(1, C, D, H, W)`."""
    if not name.endswith(".pos_embed"):
        return theirs
    return theirs.transpose(1, 2).reshape(ours.shape)


def _misfits(names: Mapping[str, str], ours: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    found = []
    for name, theirs in names.items():
        if theirs not in given:
            continue
        shape = tuple(ours[name].shape)
        wanted = (1, ours[name][0, 0].numel(), shape[1]) if theirs.endswith(".pos_embed") else shape
        if tuple(given[theirs].shape) != wanted:
            found.append(f"{theirs} is {tuple(given[theirs].shape)}, not {wanted}")
    return found


def _list(fault: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{fault}: {', '.join(names[:_SHOWN])}{more}"]
