"""Which tensors of a network a federation exchanges, and how they get out of it and back in.

All floating-point entries of the state dict travel, as float32: parameters, and buffers such as running means and
variances (leaving those out is the classic way to break a federation with BatchNorm). Integer buffers
(`num_batches_tracked`) stay at the site: a mean of counters has no meaning, and no forward pass reads them.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fedseg.errors import ModelError
from fedseg.federated.weights import FloatArray, Weights


def take_weights(model: nn.Module) -> Weights:
    """Copies of a network's exchanged tensors."""
    return {
        name: np.array(tensor.detach().cpu().float().numpy(), np.float32) for name, tensor in _exchanged(model).items()
    }


def put_weights(model: nn.Module, weights: Mapping[str, FloatArray]) -> None:
    """Overwrite a network's exchanged tensors.

    Raises:
        ModelError: names or shapes differ from the network's.
    """
    tensors = _exchanged(model)
    if tensors.keys() != weights.keys():
        raise ModelError(f"the weights are of another network: {sorted(tensors.keys() ^ weights.keys())[:4]} differ")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != weights[name].shape:
                raise ModelError(
                    f"the weights are of another network: {name} has shape {weights[name].shape}, not {tuple(tensor.shape)}"
                )
            tensor.copy_(torch.from_numpy(np.require(weights[name], requirements=["C", "W", "A"])))


def buffer_names(model: nn.Module) -> frozenset[str]:
    """Names of exchanged tensors that are no parameters."""
    return frozenset(_exchanged(model)) - {name for name, _ in model.named_parameters()}


def anchor_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters: the point to which FedProx pulls."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _exchanged(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
