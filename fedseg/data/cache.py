"""Prepared arrays on disk, memory-mapped: found by content, whole or not there, checked when first opened.

An entry is a folder of `.npy` files with an `entry.json` that holds their checksums and its own. It is written aside
and renamed, so two processes may prepare the same case at once and a killed one leaves nothing half-written. Names in
the cache are hashes: it holds images, but no path and no case name.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedseg.errors import DataError

_ASIDE = ".aside-"
_ABANDONED_AFTER = 24 * 3600.0
_CHUNK = 1 << 22

_verified: dict[Path, tuple[int, int]] = {}
"""Size and modification time of the files whose checksum this process has already verified."""
lookups: Counter[Literal["hit", "miss"]] = Counter()
"""What came of looking for entries in this process."""


@dataclass(frozen=True)
class Entry:
    """One prepared case as it was stored."""

    arrays: dict[str, NDArray[Any]]
    """Read-only memory maps by name."""
    about: dict[str, Any]
    """What was stored beside the arrays; JSON values."""


class Cache:
    """A folder of entries.

    Args:
        root: the folder; created where missing.

    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with _storage_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            self._sweep()

    def load(self, key: str) -> Entry | None:
        """The entry, or None where there is none or it is damaged (which removes it); counted in `lookups`."""
        entry = self.open(key)
        lookups["miss" if entry is None else "hit"] += 1
        return entry

    def open(self, key: str) -> Entry | None:
        """Like `load`, uncounted: for what was just saved."""
        folder = self._folder(key)
        try:
            crc, document = (folder / "entry.json").read_bytes().split(b"\n", 1)
            if int(crc) != zlib.crc32(document):
                raise ValueError(f"{folder}: wrong checksum of entry.json")
            stored = json.loads(document)
            arrays = {name: _open(folder / f"{name}.npy", check) for name, check in stored["arrays"].items()}
            return Entry(arrays, dict(stored["about"]))
        except FileNotFoundError:
            if not folder.exists():
                return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
            pass
        self._remove(folder)
        return None

    def save(self, key: str, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
        """Store an entry; where another process was quicker, its entry stays.

        Raises:
            DataError: the disk is full or cannot be written.
        """
        folder = self._folder(key)
        with _storage_errors(self.root):
            aside = self.root / f"{_ASIDE}{uuid.uuid4().hex}"
            aside.mkdir()
            try:
                checks = {}
                for name, array in arrays.items():
                    np.save(aside / f"{name}.npy", np.ascontiguousarray(array), allow_pickle=False)
                    checks[name] = {"size": (aside / f"{name}.npy").stat().st_size, "crc": _crc(aside / f"{name}.npy")}
                document = json.dumps({"about": dict(about), "arrays": checks}, sort_keys=True).encode()
                (aside / "entry.json").write_bytes(b"%d\n" % zlib.crc32(document) + document)
                folder.parent.mkdir(exist_ok=True)
                try:
                    aside.rename(folder)
                except OSError:
                    if not folder.is_dir():
                        raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)

    def digest(self, path: Path) -> str:
        """SHA-256 of a file's content, remembered by the file's place, size and times."""
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        note = self.root / "digests" / hashlib.sha256(os.fsencode(path.absolute())).hexdigest()
        try:
            known = json.loads(note.read_bytes())
            if known["stamp"] == stamp:
                return str(known["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        with _storage_errors(self.root):
            note.parent.mkdir(exist_ok=True)
            aside = note.with_name(f"{_ASIDE}{uuid.uuid4().hex}")
            aside.write_text(json.dumps({"stamp": stamp, "sha256": digest}), encoding="utf-8")
            aside.replace(note)
        return digest

    def _folder(self, key: str) -> Path:
        return self.root / key[:2] / key

    def _remove(self, folder: Path) -> None:
        aside = self.root / f"{_ASIDE}{uuid.uuid4().hex}"
        try:
            folder.rename(aside)
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataError(f"{self.root}: a damaged cache entry cannot be removed: {error}") from error
        shutil.rmtree(aside, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what killed processes left behind, old enough to be nobody's."""
        for aside in [*self.root.glob(f"{_ASIDE}*"), *self.root.glob(f"digests/{_ASIDE}*")]:
            try:
                abandoned = time.time() - aside.stat().st_mtime > _ABANDONED_AFTER
            except FileNotFoundError:
                continue
            if abandoned and aside.is_dir():
                shutil.rmtree(aside, ignore_errors=True)
            elif abandoned:
                aside.unlink(missing_ok=True)


def _open(path: Path, check: dict[str, int]) -> NDArray[Any]:
    """Map an array after checking its size, and its checksum unless this process has done so before."""
    status = path.stat()
    stamp = (status.st_size, status.st_mtime_ns)
    if status.st_size != check["size"]:
        raise ValueError(f"{path}: {status.st_size} bytes, must be {check['size']}")
    if _verified.get(path) != stamp:
        if _crc(path) != check["crc"]:
            raise ValueError(f"{path}: wrong checksum")
        _verified[path] = stamp
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


@contextmanager
def _storage_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{root}: the cache cannot be written: {error}") from error
