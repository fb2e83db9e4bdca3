"""Folders that appear complete or not at all: kits, their zips, and the authority."""

import contextlib
import fcntl
import glob
import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path

from fedseg.coordinator.authority import Authority
from fedseg.coordinator.ledger import document
from fedseg.errors import KitError
from fedseg.federated.checkpoint import sync_directory, write_durably
from fedseg.federated.faults import reach
from fedseg.kit import FILES, KEYS, FileEntry, KitConfig, Manifest, Role, parse_document

Content = bytes | Path
"""What a file is to hold: these bytes, or what another file holds."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second `fedseg provision` out of a folder, which is made if need be, for its owner only.

    Raises:
        KitError: another one is at work there, or the folder cannot be written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise KitError(f"{folder}: cannot be written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KitError(f"{folder}: another `fedseg provision` is at work there; wait until it has ended") from None
        yield
    finally:
        os.close(descriptor)


def write_folder(target: Path, files: Mapping[str, Content], private: Mapping[str, bytes]) -> None:
    """Write a folder aside, then put it in place of the old one, whose other files are kept.

    Args:
        target: the folder.
        files: its files, by name; for everybody's eyes.
        private: files for its owner's eyes only.
    """
    target.parent.mkdir(mode=0o700, exist_ok=True)
    aside = target.with_name(f".{target.name}.part")
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(mode=0o700)
    for name, content in files.items():
        _write_new(aside / name, content, 0o644)
    for name, key in private.items():
        _write_new(aside / name, key, 0o600)
    for folder in {(aside / name).parent for name in files} | {aside}:
        sync_directory(folder)
    reach("folder-written")
    old = _old(target)
    if target.exists():
        target.rename(old)
        reach("folder-moved")
    aside.rename(target)
    sync_directory(target.parent)
    reach("folder-in-place")
    if old.exists():
        _finish(old, target)


def recover(target: Path) -> None:
    """Undo or complete what a killed run left of a folder and its zip."""
    old, aside = _old(target), target.with_name(f".{target.name}.part")
    if old.exists():
        if target.exists():
            _finish(old, target)
        else:
            old.rename(target)
    if aside.exists():
        shutil.rmtree(aside)
    target.with_name(f".{target.name}.zip.part").unlink(missing_ok=True)


def remove_parts(folder: Path, names: Iterable[str]) -> None:
    """Remove what a killed run left of files that are written durably."""
    for name in names:
        path = folder / name
        for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            part.unlink()


def write_kit(
    target: Path,
    config: KitConfig,
    files: Mapping[str, Content],
    private: Mapping[str, bytes],
    loose: Mapping[str, bytes],
    authority: Authority,
    now: datetime,
) -> None:
    """Write a signed kit and its zip.

    Args:
        target: the kit's folder; the zip lies beside it.
        config: whose kit it is.
        files: what the manifest lists.
        private: the private keys, which it does not list.
        loose: files that the receiver edits, which it does not list.
        authority: signs.
        now: date of the manifest.
    """
    manifest = document(_manifest(config, files, now))
    signed = {**files, "manifest.json": manifest, "manifest.sig": authority.sign(manifest)}
    write_folder(target, {**signed, **loose}, private)
    write_zip(target)


def refresh_kit(
    target: Path, config: KitConfig, files: Mapping[str, Content], authority: Authority, now: datetime
) -> bool:
    """Bring the listed files of a kit in place up to date, and sign it anew if anything changed.

    Returns:
        Whether anything did.
    """
    remove_parts(target, (*files, "manifest.json", "manifest.sig"))
    wanted = _manifest(config, files, now)
    changed = [name for name, entry in wanted.files.items() if _sha256_or_none(target / name) != entry.sha256]
    for name in changed:
        content = files[name]
        write_durably(target / name, content if isinstance(content, bytes) else content.read_bytes())
    if not changed and _is_signed(target, wanted, authority):
        return False
    manifest = document(wanted)
    write_durably(target / "manifest.json", manifest)
    write_durably(target / "manifest.sig", authority.sign(manifest))
    write_zip(target)
    return True


def write_zip(folder: Path) -> None:
    """Pack the files of a kit, with their modes, into a zip beside it that only its owner can read."""
    target = folder.with_name(f"{folder.name}.zip")
    aside = target.with_name(f".{target.name}.part")
    aside.unlink(missing_ok=True)
    role: Role = "coordinator" if (folder / "server.crt").exists() else "site"
    manifest = parse_document(Manifest, (folder / "manifest.json").read_bytes(), folder / "manifest.json")
    names = [*manifest.files, *KEYS[role], "site.toml", "manifest.json", "manifest.sig"]
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.write(folder, folder.name)
            for name in names:
                if (folder / name).exists():
                    packed.write(folder / name, f"{folder.name}/{name}")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(target)
    sync_directory(target.parent)


def refresh_zip(folder: Path) -> None:
    """Pack a kit again if its zip, where there is one, holds another version of it."""
    packed = folder.with_name(f"{folder.name}.zip")
    if not packed.is_file() or not (folder / "manifest.json").is_file():
        return
    try:
        with zipfile.ZipFile(packed) as archive:
            current = archive.read(f"{folder.name}/manifest.json") == (folder / "manifest.json").read_bytes()
    except (zipfile.BadZipFile, KeyError):
        current = False
    if not current:
        write_zip(folder)


def _manifest(config: KitConfig, files: Mapping[str, Content], now: datetime) -> Manifest:
    assert set(FILES[config.role]) <= set(files)
    entries = {name: _entry(content) for name, content in sorted(files.items())}
    return Manifest(
        format=1,
        study=config.study,
        role=config.role,
        site=config.site,
        created=now.replace(microsecond=0),
        files=entries,
    )


def _entry(content: Content) -> FileEntry:
    if isinstance(content, bytes):
        return FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    with content.open("rb") as file:
        return FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=content.stat().st_size)


def _sha256_or_none(path: Path) -> str | None:
    return _entry(path).sha256 if path.is_file() else None


def _is_signed(target: Path, wanted: Manifest, authority: Authority) -> bool:
    try:
        content, signature = (target / "manifest.json").read_bytes(), (target / "manifest.sig").read_bytes()
    except FileNotFoundError:
        return False
    if authority.sign(content) != signature:  # Ed25519 signatures are repeatable
        return False
    manifest = parse_document(Manifest, content, target / "manifest.json")
    return manifest.model_copy(update={"created": wanted.created}) == wanted


def _write_new(path: Path, content: Content, mode: int) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, file)
        file.flush()
        os.fsync(file.fileno())


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _finish(old: Path, target: Path) -> None:
    """Move what a kit did not bring (approvals, state) from the old folder to the new one, then remove the old one."""
    ours = {name for names in FILES.values() for name in names} | {name for keys in KEYS.values() for name in keys}
    for path in old.iterdir():
        if path.name not in ours | {"manifest.json", "manifest.sig"} and not (target / path.name).exists():
            path.rename(target / path.name)
    shutil.rmtree(old)
