"""A site's audit log: what was asked, what was decided and what left, one JSON object a line, each bound to the line before.

Every line holds the SHA-256 of the line before it, so nothing can be changed, removed, inserted or moved without breaking the
chain behind it. The end of the chain stands in a second file, `<log>.head`. Whoever can write both files can make up another
log; that is found by whoever noted a digest elsewhere and gives it to `fedseg.site.chain.verify`.

An append first writes to the head what line will follow, then the line, then that it is there, each synced. So after a crash
it is known whether the last line was being written, and what is left of a half-written one is kept aside and told of in the next
line. A log that ends in any other way than its head says is not continued.
"""

import fcntl
import glob
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedseg.errors import AuditError
from fedseg.federated.checkpoint import write_durably
from fedseg.federated.faults import reach
from fedseg.federated.messages import SiteUpdate
from fedseg.site.chain import GENESIS, LONGEST_LINE, Head, digest_of, head_path, read_head
from fedseg.site.chain import Entry as Entry
from fedseg.site.chain import Verdict as Verdict
from fedseg.site.chain import entries as entries
from fedseg.site.chain import verify as verify

LONGEST_TEXT = 1000
"""Characters of one text; of a longer one the log holds the beginning and the SHA-256."""
NAMES_LISTED = 24
"""Of a longer list of names the log holds so many, and the SHA-256 of all."""


