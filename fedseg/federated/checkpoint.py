"""A `ServerState` on disk: tensors and a JSON header in one safetensors file, written aside, synced and renamed."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedseg.errors import StoreError
from fedseg.federated.faults import reach
from fedseg.federated.rounds import ServerState
from fedseg.federated.weights import Weights

FORMAT = 1


def save_state(path: Path, state: ServerState) -> str:
    """Write a state durably.

    Args:
        path: the final name; it appears complete or not at all.
        state: what to write.

    Returns:
        SHA-256 of the file.
    """
    header = {
        "format": FORMAT,
        "experiment_digest": state.experiment_digest,
        "server_round": state.server_round,
        "buffers": sorted(state.buffers),
        "norms": [value.hex() for value in state.norms],
    }
    tensors = {f"weights/{name}": np.asarray(array, order="C") for name, array in state.weights.items()}
    for kind, moment in state.moments.items():
        tensors |= {f"{kind}/{name}": np.asarray(array, order="C") for name, array in moment.items()}
    data = save_tensors(tensors, metadata={"fedseg": json.dumps(header)})
    reach("checkpoint-begun")
    write_durably(path, data)
    reach("checkpoint-renamed")
    return hashlib.sha256(data).hexdigest()


def load_state(path: Path, sha256: str | None = None) -> ServerState:
    """Read a state.

    Args:
        path: a file of `save_state`.
        sha256: what it must hash to, if known.

    Raises:
        StoreError: the file is missing, damaged or something else.
    """
    try:
        data = path.read_bytes()
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise StoreError(f"{path}: is damaged: its SHA-256 is not the one in the run store")
        size = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["fedseg"])
        groups: dict[str, Weights] = {}
        for name, array in load_tensors(data).items():
            kind, _, tensor = name.partition("/")
            groups.setdefault(kind, {})[tensor] = array
        if header["format"] != FORMAT:
            raise StoreError(
                f"{path}: checkpoint format {header['format']} is not {FORMAT}; use the release that wrote it"
            )
        return ServerState(
            experiment_digest=header["experiment_digest"],
            server_round=header["server_round"],
            weights=groups.pop("weights", {}),
            buffers=frozenset(header["buffers"]),
            moments=groups,
            norms=tuple(float.fromhex(value) for value in header["norms"]),
        )
    except FileNotFoundError:
        raise StoreError(f"{path}: no such checkpoint") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: not a readable checkpoint: {type(error).__name__}: {error}") from error


def write_durably(path: Path, data: bytes) -> None:
    """Write a file aside, sync it, and rename it into place; a crash leaves the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    reach("checkpoint-written")
    aside.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
