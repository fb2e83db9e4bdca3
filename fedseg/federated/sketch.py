"""How alike two updates are, told from a few thousand numbers of each: a count sketch.

Charikar, Chen, Farach-Colton, "Finding frequent items in data streams", ICALP 2002; as a way to keep inner products:
Weinberger et al., "Feature hashing for large scale multitask learning", ICML 2009. Every value gets a random sign and is added
to one of B buckets. Values of one row of B are never added to each other; each row begins at a random bucket, so that two
values of different rows are with probability 1/B. The inner product of two sketches is right in the mean, and its variance over
seeds is at most `(|x|^2 |y|^2 + (x.y)^2) / B`, as with independent buckets, for the signs are independent. Sketches are linear:
those of parallel updates have a cosine of 1.
"""

import math
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from fedseg.federated.rounds import derive_seed
from fedseg.federated.weights import FloatArray

BUCKETS = 8192
"""64 KiB for each site of a round. The standard error of a cosine is `sqrt(2 / BUCKETS)` = 0.016 at most, and 0.011 near zero."""
SIGN = np.uint32(1 << 31)
WORD = 32

Sketch = NDArray[np.float64]


def sketch(tensors: Mapping[str, FloatArray], leave_out: Collection[str] = ()) -> Sketch:
    """Sum up tensors in `BUCKETS` numbers, the same way wherever it is done.

    Args:
        tensors: an update, float32.
        leave_out: names of tensors that do not count.
    """
    buckets = np.zeros(BUCKETS)
    for name in sorted(tensors.keys() - set(leave_out)):
        _add(buckets, name, np.ascontiguousarray(tensors[name], np.float32).reshape(-1))
    return buckets


def cosine(one: Sketch, other: Sketch) -> float | None:
    """Cosine of the angle between two updates, in [-1, 1]; None if one of them is zero."""
    size = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return min(1.0, max(-1.0, float(one @ other) / size)) if 0 < size < math.inf else None


def _add(buckets: Sketch, name: str, flat: FloatArray) -> None:
    """Add a tensor row by row. A random word has the signs of one column in 32 rows, one bit each."""
    random = np.random.PCG64(derive_seed("sketch", name))
    begins = np.asarray(random.random_raw(-(-flat.size // BUCKETS))) % np.uint64(BUCKETS)
    signed = np.empty(min(BUCKETS, flat.size), np.uint32)
    for row, begin in enumerate(begins.tolist()):
        if row % WORD == 0:
            words = np.asarray(random.random_raw(BUCKETS // 2)).view(np.uint32)
        part = flat[row * BUCKETS : (row + 1) * BUCKETS]
        bits = signed[: part.size]
        np.left_shift(words[: part.size], np.uint32(row % WORD), out=bits)
        np.bitwise_and(bits, SIGN, out=bits)
        np.bitwise_xor(bits, part.view(np.uint32), out=bits)
        values, room = bits.view(np.float32), BUCKETS - begin
        buckets[begin : begin + part.size] += values[:room]
        buckets[: max(0, part.size - room)] += values[room:]
