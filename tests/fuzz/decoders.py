"""Every decoder of bytes that others wrote, as a function from bytes: it reads them or raises a `FedsegError`.

`test_decoders.py` feeds them random and damaged input, `guided.py` what a coverage-guided search makes up.
"""

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError

from fedseg.app_bundle import bundled_files
from fedseg.config import Experiment, ScreeningConfig, parse_experiment
from fedseg.coordinator.ledger import Ledger
from fedseg.coordinator.state import read_status
from fedseg.coordinator.study import StudyConfig, read_public_key, read_request
from fedseg.errors import FedsegError, UpdateRefused
from fedseg.federated.messages import RoundInstructions, SiteFailure, SiteUpdate
from fedseg.federated.screening import screen, screen_scores
from fedseg.flower import pack_answer, read_answer
from fedseg.kit import KitConfig, Manifest, Roster, parse_document
from fedseg.members import read_who
from fedseg.sections import load_section
from fedseg.site.approval import approvals
from fedseg.site.chain import Entry, entries, read_head, verify
from fedseg.site.config import SiteConfig
from fedseg.site.manifest import load as load_manifest
from fedseg.site.pieces import cut, join
from fedseg.site.wire.site_pb2 import Piece

FOLDER = Path(tempfile.mkdtemp(prefix="fedseg-fuzz-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
WEIGHTS = {"conv": np.ones((4, 3), np.float32), "norm.running_var": np.ones(4, np.float32)}
SHA = "0" * 64
EXPERIMENT = {
    "name": "toy",
    "seed": 1,
    "task": {"name": "toy", "modality": "ct", "channels": ["image"], "labels": {"background": 0, "liver": 1}},
    "data": {"spacing": [2.0, 1.0, 1.0], "window": [-160.0, 240.0], "min_cases": 2},
    "model": {"name": "unet", "preset": "r0", "options": {"widths": [4, 8], "norm": "batch"}, "slices": 1},
    "training": {"patch_size": [8, 8, 8], "batch_size": 2, "steps_per_epoch": 3},
    "federation": {"rounds": 3, "screening": {"max_norm": 4.0}},
    "privacy": {"clip_norm": 1.0, "noise_multiplier": 0.5},
}
"""One that holds a little of everything."""
EXPERIMENT_TOML = b"""name = "toy"
task = { name = "toy", modality = "mr", labels = { background = 0, liver = 1 } }
[model]
name = "mlru++"
options = { base_width = 4, depths = [1, 1] }
[training]
patch_size = [16, 16, 16]
[federation]
rounds = 2
"""
SITE_TOML = b"""name = "Aare"
data = "/data"
threads = 2
[person]
kind = "pattern"
pattern = "(sub-[0-9]+)"
[policy]
hours = ["Mo-Fr 18:00-06:00"]
max_megabytes = 100.0
tensors = ["*"]
"""
STUDY_TOML = b"""name = "liver"
experiment = "experiment.toml"
[coordinator]
host = "fl.example.org"
port = 8443
names = ["127.0.0.1", "::1"]
[[sites]]
name = "Aare"
[[sites]]
name = "Elbe"
public_key = "elbe.pub"
"""
UPDATE = SiteUpdate(
    "Aare", 3, {name: 0.1 * array for name, array in WEIGHTS.items()}, 7,
    {"cases": 4.0, "dice/liver/sum": 2.5, "dice/liver/count": 4.0}, {"loss": 0.3}, {"missing-label": 1}, SHA,
)  # fmt: skip


UNSIGNED = {"request", "public-key", "ledger.json", "sites.json", "manifest.json", "data-manifest", "audit-log"}
"""Decoders whose seeds are refused at last, by a key, a signature or a digest in them that is none."""


@dataclass(frozen=True)
class Decoder:
    """One of them."""

    read: Callable[[bytes], object]
    """Reads bytes, or raises."""
    seeds: tuple[bytes, ...]
    """Input that is right, or nearly: what is damaged."""


def _instructions(data: bytes) -> None:
    parse_experiment(RoundInstructions.decode(data).experiment)


def _update(data: bytes) -> None:
    update = SiteUpdate.decode(data)
    with suppress(UpdateRefused):
        screen_scores(update, 3)
        screen(update, 3, WEIGHTS, [0.5], ScreeningConfig(), {"norm.running_var"})


def _record(data: bytes) -> None:
    """A reply of a node: its first bytes choose what kind of record carries the rest."""
    kind, rest = data[:1], data[1:]
    text = rest.decode("utf-8", "replace")
    content = {
        b"u": lambda: RecordDict({"update": _array("message", "uint8", (len(rest),), rest)}),
        b"s": lambda: RecordDict({"update": _array("message", text[:20], (len(rest) * 9, -1), rest)}),
        b"n": lambda: RecordDict({"update": _array(text[:50], "uint8", (len(rest),), rest)}),
        b"f": lambda: RecordDict({"failure": ConfigRecord({"kind": text[:9], "reason": text})}),
        b"c": lambda: RecordDict({"update": ConfigRecord({text[:9]: [text]}), "failure": ArrayRecord()}),
    }.get(kind, lambda: pack_answer(SiteFailure("Aare", 3, "failed", text)))()
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    answer = read_answer(Message(content, reply_to=Message(RecordDict(), 7, "train")), "Aare", 3)
    assert answer.site == "Aare"
    if isinstance(answer, SiteFailure):
        assert answer.reason.isprintable()
        assert 0 < len(answer.reason) <= 100


def _array(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> ArrayRecord:
    return ArrayRecord({name: Array(dtype=dtype, shape=shape, stype="fedseg", data=data)})


def _pieces(data: bytes) -> None:
    """Frames of protobuf, each behind its length in two bytes."""
    pieces = []
    while data:
        size = int.from_bytes(data[:2], "big")
        piece = Piece()
        try:
            piece.ParseFromString(data[2 : 2 + size])
        except DecodeError:
            return  # gRPC ends the call
        pieces.append(piece)
        data = data[2 + size :]
    assert len(join(pieces, 10_000)) <= 10_000


def _framed(document: bytes) -> bytes:
    frames = [piece.SerializeToString() for piece in cut(document)]
    return b"".join(len(frame).to_bytes(2, "big") + frame for frame in frames)


def _audit_line(data: bytes) -> None:
    with suppress(ValueError):
        Entry.parse(data).line()


def _file(read: Callable[[Path], object], name: str) -> Callable[[bytes], None]:
    """A reader of files as one of bytes."""

    def decode(data: bytes) -> None:
        path = FOLDER / name
        path.write_bytes(data)
        read(path)

    return decode


def _audit_log(path: Path) -> None:
    verify(path)
    for _ in entries(path):
        pass


def _bundle(*files: tuple[str, bytes]) -> bytes:
    buffer = BytesIO()
    with ZipFile(buffer, "w", ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return buffer.getvalue()


def _line() -> bytes:
    return Entry(1, "2026-01-02T03:04:05.678+00:00", SHA, {"event": "request", "asked": {"kind": "train"}}).line()


def _json(document: object) -> bytes:
    return json.dumps(document).encode()


_ISSUED = {
    "serial": "1f", "certificate_sha1": "0" * 40, "certificate_sha256": SHA, "public_key": "",
    "not_before": "2026-01-01T00:00:00Z",
    "not_after": "2027-01-01T00:00:00Z", "revoked": None, "name": "Aare",
}  # fmt: skip
_FILE = {"kind": "image", "name": SHA, "bytes": 3, "sha256": SHA}
_TEXT = json.dumps(EXPERIMENT)

DECODERS = {
    "instructions": Decoder(
        _instructions,
        (
            RoundInstructions(3, WEIGHTS, _TEXT).encode(),
            RoundInstructions(1, {}, "{}", train=False, surface=True).encode(),
        ),
    ),
    "update": Decoder(_update, (UPDATE.encode(), SiteUpdate("Aare", 3, {}, 7).encode())),
    "record": Decoder(_record, (b"u" + UPDATE.encode(), b"fabstained", b"nmessage", b"suint8", b"c")),
    "pieces": Decoder(_pieces, (_framed(UPDATE.encode()), _framed(b""), _framed(b"x" * 300) * 2)),
    "experiment": Decoder(lambda data: parse_experiment(data.decode("utf-8", "surrogateescape")), (_TEXT.encode(),)),
    "experiment.toml": Decoder(
        _file(lambda path: load_section(Experiment, path), "experiment.toml"), (EXPERIMENT_TOML,)
    ),
    "site.toml": Decoder(_file(lambda path: load_section(SiteConfig, path), "site.toml"), (SITE_TOML,)),
    "study.toml": Decoder(_file(lambda path: load_section(StudyConfig, path), "study.toml"), (STUDY_TOML,)),
    "kit.toml": Decoder(
        _file(lambda path: load_section(KitConfig, path), "kit.toml"),
        (b'format = 1\nstudy = "liver"\nrole = "site"\nsite = "Aare"\ncoordinator = "[::1]:8443"\n',),
    ),
    "manifest.json": Decoder(
        lambda data: parse_document(Manifest, data, Path("manifest.json")),
        (_json({"format": 1, "files": {"app.fab": {"sha256": SHA, "mode": "0644"}}}), b"{}"),
    ),
    "sites.json": Decoder(
        lambda data: parse_document(Roster, data, Path("sites.json")), (_json({"format": 1, "sites": [_ISSUED]}),)
    ),
    "ledger.json": Decoder(
        lambda data: parse_document(Ledger, data, Path("ledger.json")),
        (_json({"format": 1, "study": "liver", "sites": [_ISSUED], "retired": [_ISSUED]}),),
    ),
    "bundle": Decoder(
        lambda data: bundled_files(data, "app.fab"),
        (_bundle(("client/app.py", b"app = 1\n"), ("pyproject.toml", b"x" * 99)), _bundle()),
    ),
    "approved.json": Decoder(
        _file(lambda path: approvals(path.parent), "approved.json"),
        (_json([{"sha256": SHA, "approved": "2026-01-02T03:04:05Z", "by": "ü", "name": "app.fab"}]), b"[]"),
    ),
    "status.json": Decoder(_file(lambda path: read_status(path.parent), "status.json"), (_json({"rounds": 3}),)),
    "who.json": Decoder(_file(read_who, "who.json"), (_json({"12": {"name": "Aare", "started": 1.5}}), b"{}")),
    "request": Decoder(_file(read_request, "site.csr"), (b"-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n",)),
    "public-key": Decoder(
        _file(read_public_key, "site.pub"),
        (b"ecdsa-sha2-nistp384 AAAA x\n", b"ecdsa-" + b"a" * 20_000 + b" AAAA x\n"),
    ),
    "audit-line": Decoder(_audit_line, (_line(),)),
    "audit-log": Decoder(_file(_audit_log, "audit.jsonl"), (_line(), _line() * 2)),
    "audit-head": Decoder(
        _file(lambda path: read_head(path.with_suffix("")), "log.head"),
        (_json({"seq": 1, "digest": SHA, "size": 9, "torn": 0, "next_digest": None, "next_size": None}),),
    ),
    "data-manifest": Decoder(
        _file(load_manifest, "data-manifest.json"),
        (
            _json(
                {
                    "digest": SHA,
                    "signature": "",
                    "manifest": {
                        "site": "Aare",
                        "salt": SHA,
                        "cases": [{"name": SHA, "person": SHA, "files": [_FILE]}],
                    },
                }
            ),
        ),
    ),
}


def decode(name: str, data: bytes) -> bool:
    """Whether a decoder takes some bytes; any error but a `FedsegError` passes through."""
    try:
        DECODERS[name].read(data)
    except FedsegError as error:
        told = str(error)
    else:
        return True
    assert len(told) < 10_000, "an error is for people and logs"
    return False
