"""What a site trains on, file by file and without a pixel; and the digest of it that may leave.

The digest tells the study that a site's data have changed, and the site which data an old round was trained on. It must not
tell what the data are: whoever has a public file could compute its SHA-256 and look for it. So the digest is an HMAC, keyed
with a random salt that never leaves the site: without the salt, nobody can test a guess, be it one file or a whole public
data set. Persons are hashed with the salt too, since names and numbers are quickly guessed. The manifest itself holds salt
and case names, and stays at home.
"""

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from fedseg.data.cache import Cache
from fedseg.data.cohort import Case, Cohort
from fedseg.errors import ConfigError, DataError, ManifestError
from fedseg.federated.checkpoint import sync_directory, write_durably
from fedseg.sections import Section, validate_section
from fedseg.site.signature import is_signed, sign_bytes

NAMES_TOLD = 5
"""Cases that `changes` calls by name; of more it tells the number."""
_PURPOSE = b"fedseg data manifest 1\n"
"""In front of what is signed, so that the signature cannot stand under anything else."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileRecord(Section):
    """One file of a case."""

    kind: Literal["image", "label"]
    sha256: Digest | None
    """Of the content; None: the file is missing or cannot be read."""
    size: Annotated[int, Field(ge=0)]
    """In bytes."""


class CaseRecord(Section):
    """One case."""

    name: str
    """Known at home only."""
    person: Digest
    """Salted hash of whose case it is."""
    files: tuple[FileRecord, ...]
    """Images in the order of their channels, then the label."""


class Public(NamedTuple):
    """What may leave of a manifest."""

    site: str
    digest: str
    """Salted digest of everything."""
    cases: int
    persons: int
    missing: int
    """Files that are listed and cannot be read."""


class DataManifest(Section):
    """All cases of a site at one moment."""

    site: str
    salt: Digest
    """Random, made once; secret of the site."""
    cases: tuple[CaseRecord, ...]
    """By name."""

    def digest(self) -> str:
        """HMAC-SHA256 of the canonical document: another file, case, person or order of channels gives another one."""
        document = self.model_dump(mode="json", exclude={"salt"})
        return _hmac(self.salt, "manifest", json.dumps(document, sort_keys=True, separators=(",", ":")))

    def public(self) -> Public:
        """What may leave: a digest that cannot be tested against guesses, and counts."""
        persons = {case.person for case in self.cases}
        missing = sum(file.sha256 is None for case in self.cases for file in case.files)
        return Public(self.site, self.digest(), len(self.cases), len(persons), missing)


class _Saved(Section):
    """The file in which a manifest is kept."""

    format: Literal[1] = 1
    digest: Digest
    signature: Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$")]
    """By `sign`, in hexadecimal digits; empty: it was not signed."""
    manifest: DataManifest


def make_manifest(
    cohort: Cohort, site: str, state: Path, *, on_case: Callable[[int], None] = lambda _: None
) -> DataManifest:
    """List the files of a cohort. A file is read only if it is new, or another than it was by size, times or inode.

    Args:
        cohort: what lies in the site's folder.
        site: its name.
        state: folder in which the salt and the hashes of unchanged files are kept.
        on_case: called before each case with the number of cases so far (0, 1, ...); what it raises ends the work.

    Raises:
        DataError: the folder cannot be written.
    """
    salt, cache = _salt(state), Cache(state / "file-hashes")
    cases = sorted(cohort.cases, key=lambda case: case.name)
    records = []
    for done, case in enumerate(cases):
        on_case(done)
        records.append(_record(case, salt, cache))
    return DataManifest(site=site, salt=salt, cases=tuple(records))


def changes(old: DataManifest, new: DataManifest) -> list[str]:
    """What is different, for a person at the site; it names cases, so it stays there."""
    before, after = ({case.name: case for case in manifest.cases} for manifest in (old, new))
    gone, come = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    both = sorted(before.keys() & after.keys())
    contents = {before[name].files: name for name in gone if all(file.sha256 for file in before[name].files)}
    renamed = {name: contents.pop(after[name].files) for name in come if after[name].files in contents}
    told = [
        _told("added", [name for name in come if name not in renamed]),
        _told("removed", [name for name in gone if name not in renamed.values()]),
        _told("renamed", [f"{was} -> {name}" for name, was in renamed.items()]),
        _told("with other files", [name for name in both if before[name].files != after[name].files]),
    ]
    if old.salt == new.salt:
        told.append(_told("of another person", [name for name in both if before[name].person != after[name].person]))
    else:
        told.append("the salt is another one, so persons cannot be compared")
    if old.site != new.site:
        told.append(f"the site was called {old.site!r}, and is called {new.site!r}")
    counts = (("persons", old.public().persons, new.public().persons), ("missing files", _missing(old), _missing(new)))
    told += [f"{what}: {was}, now {now}" for what, was, now in counts if was != now]
    return [line for line in told if line]


def save(manifest: DataManifest, path: Path, signature: bytes = b"") -> None:
    """Write a manifest durably, for its owner only."""
    saved = _Saved(digest=manifest.digest(), signature=signature.hex(), manifest=manifest)
    write_durably(path, saved.model_dump_json(indent=1).encode() + b"\n", mode=0o600)


def load(path: Path) -> DataManifest:
    """Read a manifest.

    Raises:
        ManifestError: the file is missing or damaged.
    """
    return _saved(path).manifest


def load_signature(path: Path) -> bytes:
    """The signature that was saved with a manifest; empty: none was.

    Raises:
        ManifestError: the file is missing or damaged.
    """
    return bytes.fromhex(_saved(path).signature)


def sign(manifest: DataManifest, key_path: Path) -> bytes:
    """Sign what may leave of a manifest, with the site's private key.

    Raises:
        ConfigError: the file is missing or holds another kind of key.
    """
    return sign_bytes(_signed_bytes(manifest.public()), key_path)


def verify_signature(public: Public, signature: bytes, key_path: Path) -> None:
    """Check that a site has signed this.

    Args:
        public: what left of the manifest.
        signature: by `sign`.
        key_path: the site's certificate or public key.

    Raises:
        ManifestError: the signature is not of this manifest and this key.
        ConfigError: the file is missing or holds another kind of key.
    """
    if not is_signed(_signed_bytes(public), signature, key_path):
        raise ManifestError(
            f"the data manifest of {public.site!r} was not signed with the key of {key_path}, or was changed since"
        )


def _salt(state: Path) -> str:
    """The site's salt, made when first needed; of two processes that make one, the first wins."""
    path = state / "data-salt"
    try:
        if not path.exists():
            state.mkdir(parents=True, exist_ok=True, mode=0o700)
            aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            write_durably(aside, secrets.token_bytes(32).hex().encode() + b"\n", mode=0o600)
            try:
                os.link(aside, path)
            except FileExistsError:
                pass
            finally:
                aside.unlink()
            sync_directory(state)
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read or written: {error}") from error
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise DataError(f"{path}: must hold 64 hexadecimal digits; without it old and new manifests cannot be compared")
    return text


