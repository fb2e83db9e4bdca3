"""Which tensors of a network a federation exchanges, and how they get out of it and back in.

A network's weights are all floating-point entries of its state dict, as float32: parameters, and buffers such as running
means and variances (leaving those out is the classic way to break a federation with BatchNorm). Integer buffers
(`num_batches_tracked`) stay at the site: a mean of counters has no meaning, and no forward pass reads them.

`federation.exchange` says which weights the sites train together. The others are private: every site has its own, and no
update carries them. `all-but-norms` is FedBN (Li et al., arXiv 2102.07623), here for every kind of normalisation layer;
`all-but-statistics` is SiloBN (Andreux et al., arXiv 2008.07424): running statistics are a site's own, affine parameters
are shared. With `decoder`, each site has an encoder of its own.
"""

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fedseg.config import Exchange
from fedseg.errors import ModelError
from fedseg.federated.weights import FloatArray, Weights
from fedseg.layers.norm import InstanceNorm

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, InstanceNorm)
"""Normalisation layers, PyTorch's (which MONAI uses too) and ours; batch and instance norms have a base class in common."""


def take_weights(model: nn.Module) -> Weights:
    """Copies of a network's weights."""
    return {
        name: np.array(tensor.detach().cpu().float().numpy(), np.float32) for name, tensor in _floating(model).items()
    }


def put_weights(model: nn.Module, weights: Mapping[str, FloatArray]) -> None:
    """Overwrite a network's weights.

    Raises:
        ModelError: names, shapes or types differ from the network's.
    """
    check_weights(model, weights)
    with torch.no_grad():
        for name, tensor in _floating(model).items():
            tensor.copy_(torch.from_numpy(np.require(weights[name], requirements=["C", "W", "A"])))


def check_weights(model: nn.Module, weights: Mapping[str, FloatArray]) -> None:
    """Check that weights are those of a network, which may be one without memory (on the device `meta`).

    Raises:
        ModelError: names, shapes or types differ from the network's.
    """
    tensors = _floating(model)
    if tensors.keys() != weights.keys():
        differ = [name[:100] for name in sorted(tensors.keys() ^ weights.keys())[:4]]
        raise ModelError(f"the weights are of another network: {differ} differ")
    for name, tensor in tensors.items():
        array = weights[name]
        if array.shape != tuple(tensor.shape):
            raise ModelError(
                f"the weights are of another network: {name} has shape {array.shape}, not {tuple(tensor.shape)}"
            )
        if array.dtype != np.float32:
            raise ModelError(f"the weights are of another network: {name} is {array.dtype}, not float32")


def buffer_names(model: nn.Module) -> frozenset[str]:
    """Names of weights that are no parameters."""
    return frozenset(_floating(model)) - {name for name, _ in model.named_parameters()}


def private_names(model: nn.Module, exchange: Exchange, encoder: str) -> frozenset[str]:
    """Names of the weights that stay at each site.

    Args:
        model: the network.
        exchange: `federation.exchange`.
        encoder: regular expression for the names of its encoder's tensors.
    """
    if exchange == "all":
        return frozenset()
    if exchange == "decoder":
        return frozenset(name for name in _floating(model) if re.search(encoder, name))
    if exchange == "all-but-statistics":
        return buffer_names(model)
    norms = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules(
            remove_duplicate=False
        )  # a state dict names a shared layer twice, too
        if isinstance(module, NORMS)
        for name in module.state_dict()
    }
    return frozenset(_floating(model)) & norms


def anchor_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters: the point to which FedProx pulls."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _floating(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
