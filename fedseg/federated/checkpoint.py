"""A `ServerState` on disk: tensors and a JSON header in one safetensors file, written aside, synced and renamed."""

import hashlib
import os
from pathlib import Path

from fedseg.errors import StoreError
from fedseg.federated.document import Buffer, pack, unpack
from fedseg.federated.faults import reach
from fedseg.federated.fingerprint import Fingerprint
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
        "private": sorted(state.private),
        "norms": [value.hex() for value in state.norms],
        "fingerprint": state.fingerprint.to_dict(),
    }
    groups = {"weights": state.weights, **state.moments}
    tensors = {f"{kind}/{name}": array for kind, group in groups.items() for name, array in group.items()}
    buffers = pack(tensors, header)
    sha256 = hashlib.sha256()
    for buffer in buffers:
        sha256.update(buffer)
    reach("checkpoint-begun")
    write_durably(path, *buffers)
    reach("checkpoint-renamed")
    return sha256.hexdigest()


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
        header, tensors = unpack(data)
        groups: dict[str, Weights] = {}
        for name, array in tensors.items():
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
            private=frozenset(header.get("private", ())),  # a checkpoint from before there were any has none
            moments=groups,
            norms=tuple(float.fromhex(value) for value in header["norms"]),
            fingerprint=Fingerprint.from_dict(header.get("fingerprint", {})),
        )
    except FileNotFoundError:
        raise StoreError(f"{path}: no such checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: not a readable checkpoint: {type(error).__name__}: {error}") from error


def write_durably(path: Path, *buffers: Buffer, mode: int = 0o666) -> None:
    """Write a file aside, sync it, and rename it into place; a crash leaves the old file or the new one.

    Args:
        path: the final name.
        buffers: what to write, one after the other.
        mode: permissions, from which the process's mask is taken away.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.unlink(missing_ok=True)  # of a killed process with the same number, perhaps with other permissions
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.writelines(buffers)
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
