"""What the server and a site say to each other, and the bytes that carry it.

Bytes are one safetensors document: tensors, and everything else in its JSON header; see `fedseg.federated.document`.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from fedseg import __version__
from fedseg.errors import MessageError
from fedseg.federated.document import Buffer, pack, unpack
from fedseg.federated.fingerprint import UNKNOWN, Fingerprint
from fedseg.federated.weights import Weights

FORMAT = 3
LONGEST_NAME = 200
LARGEST_COUNT = 10**9
CONTROL = "control/"
"""Begins the names of the tensors of `RoundInstructions.control`."""


@dataclass(frozen=True)
class RoundInstructions:
    """What the server asks of a site."""

    server_round: int
    """1, 2, ...; the round that this training is part of. The weights are those of round `server_round - 1`."""
    weights: Weights
    """Global weights, from which the site starts; of private tensors the initial values, for a site that has none yet."""
    experiment: str
    """The experiment as JSON; validated again by the site."""
    train: bool = True
    """False: only score the weights."""
    evaluate: bool = True
    """Score the weights on the validation cases before training."""
    surface: bool = False
    """Score with surface metrics too."""
    fingerprint: Fingerprint = UNKNOWN
    """What the federation's images look like; empty where sites do not tell. A request that neither trains nor evaluates asks for
    the site's own, and has no weights."""
    control: Weights = field(default_factory=dict)
    """SCAFFOLD's control of the server, of parameters only; empty without it, and before round 2."""

    def encode(self) -> bytes:
        """The message as bytes."""
        return b"".join(self.buffers())

    def buffers(self) -> list[Buffer]:
        """The bytes of `encode` in pieces that share memory with the tensors."""
        control = {CONTROL + name: array for name, array in self.control.items()}
        return _buffers("instructions", self.header(), self.weights | control)

    def header(self) -> dict[str, Any]:
        """Everything but the tensors."""
        header = {key: value for key, value in vars(self).items() if key not in ("weights", "control")}
        return header | {"fingerprint": self.fingerprint.to_dict()}

    @classmethod
    def decode(cls, data: Buffer) -> Self:
        """Read the bytes of `encode`; the tensors are views of them.

        Raises:
            MessageError: they are not such a message.
        """
        header, tensors = _decode("instructions", data)
        return cls.from_parts(header, tensors)

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Weights) -> Self:
        """Join header and tensors; the header's types are checked.

        Raises:
            MessageError: a field is missing, unknown or of the wrong type.
        """
        types: dict[str, type] = {
            "server_round": int,
            "experiment": str,
            "train": bool,
            "evaluate": bool,
            "surface": bool,
        }
        types |= {"fingerprint": dict}
        _check_fields("instructions", header, types)
        _check_count("instructions", "server_round", header["server_round"])
        weights = {name: array for name, array in tensors.items() if not name.startswith(CONTROL)}
        control = {name.removeprefix(CONTROL): array for name, array in tensors.items() if name.startswith(CONTROL)}
        return cls(weights=weights, control=control, **{**header, "fingerprint": _fingerprint("instructions", header)})


