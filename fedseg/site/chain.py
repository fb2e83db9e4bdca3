"""The chain of an audit log: its lines, its end, and whether anything in between was changed.

Reading streams: memory does not grow with the log, whatever is in the file.
"""

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Self

from fedseg.errors import AuditError

GENESIS = "0" * 64
"""What the first line has in place of a digest of the line before it."""
LONGEST_LINE = 64 * 1024
"""Bytes of a line, its end included."""
LONGEST_HEAD = 4096

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """One line of a log."""

    seq: int
    """1, 2, ..."""
    time: str
    """When it was written, UTC, ISO 8601."""
    previous: str
    """SHA-256 of the line before."""
    entry: dict[str, Any]
    """What was to be written down."""
    torn: tuple[dict[str, Any], ...] = ()
    """Half-written lines that crashes left behind since the last entry: name, bytes and SHA-256 of the file with it."""

    @classmethod
    def parse(cls, line: bytes) -> Self:
        """Read a line.

        Raises:
            ValueError: it is none.
        """
        try:
            document = json.loads(line)
        except RecursionError:
            raise ValueError("too deeply nested") from None
        torn = document.pop("torn", []) if isinstance(document, dict) else None
        if torn is None or set(document) != {"seq", "time", "previous", "entry"}:
            raise ValueError("not an object with seq, time, previous and entry")
        if not isinstance(torn, list) or not all(isinstance(one, dict) for one in torn):
            raise ValueError("torn is not a list of objects")
        if type(document["seq"]) is not int or not isinstance(document["entry"], dict):
            raise ValueError("seq is not a whole number, or entry not an object")
        if not isinstance(document["previous"], str) or not _DIGEST.fullmatch(document["previous"]):
            raise ValueError("previous is not a SHA-256")
        if not isinstance(document["time"], str):
            raise ValueError("time is not a text")
        datetime.fromisoformat(document["time"])
        return cls(torn=tuple(torn), **document)

    def line(self) -> bytes:
        """The line, with its end."""
        document = asdict(self) | {"torn": list(self.torn)}
        if not self.torn:
            del document["torn"]
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"

    @property
    def digest(self) -> str:
        """SHA-256 of the line: what the next one holds as `previous`."""
        return digest_of(self.line())

    @property
    def asked(self) -> dict[str, Any]:
        """What was asked, if the entry is of a request."""
        asked = self.entry.get("asked")
        return asked if isinstance(asked, dict) else {}


@dataclass(frozen=True)
class Head:
    """The end of a log, and the line that is about to be written."""

    seq: int
    """Number of lines."""
    digest: str
    """SHA-256 of the last one."""
    size: int
    """Bytes of the log."""
    torn: int = 0
    """How many half-written lines entries have told of."""
    next_digest: str | None = None
    """SHA-256 of the line that is being written."""
    next_size: int | None = None
    """Bytes of the log with that line."""

    def to_json(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self)) + "\n"


@dataclass(frozen=True)
class Verdict:
    """What is known of a log after reading all of it."""

    entries: int
    """Lines that were followed; all, if there is no problem."""
    first: str | None
    """Time of the first of them."""
    last: str | None
    """Time of the last of them."""
    head: str
    """SHA-256 of the last of them: a person may note it elsewhere."""
    problem: str | None = None
    """What is wrong, in words; None: nothing."""
    line: int | None = None
    """Where."""


def verify(path: Path, expected_head: str | None = None) -> Verdict:
    """Read a whole log and check that it is as it was written.

    Args:
        path: of the log.
        expected_head: digest of one of its lines that somebody noted elsewhere, when it was the last one or at any time
            since; the log must hold that line.

    Raises:
        AuditError: there is no such log, or it cannot be read.
    """
    if expected_head is not None and not _DIGEST.fullmatch(expected_head):
        raise AuditError(f"expected head {expected_head!r} is not a SHA-256: 64 digits and letters a to f")
    if not path.exists() and head_path(path).exists():
        return Verdict(0, None, None, GENESIS, f"the log is missing; only {head_path(path).name} is there", 1)
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            size = file.seek(0, 2)
            head, fault = _head_or_fault(path)
            fcntl.flock(file, fcntl.LOCK_UN)  # what is appended from here on is not read
            file.seek(0)
            verdict, seen, tail = _follow(file, size, expected_head)
    except OSError as error:
        raise AuditError(f"{path}: cannot be read: {error}") from error
    if verdict.problem is None:
        problem, line = (fault, None) if fault else _compare_end(path, verdict, tail, head)
        if problem is None and not seen:
            problem, line = f"the log has no line with SHA-256 {expected_head}: it is another one, or was cut", None
        verdict = Verdict(verdict.entries, verdict.first, verdict.last, verdict.head, problem, line)
    return verdict


