"""Weights are a dict from tensor name to float32 array; this is their arithmetic."""

import hashlib
import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Weights = dict[str, FloatArray]
"""Tensors of a network, parameters and floating-point buffers, by their name in its state dict."""

CHUNK = 1 << 16
"""Elements per step of the loops over large arrays: small enough to stay in the processor's cache."""


def subtract(weights: Mapping[str, FloatArray], anchor: Mapping[str, FloatArray]) -> Weights:
    """The update of a site: `weights - anchor`, tensor by tensor."""
    return {name: weights[name] - anchor[name] for name in anchor}


def norm(weights: Mapping[str, FloatArray]) -> float:
    """L2 norm over all tensors, added up in the order of their names; NaN or infinite if any value is."""
    total = 0.0
    with np.errstate(over="ignore"):  # the result tells
        for name in sorted(weights):
            for chunk in chunks(weights[name].reshape(-1), 1 << 13):
                total += float(np.dot(chunk, chunk))
    return math.sqrt(total) if total >= 0 else math.nan


def num_bytes(weights: Mapping[str, FloatArray]) -> int:
    """Payload in bytes, without any framing."""
    return sum(array.nbytes for array in weights.values())


def digest(weights: Mapping[str, FloatArray]) -> str:
    """SHA-256 over names, shapes and bytes, in the order of the names."""
    state = hashlib.sha256()
    for name in sorted(weights):
        array = np.asarray(weights[name], order="C")
        state.update(f"{name}{array.dtype.str}{array.shape}".encode())
        state.update(array.data)
    return state.hexdigest()


def chunks(flat: FloatArray, size: int = CHUNK) -> Iterator[FloatArray]:
    """Views of `size` elements of a flat array; the last one may be shorter."""
    for start in range(0, flat.size, size):
        yield flat[start : start + size]