@dataclass(frozen=True)
class SiteUpdate:
    """What leaves a site: a delta, counts and sums. Never a case id, a path or a per-case value."""

    site: str
    """Name of the site."""
    server_round: int
    """The round that was asked for."""
    delta: Weights
    """Trained minus received weights, without private tensors; empty when the site only scored."""
    num_cases: int
    """Training cases that were really used: the weight in the mean."""
    sums: dict[str, float] = field(default_factory=dict)
    """Additive sums and counts of metrics over the validation cases."""
    training: dict[str, float] = field(default_factory=dict)
    """Figures of the local training: loss, steps, seconds."""
    quarantined: dict[str, int] = field(default_factory=dict)
    """Number of cases that could not be used, by reason code."""
    manifest: str = ""
    """Digest of the site's data manifest; another one means that the site's data have changed. Empty: the site keeps none."""
    fingerprint: Fingerprint = UNKNOWN
    """Sums of label-free statistics over the training images, where it was asked for."""

    def encode(self) -> bytes:
        """The message as bytes."""
        return b"".join(self.buffers())

    def buffers(self) -> list[Buffer]:
        """The bytes of `encode` in pieces that share memory with the tensors."""
        return _buffers("update", self.header(), self.delta)

    def header(self) -> dict[str, Any]:
        """Everything but the tensors."""
        header = {key: value for key, value in vars(self).items() if key != "delta"}
        return header | {"fingerprint": self.fingerprint.to_dict()}

    @classmethod
    def decode(cls, data: Buffer) -> Self:
        """Read the bytes of `encode`; the tensors are views of them.

        Raises:
            MessageError: they are not such a message.
        """
        header, tensors = _decode("update", data)
        return cls.from_parts(header, tensors)

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Weights) -> Self:
        """Join header and tensors; the header's types are checked.

        Raises:
            MessageError: a field is missing, unknown or of the wrong type.
        """
        types = {
            "site": str,
            "server_round": int,
            "num_cases": int,
            "sums": dict,
            "training": dict,
            "quarantined": dict,
            "manifest": str,
            "fingerprint": dict,
        }
        _check_fields("update", header, types)
        for key in ("server_round", "num_cases"):
            _check_count("update", key, header[key])
        numbers = {key: _numbers(key, header[key]) for key in ("sums", "training")}
        for reason, count in header["quarantined"].items():
            if not _is_name(reason) or type(count) is not int or not 0 <= count <= LARGEST_COUNT:
                raise MessageError("update: quarantined must map reasons to counts")
        if not _is_name(header["site"]):
            raise MessageError("update: site must be a short printable name")
        if not re.fullmatch(r"(?:[0-9a-f]{64})?", header["manifest"]):
            raise MessageError("update: manifest must be empty or 64 hexadecimal digits")
        return cls(delta=tensors, **{**header, **numbers, "fingerprint": _fingerprint("update", header)})


@dataclass(frozen=True)
class SiteFailure:
    """A site that was asked and gave no update."""

    site: str
    server_round: int
    kind: Literal["abstained", "failed", "late", "refused"]
    """`abstained` by its own decision, `failed` with an error, `late` after the deadline, `refused` by screening."""
    reason: str
    """A code or an error's class name; never an error's text."""

    def header(self) -> dict[str, Any]:
        """All fields, for the wire."""
        return asdict(self)


Answer = SiteUpdate | SiteFailure


def _buffers(kind: str, header: Mapping[str, Any], tensors: Weights) -> list[Buffer]:
    return pack(tensors, {"format": FORMAT, "version": __version__, "kind": kind, **header})


def _decode(kind: str, data: Buffer) -> tuple[dict[str, Any], Weights]:
    try:
        document, tensors = unpack(data)
    except ValueError as error:
        raise MessageError(f"not a fedseg message: {error}") from error
    if document.pop("kind", None) != kind:
        raise MessageError(f"expected a message of kind {kind!r}")
    if document.pop("format", None) != FORMAT:
        raise MessageError(f"message format is not {FORMAT}; both ends need the same fedseg release")
    document.pop("version", None)
    return document, tensors


def _numbers(key: str, values: Mapping[str, Any]) -> dict[str, float]:
    for name, value in values.items():
        if not _is_name(name) or type(value) not in (int, float):
            raise MessageError(f"update: {key} must map short printable names to numbers")
    try:
        return {name: float(value) for name, value in values.items()}
    except OverflowError:
        raise MessageError(f"update: a number in {key} is too large") from None


def _fingerprint(kind: str, header: Mapping[str, Any]) -> Fingerprint:
    try:
        return Fingerprint.from_dict(header["fingerprint"])
    except (ValueError, OverflowError) as error:
        raise MessageError(f"{kind}: fingerprint: {error}") from None


def _is_name(value: str) -> bool:
    """Whether a name from outside can go into a log, a table and a database."""
    return 0 < len(value) <= LONGEST_NAME and value.isprintable()


def _check_fields(kind: str, header: Mapping[str, Any], types: Mapping[str, type]) -> None:
    if set(header) != set(types):
        wrong = sorted(set(header) ^ set(types))
        raise MessageError(f"{kind}: fields {[name[:LONGEST_NAME] for name in wrong[:8]]} are missing or unknown")
    for key, expected in types.items():
        if type(header[key]) is not expected:
            raise MessageError(f"{kind}: {key} must be {expected.__name__}, got {type(header[key]).__name__}")


def _check_count(kind: str, key: str, value: int) -> None:
    """Rounds and cases are counted in small numbers; a database, a file name or a power would stumble over others."""
    if not 0 <= value <= LARGEST_COUNT:
        raise MessageError(f"{kind}: {key} must be between 0 and {LARGEST_COUNT}")
