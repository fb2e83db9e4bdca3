"""Tensors and a JSON header as one safetensors document, written and read without copying the tensors.

The format is that of the safetensors library (a length, a JSON table, the tensors' bytes one after the other), which reads
what this module writes and the other way round. The library copies every tensor twice on the way out and once on the way
in; with ten sites of 10 MB that was most of a round without training. Nothing is ever unpickled.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = Mapping[str, NDArray[Any]]
Buffer = bytes | bytearray | memoryview

KEY = "fedseg"
LARGEST_TABLE = 16_000_000
"""Bytes; parsed, a table takes some twenty times as much. A network of 10,000 tensors needs 1 MB."""
MOST_AXES = 32
"""Of one tensor: the product of a hundred thousand lengths would be computed for hours."""
_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}


def pack(tensors: Tensors, header: Mapping[str, Any]) -> list[Buffer]:
    """The document as buffers, to be written one after the other; they share memory with the tensors.

    Args:
        tensors: by name; the document does not depend on their order or strides.
        header: a JSON object, kept under `KEY` in the file's metadata.
    """
    table: dict[str, Any] = {"__metadata__": {KEY: json.dumps(header, sort_keys=True)}}
    buffers: list[Buffer] = []
    end = 0
    # wide types first, so that every tensor begins at a multiple of its item size
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        array = np.asarray(tensors[name], order="C")
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        begin, end = end, end + array.nbytes
        table[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
        buffers.append(array.reshape(-1).view(np.uint8).data)
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *buffers]


def unpack(data: Buffer) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read a document; the tensors are views of `data`.

    Raises:
        ValueError: it is no such document: no table, unknown types, or tensors that overlap, leave gaps or reach beyond
            the end.
    """
    view = memoryview(data)
    size = int.from_bytes(view[:8], "little")
    if len(view) < 8 or size > min(LARGEST_TABLE, len(view) - 8):
        raise ValueError("the table is cut short")
    try:
        table = json.loads(bytes(view[8 : 8 + size]))
        header = json.loads(table.pop("__metadata__")[KEY])
        places = {name: (_TYPES[entry["dtype"]], *_place(entry)) for name, entry in table.items()}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the table is not one of tensors: {type(error).__name__}") from error
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    end, tensors = 0, {}
    for name, (kind, shape, begin, stop) in sorted(places.items(), key=lambda item: item[1][2:]):
        count = math.prod(shape)
        if begin != end or stop - begin != count * np.dtype(kind).itemsize:
            raise ValueError(f"the bytes of {name!r} are not where they should be")
        end = stop
        if 8 + size + end > len(view):
            raise ValueError("tensors are cut short")
        tensors[name] = np.frombuffer(view, kind, count, 8 + size + begin).reshape(shape)
    if 8 + size + end != len(view):
        raise ValueError("there are bytes behind the last tensor")
    return header, tensors


def _place(entry: Mapping[str, Any]) -> tuple[tuple[int, ...], int, int]:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if len(shape) > MOST_AXES:
        raise ValueError(f"a tensor has {len(shape)} axes, there can be {MOST_AXES}")
    if any(type(number) is not int or not 0 <= number < 2**62 for number in (begin, end, *shape)):
        raise ValueError("shapes and offsets must be whole numbers")
    return shape, begin, end