def _record(case: Case, salt: str, cache: Cache) -> CaseRecord:
    listed: Iterable[tuple[Literal["image", "label"], Path]] = [("image", path) for path in case.images]
    if case.label is not None:
        listed = [*listed, ("label", case.label)]
    files = tuple(_file(kind, path, cache) for kind, path in listed)
    name = case.name.encode(errors="surrogateescape").decode(errors="backslashreplace")  # files may have any name
    return CaseRecord(name=name, person=_hmac(salt, "person", case.person), files=files)


def _file(kind: Literal["image", "label"], path: Path, cache: Cache) -> FileRecord:
    try:
        return FileRecord(kind=kind, sha256=cache.digest(path), size=path.stat().st_size)
    except OSError:  # that one case will be quarantined; the others are still of use
        return FileRecord(kind=kind, sha256=None, size=0)


def _hmac(salt: str, purpose: str, text: str) -> str:
    message = f"{purpose}\0{text}".encode(errors="surrogateescape")
    return hmac.new(bytes.fromhex(salt), message, hashlib.sha256).hexdigest()


def _told(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else ""
    return f"{len(names)} case{'s'[: len(names) != 1]} {what}: {', '.join(names[:NAMES_TOLD])}{more}"


def _missing(manifest: DataManifest) -> int:
    return manifest.public().missing


def _saved(path: Path) -> _Saved:
    try:
        saved = validate_section(_Saved, path.read_text(encoding="utf-8"), source=str(path))
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such data manifest") from None
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ManifestError(f"{path}: not a readable data manifest: {error}") from error
    if saved.manifest.digest() != saved.digest:
        raise ManifestError(f"{path}: is damaged: its digest is not the one that was saved with it; remove it")
    return saved


def _signed_bytes(public: Public) -> bytes:
    document: Mapping[str, Any] = public._asdict()
    return _PURPOSE + json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
