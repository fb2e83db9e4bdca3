"""Weights that the authors of a network released, read by their names.

A released checkpoint names the same tensors differently and may lay them out differently. For each network that has a
released counterpart, `published_names` says what each of our tensors is called there; a new network registers a function.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import singledispatch

import torch
from torch import Tensor, nn

from fedseg.errors import ModelError
from fedseg.models.mlru import Block, MLRUPlusPlus
from fedseg.models.rwkv import RWKVUNet, RWKVUNet3d

_SHOWN = 12
"""Most names of one kind that an error lists."""


def load(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy a released checkpoint into a network; either everything is loaded or nothing.

    Args:
        model: a network with a released counterpart, built with the options of that checkpoint.
        state_dict: tensors by their released names, `module.` in front or not. Counters (`num_batches_tracked`) may be
            missing. Left unread are auxiliary heads that our network was built without, and dead tensors of RWKV-UNet.

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
                ours[name].copy_(in_our_layout(theirs, given[theirs], ours[name]))


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


@published_names.register
def _(model: RWKVUNet) -> dict[str, str]:
    """Source: the released checkpoints of RWKV-UNet (arXiv 2501.08458)."""
    if isinstance(model, RWKVUNet3d):
        raise ModelError("RWKVUNet3d has no released counterpart whose weights could be loaded")
    return {name: _rwkv_name(name, model) for name in model.state_dict()}


def _rwkv_name(ours: str, model: RWKVUNet) -> str:
    """Released name of one tensor: where it stands, then the parts of a block."""
    place, name = ours.split(".", 1)
    if place == "stem":
        return f"encoder.stage0.0.{_rwkv_part(name)}"
    if place == "stages":
        stage, block, name = name.split(".", 2)
        if name.startswith("norm.") and int(stage) >= len(model.stages) - 2:
            name = f"norm.{name}"  # a norm over channels is wrapped once more
        return f"encoder.stage{int(stage) + 1}.{block}.{_rwkv_part(name)}"
    if place == "decoder":
        block, name = name.split(".", 1)
        return f"decoder{int(block) + 1}.{_rwkv_part(name)}"
    if place == "ccm":
        return f"ccm.{_rwkv_part(name, mix='channel', outer={'norm': 'ln1', **_RWKV_SCALES})}"
    return f"final_conv.{name}"


def _rwkv_part(name: str, mix: str = "att", outer: Mapping[str, str] | None = None) -> str:
    part, _, rest = name.partition(".")
    if part == "mix":
        inner, _, tensor = rest.partition(".")
        renamed = _RWKV_MIX.get(inner, inner)
        return f"{mix}.{renamed}.{tensor}" if tensor else f"{mix}.{renamed}"
    return f"{(outer or _RWKV_BLOCK).get(part, part)}.{rest}"


_RWKV_BLOCK = {
    "expand": "conv.conv",
    "expand_norm": "conv.norm",
    "local": "conv_local.conv",
    "local_norm": "conv_local.norm",
    "project": "proj.conv",
    "project_norm": "proj.norm",
    "squeeze": "se.conv_reduce",
    "excite": "se.conv_expand",
    "mix_norm": "ln1",
}
_RWKV_SCALES = {"enter": "projections", "leave": "final_projections"}
_RWKV_MIX = {
    "decay": "spatial_decay",
    "first": "spatial_first",
    "mix_key": "spatial_mix_k",
    "mix_value": "spatial_mix_v",
    "mix_receptance": "spatial_mix_r",
    "norm": "key_norm",
}
_RWKV_DEAD = re.compile(r"\.(ln1|ln2|att)\.|^encoder\.(?!stage)")
"""Tensors of released RWKV-UNet checkpoints that no forward pass reads: attention where there is none, a classifier."""


def _may_go_unread(model: nn.Module, name: str) -> bool:
    """Whether a name belongs to an auxiliary head that this network was built without, or to nothing."""
    if isinstance(model, RWKVUNet):
        return _RWKV_DEAD.search(name) is not None
    return isinstance(model, MLRUPlusPlus) and len(model.heads) == 1 and name.startswith(("out2.", "out3."))


def in_our_layout(name: str, theirs: Tensor, ours: Tensor) -> Tensor:
    """A released tensor in our layout: position embeddings `(1, N, C)` become `(1, C, D, H, W)`, mixes lose two axes."""
    return (theirs.transpose(1, 2) if name.endswith(".pos_embed") else theirs).reshape(ours.shape)


def released_shape(name: str, ours: Tensor) -> tuple[int, ...]:
    """Shape of our tensor under its released name."""
    if name.endswith(".pos_embed"):
        return (1, ours[0, 0].numel(), ours.shape[1])
    return ((1, 1) if ".spatial_mix_" in name else ()) + tuple(ours.shape)


def _misfits(names: Mapping[str, str], ours: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    wanted = {theirs: released_shape(theirs, ours[name]) for name, theirs in names.items()}
    return [
        f"{name} is {tuple(given[name].shape)}, not {shape}"
        for name, shape in wanted.items()
        if name in given and tuple(given[name].shape) != shape
    ]


def _list(fault: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{fault}: {', '.join(names[:_SHOWN])}{more}"]