class AuditLog:
    """The log of one site; several processes may append to it.

    Args:
        path: of the log; made when something is appended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, entry: Mapping[str, Any]) -> Entry:
        """Write an entry durably.

        Args:
            entry: JSON values; no text of a person or a peer needs to be shortened before.

        Raises:
            AuditError: it cannot be written, is no JSON or too long, or the log was changed since the last entry.
        """
        text = _as_json(self.path, entry)
        try:
            with self._locked() as log:
                return self._append(log, json.loads(text))
        except OSError as error:
            raise AuditError(
                f"{self.path}: cannot be written: {error}; nothing may leave the site that is not on record"
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[int]:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        while True:
            log = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(log, fcntl.LOCK_EX)
                status = os.fstat(log)
                if not self.path.exists() or not os.path.samestat(status, self.path.stat()):
                    continue  # somebody has moved the log away meanwhile
                if stat.S_IMODE(status.st_mode) != 0o600:
                    os.fchmod(log, 0o600)
                yield log
                return
            finally:
                os.close(log)

    def _append(self, log: int, entry: dict[str, Any]) -> Entry:
        head = self._settled(log)
        torn = tuple(self._torn_since(head.torn))
        made = Entry(head.seq + 1, datetime.now(UTC).isoformat(timespec="milliseconds"), head.digest, entry, torn)
        line = made.line()
        if len(line) > LONGEST_LINE:
            raise AuditError(
                f"{self.path}: an entry of {len(line)} bytes is too long; lines have {LONGEST_LINE} at most"
            )
        size = head.size + len(line)
        self._put_head(replace(head, next_digest=made.digest, next_size=size))
        reach("audit-announced")
        _write(log, line, head.size)
        reach("audit-written")
        self._put_head(Head(made.seq, made.digest, size, head.torn + len(torn)))
        reach("audit-confirmed")
        return made

    def _settled(self, log: int) -> Head:
        """The end of the log, after what a crash may have left behind."""
        for leftover in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.part"):
            leftover.unlink(missing_ok=True)  # of a process that was killed while it wrote
        size = os.fstat(log).st_size
        head = read_head(self.path)
        if head is None:
            if size:
                self._refuse(f"{head_path(self.path).name}, which says where it ends, is missing")
            return Head(0, GENESIS, 0)
        if size < head.size:
            self._refuse(f"it has {size} bytes, and had {head.size}")
        if head.size:
            before = os.pread(log, min(LONGEST_LINE + 1, head.size), max(0, head.size - LONGEST_LINE - 1))
            if not before.endswith(b"\n") or digest_of(before[before.rfind(b"\n", 0, -1) + 1 :]) != head.digest:
                self._refuse("its last line is not the one that was written")
        settled = replace(head, next_digest=None, next_size=None)
        if size == head.size:
            return settled
        if head.next_digest is None or head.next_size is None or size > head.next_size:
            self._refuse(f"it has {size} bytes, and had {head.size}")
        tail = os.pread(log, size - head.size, head.size)
        if tail.endswith(b"\n") and digest_of(tail) == head.next_digest:
            return replace(settled, seq=head.seq + 1, digest=head.next_digest, size=size)
        self._keep_aside(tail, head.torn)
        reach("audit-kept-aside")
        os.ftruncate(log, head.size)
        os.fsync(log)
        return settled

    def _keep_aside(self, tail: bytes, noted: int) -> None:
        number = noted + 1
        while self._torn(number).exists():
            if self._torn(number).read_bytes() == tail:
                return  # killed after it was kept aside, before it was cut off
            number += 1
        write_durably(self._torn(number), tail, mode=0o600)

    def _torn_since(self, noted: int) -> Iterator[dict[str, Any]]:
        """Half-written lines that were kept aside and are not yet told of."""
        number = noted + 1
        while (path := self._torn(number)).exists():
            data = path.read_bytes()
            yield {"file": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            number += 1

    def _torn(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.torn-{number}")

    def _put_head(self, head: Head) -> None:
        write_durably(head_path(self.path), head.to_json().encode(), mode=0o600)

    def _refuse(self, why: str) -> None:
        raise AuditError(
            f"{self.path}: was changed by something else: {why}. Run `fedseg site audit verify`, keep the log and its "
            ".head for whoever looks into it, and move both away to begin another one"
        )


def rounds_done(path: Path, experiment_digest: str) -> int:
    """How many requests of an experiment were answered.

    Raises:
        AuditError: a line cannot be read.
    """
    return sum(
        entry.entry.get("event") == "request"
        and entry.entry.get("decided") == "allowed"
        and entry.asked.get("experiment") == experiment_digest
        for entry in (entries(path, holding=experiment_digest.encode()) if path.exists() else ())
    )


def last_drift(path: Path) -> dict[str, Any] | None:
    """What the newest request found of the site's images, see `fedseg.drift.SiteDrift`; None if none has looked.

    Raises:
        AuditError: a line cannot be read.
    """
    found = None
    for entry in entries(path, holding=b'"drift"') if path.exists() else ():
        drift = entry.entry.get("drift")
        found = drift if isinstance(drift, dict) and "alarm" in drift else found
    return found


def what_left(update: SiteUpdate, payload_sha256: str, num_bytes: int) -> dict[str, Any]:
    """What an update told, without its values.

    Args:
        update: as it leaves.
        payload_sha256: of the message's bytes.
        num_bytes: of the message.
    """
    tensors = [[name, list(array.shape), str(array.dtype)] for name, array in sorted(update.delta.items())]
    return {
        "bytes": num_bytes,
        "sha256": payload_sha256,
        "num_cases": update.num_cases,
        "tensors": {
            "count": len(tensors),
            "bytes": sum(array.nbytes for array in update.delta.values()),
            "sha256": hashlib.sha256(json.dumps(tensors).encode()).hexdigest(),
            "first": [[name[:100], shape, kind] for name, shape, kind in tensors[:8]],
        },
        "sums": _names(update.sums),
        "training": _names(update.training),
        "quarantined": _names(update.quarantined),
        "fingerprint": {"cases": update.fingerprint.cases, "features": len(update.fingerprint.sums)}
        if update.fingerprint
        else None,
    }


def _names(names: Iterable[str]) -> list[str] | dict[str, Any]:
    listed = sorted(names)
    first = [name[:100] for name in listed[:NAMES_LISTED]]
    if first == listed:
        return first
    return {
        "count": len(listed),
        "sha256": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        "first": first,
    }


def _as_json(path: Path, entry: Mapping[str, Any]) -> str:
    try:
        return json.dumps(_shortened(dict(entry)))
    except (TypeError, ValueError, RecursionError) as error:
        raise AuditError(f"{path}: an entry must be made of JSON values: {error}") from error


def _shortened(value: Any) -> Any:
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        sha256 = hashlib.sha256(value.encode(errors="surrogatepass")).hexdigest()
        return f"{value[:100]}... ({len(value)} characters, SHA-256 {sha256})"
    if isinstance(value, Mapping):
        return {_shortened(key): _shortened(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shortened(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # a loss that is not finite is no JSON number
    return value


def _write(log: int, line: bytes, offset: int) -> None:
    while line:
        written = os.pwrite(log, line, offset)
        line, offset = line[written:], offset + written
    os.fsync(log)
