"""Warm start: pretrained weights from a local file into a fresh network, as far as they fit, with an account of what did.

Nothing is downloaded. The file is a safetensors file: of this project (`models/*.safetensors`), or with the names under which
the network's authors released theirs, the encoder alone or the whole network.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedseg.errors import ModelError
from fedseg.models.published import in_our_layout, published_names, released_shape
from fedseg.models.registry import ARCHITECTURES

Part = Literal["encoder", "all"]


@dataclass(frozen=True)
class WarmStart:
    """What a file gave to a network; names are the network's own, but for `unread`."""

    file: str
    loaded: tuple[str, ...]
    """Tensors that were overwritten."""
    absent: tuple[str, ...]
    """Wanted, but not in the file: they keep their fresh values."""
    misfits: tuple[str, ...]
    """In the file with another shape, with both shapes: they keep their fresh values."""
    unread: tuple[str, ...]
    """Names in the file that were not used."""
    num_values: int
    """Values that were overwritten."""
    num_wanted: int
    """Values of the wanted part of the network."""

    def __str__(self) -> str:
        found = f"{len(self.loaded)} tensors, {self.num_values:,} of {self.num_wanted:,} values"
        others = [
            f"{len(names)} {what}"
            for what, names in (
                ("not in the file", self.absent),
                ("of another shape", self.misfits),
                ("in the file not used", self.unread),
            )
            if names
        ]
        return f"{self.file}: loaded {found}" + (f"; {', '.join(others)}" if others else "")


def load_pretrained(model: nn.Module, name: str, path: Path, part: Part = "encoder") -> WarmStart:
    """Overwrite what a file has for a network.

    Args:
        model: the network, changed in place.
        name: what `list_models` calls it.
        path: a safetensors file.
        part: `encoder`, or `all` for the decoder and its heads too.

    Raises:
        ModelError: the file cannot be read, or nothing in it fits; the network is as before then.
    """
    given = _read(path)
    wanted = {
        ours: tensor
        for ours, tensor in model.state_dict().items()
        if tensor.is_floating_point() and (part == "all" or re.search(ARCHITECTURES[name].encoder, ours))
    }
    found = _match(wanted, given, _released(model))
    misfits = [
        f"{ours} is {tuple(given[theirs].shape)}, not {shape}"
        for ours, (theirs, shape) in found.items()
        if tuple(given[theirs].shape) != shape
    ]
    fitting = {o: t for o, (t, shape) in found.items() if tuple(given[t].shape) == shape}
    if not fitting:
        raise ModelError(
            f"{path}: none of its {len(given)} tensors belongs to the {part if part == 'encoder' else 'network'} of {name};"
            f" it has {_some(given)}, wanted are {_some(wanted)}" + (f"; {_some(misfits)}" if misfits else "")
        )
    with torch.no_grad():
        for ours, theirs in fitting.items():
            wanted[ours].copy_(in_our_layout(theirs, given[theirs], wanted[ours]))
    read = {theirs for theirs, _ in found.values()}
    return WarmStart(
        str(path),
        loaded=tuple(fitting),
        absent=tuple(sorted(wanted.keys() - found.keys())),
        misfits=tuple(misfits),
        unread=tuple(sorted(given.keys() - read)),
        num_values=sum(wanted[ours].numel() for ours in fitting),
        num_wanted=sum(tensor.numel() for tensor in wanted.values()),
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; pretrained weights are read from a local safetensors file") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: not a readable safetensors file: {error}") from error
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _released(model: nn.Module) -> dict[str, str]:
    """Released names by ours; none, if the network has no released counterpart."""
    try:
        return published_names(model)
    except ModelError:
        return {}


def _match(
    wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], released: Mapping[str, str]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the file, and shape that it must have there, of each tensor of ours that the file knows."""
    found = {}
    for ours, tensor in wanted.items():
        theirs = released.get(ours, ours)
        shapes = {
            ours: tuple(tensor.shape),
            theirs: released_shape(theirs, tensor),
            theirs.removeprefix("encoder."): released_shape(theirs, tensor),
        }
        name = next((candidate for candidate in shapes if candidate in given), None)
        if name is not None:
            found[ours] = name, shapes[name]
    return found


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
