"""The app bundle: the two thin programs that Flower ships to every site, as one file with one SHA-256.

In a checkout they are `server/` and `client/` beside the library; a wheel carries the same files as `fedseg_bundle/`. The same
files give the same bytes, so that what a hospital has approved is what the coordinator submits.
"""

import hashlib
import os
import re
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import fedseg
from fedseg.errors import KitError

LARGEST = 10_000_000
"""Bytes; Flower takes no larger ones."""
MOST_FILES = 1000
_NAME = re.compile(r"(?!.*(?:^|/)\.{1,2}(?:/|$))[\w.+-]+(?:/[\w.+-]+)*", re.ASCII)
"""Relative, without detours, and shown as it is."""
_TEXTS = (".py", ".toml", ".md", ".txt", "LICENSE", ".info/CONTENT")
"""What a person can read; Python would prefer compiled code in `__pycache__` to the source beside it."""


@dataclass(frozen=True)
class BundledFile:
    """A file of a bundle."""

    name: str
    size: int
    sha256: str


def app_bundle() -> bytes:
    """Build the bundle of this installation.

    Raises:
        KitError: the programs are not there.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    from flwr.cli.build import build_fab_from_disk

    package = Path(fedseg.__file__).parent
    for root in (package.parent, package.parent / "fedseg_bundle"):
        if (root / "client" / "app.py").is_file() and (root / "pyproject.toml").is_file():
            return bytes(build_fab_from_disk(root))
    raise KitError(f"{package}: this installation holds no app bundle; give one with --app, or install fedseg anew")


def bundle_digest(bundle: bytes) -> str:
    """SHA-256 in hexadecimal digits: the name under which a hospital approves a bundle."""
    return hashlib.sha256(bundle).hexdigest()


def bundled_files(bundle: bytes, source: str) -> list[BundledFile]:
    """What is in a bundle; nothing of it is run or unpacked to disk.

    Raises:
        KitError: it is no bundle, a file in it is absurdly large, or a name in it hides or repeats what a reader is shown.
    """
    try:
        with ZipFile(BytesIO(bundle)) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > 10 * LARGEST:
                raise KitError(
                    f"{source}: would unpack to more than {10 * LARGEST / 1e6:.0f} MB; it is no bundle of fedseg"
                )
            if {entry.compress_type for entry in entries} - {ZIP_STORED, ZIP_DEFLATED}:
                raise KitError(
                    f"{source}: is packed in a way whose memory cannot be limited; it is no bundle of fedseg"
                )
            _check_names([entry.orig_filename for entry in entries], source)
            return [_entry(archive, entry.filename) for entry in sorted(entries, key=lambda entry: entry.filename)]
    except (BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise KitError(f"{source}: not an app bundle (a zip file): {error}") from error


def read_bundled(bundle: bytes, name: str) -> str:
    """The text of one file of a bundle, for eyes: what a terminal would hide or obey is shown as an escape sequence."""
    with ZipFile(BytesIO(bundle)) as archive:
        text = archive.read(name).decode("utf-8", errors="backslashreplace").replace("\r\n", "\n")
    return "".join(
        char if char in "\n\t" or char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _check_names(names: list[str], source: str) -> None:
    """Who approves a bundle reads a list of its files: it must show all of them, each under its own name."""
    if len(names) > MOST_FILES:
        raise KitError(f"{source}: holds {len(names)} files; a bundle of fedseg holds a few, {MOST_FILES} at most")
    seen: set[str] = set()
    for name in names:
        if not _NAME.fullmatch(name):
            raise KitError(f"{source}: no file of a bundle has a name like {name[:100]!r}; do not run it")
        if not name.endswith(_TEXTS):
            raise KitError(f"{source}: {name} is no text that a person could read; do not run it")
        if name in seen:
            raise KitError(f"{source}: holds {name} more than once, of which only one would be shown; do not run it")
        seen.add(name)


def _entry(archive: ZipFile, name: str) -> BundledFile:
    content = archive.read(name)
    return BundledFile(name, len(content), hashlib.sha256(content).hexdigest())