def entries(path: Path, *, holding: bytes = b"") -> Iterator[Entry]:
    """The entries of a log, unverified, one after the other; a half-written last line is left out.

    Args:
        path: of the log.
        holding: only lines with these bytes in them.

    Raises:
        AuditError: the log cannot be read, or a line is no entry.
    """
    number = 0
    try:
        with path.open("rb") as file:
            for line in _lines(file, file.seek(0, 2)):
                number += 1
                if holding in line and line.endswith(b"\n"):
                    yield Entry.parse(line)
    except OSError as error:
        raise AuditError(f"{path}: cannot be read: {error}") from error
    except ValueError as error:
        raise AuditError(f"{path}: line {number}: not an entry of an audit log: {error}") from error


def head_path(path: Path) -> Path:
    """The file that says where a log ends."""
    return path.with_name(f"{path.name}.head")


def read_head(path: Path) -> Head | None:
    """Where a log ends, by its head file; None without one.

    Raises:
        AuditError: the file is damaged.
    """
    file = head_path(path)
    try:
        with file.open("rb") as stream:
            document = json.loads(stream.read(LONGEST_HEAD))
        head = Head(**document)
        numbers = (head.seq, head.size, head.torn, head.next_size or 0)
        texts = (head.digest, head.next_digest or GENESIS)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a number is not one")
        if not all(isinstance(text, str) and _DIGEST.fullmatch(text) for text in texts):
            raise ValueError("a digest is not one")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise AuditError(f"{file}: not a readable head of an audit log: {error}") from error
    return head


def digest_of(line: bytes) -> str:
    """SHA-256 of a line without its end."""
    return hashlib.sha256(line.removesuffix(b"\n")).hexdigest()


def _head_or_fault(path: Path) -> tuple[Head | None, str | None]:
    try:
        return read_head(path), None
    except AuditError as error:
        return None, str(error)


def _lines(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Lines of the first `size` bytes; one that is too long comes in pieces that do not end."""
    file.seek(0)
    while size > 0 and (line := file.readline(min(size, LONGEST_LINE + 1))):
        size -= len(line)
        yield line


def _follow(file: BinaryIO, size: int, expected: str | None) -> tuple[Verdict, bool, bytes]:
    """Follow the chain to its end, whether the expected digest was met, and what stands behind the last whole line."""
    count, first, last, head, seen = 0, None, None, GENESIS, expected is None
    for line in _lines(file, size):
        problem, where = None, count + 1
        if len(line) > LONGEST_LINE:
            problem = f"is longer than {LONGEST_LINE} bytes"
        elif not line.endswith(b"\n"):
            return Verdict(count, first, last, head), seen, line
        else:
            try:
                entry = Entry.parse(line)
            except ValueError as error:
                problem = f"is not an entry: {error}"
            else:
                if entry.seq != count + 1:
                    problem = f"is entry {entry.seq}, where {count + 1} must stand: lines were removed, added or moved"
                elif entry.previous != head:
                    where = max(count, 1)
                    problem = f"is not the one that was written: line {count + 1} holds another SHA-256"
        if problem is not None:
            return Verdict(count, first, last, head, f"line {where} {problem}", where), seen, b""
        count, first, last, head = count + 1, first or entry.time, entry.time, digest_of(line)
        seen = seen or head == expected
    return Verdict(count, first, last, head), seen, b""


def _compare_end(path: Path, found: Verdict, tail: bytes, head: Head | None) -> tuple[str | None, int | None]:
    """What is wrong with the end of a log whose lines hold together, and where."""
    name, count = head_path(path).name, found.entries
    if head is None:
        whole = not found.entries and not tail  # killed before anything was written
        return (None, None) if whole else (f"{name}, which says where the log ends, is missing", None)
    ends = (head.seq, head.digest) == (count, found.head)
    announced = head.next_digest is not None
    if tail and ends and announced:
        return f"line {count + 1} is half-written: a crash; the next entry will keep it aside and tell of it", count + 1
    if tail:
        return f"line {count + 1} is incomplete, and {name} knows of no crash", count + 1
    if ends or (announced and (head.seq + 1, head.next_digest) == (count, found.head)):
        return None, None
    if count < head.seq:
        return f"the log ends after line {count}, and had {head.seq}: lines are missing at its end", count + 1
    return f"line {max(count, 1)} is not the last one that {name} knows: it was changed or added", max(count, 1)
