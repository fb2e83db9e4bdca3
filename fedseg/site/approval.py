"""Which app bundles a hospital runs: those that somebody there has looked at and approved by their SHA-256.

A bundle is code of the coordinator that the SuperNode would run. The list lies in the kit as `approved.json`; the gate reads it
anew for every bundle that arrives, so an approval or its withdrawal counts at once for new runs.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, Field, TypeAdapter, ValidationError

from fedseg.app_bundle import LARGEST, bundle_digest, bundled_files
from fedseg.errors import KitError
from fedseg.federated.checkpoint import write_durably
from fedseg.sections import Section

FILE = "approved.json"


class Approval(Section):
    """One approved bundle."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the whole bundle."""
    approved: AwareDatetime
    """When."""
    by: str = ""
    """Who looked at it, as the hospital's user name."""
    name: str = ""
    """File that was looked at."""


_APPROVALS = TypeAdapter(list[Approval])


def read_bundle(path: Path) -> bytes:
    """A bundle from disk.

    Raises:
        KitError: it is missing, too large, or no bundle.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise KitError(f"{path}: has {path.stat().st_size} bytes; a bundle has {LARGEST} at most")
        bundle = path.read_bytes()
    except OSError as error:
        raise KitError(f"{path}: cannot be read: {error.strerror}; it comes with the kit as app.fab") from error
    bundled_files(bundle, str(path))
    return bundle


def approvals(folder: Path) -> list[Approval]:
    """What is approved; nothing if there is no list.

    Args:
        folder: of the kit.

    Raises:
        KitError: the list is damaged.
    """
    path = folder / FILE
    try:
        return _APPROVALS.validate_json(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValidationError) as error:
        raise KitError(
            f"{path}: is no list of approvals; remove it and approve again with `fedseg site approve`"
        ) from error


def is_approved(folder: Path, bundle: bytes) -> bool:
    """Whether these very bytes were approved; a damaged list approves nothing."""
    digest = bundle_digest(bundle)
    try:
        return any(approval.sha256 == digest for approval in approvals(folder))
    except KitError:
        return False


def approve(folder: Path, bundle: bytes, name: str, by: str) -> Approval:
    """Put a bundle on the list."""
    approval = Approval(sha256=bundle_digest(bundle), approved=datetime.now(UTC), by=by, name=name)
    others = [other for other in approvals(folder) if other.sha256 != approval.sha256]
    _write(folder, [*others, approval])
    return approval


def withdraw(folder: Path, sha256: str) -> Approval:
    """Take a bundle off the list; a run that it has started is not ended.

    Args:
        folder: of the kit.
        sha256: at least its first eight digits.

    Raises:
        KitError: no bundle, or more than one, begins so.
    """
    known = approvals(folder)
    meant = [approval for approval in known if approval.sha256.startswith(sha256.lower())]
    if len(sha256) < 8 or len(meant) != 1:
        raise KitError(
            f"{folder / FILE}: {len(meant)} approved bundles begin with {sha256!r}; approved are "
            f"{', '.join(approval.sha256[:16] for approval in known) or 'none'}"
        )
    _write(folder, [approval for approval in known if approval is not meant[0]])
    return meant[0]


def _write(folder: Path, known: list[Approval]) -> None:
    document = [approval.model_dump(mode="json") for approval in known]
    write_durably(folder / FILE, (json.dumps(document, indent=1) + "\n").encode())
