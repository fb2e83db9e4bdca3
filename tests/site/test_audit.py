import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import stat
import tempfile
import tracemalloc
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseg.errors import AuditError
from fedseg.federated.checkpoint import write_durably
from fedseg.federated.messages import SiteUpdate
from fedseg.site.audit import AuditLog, rounds_done, what_left
from fedseg.site.chain import GENESIS, LONGEST_LINE, Entry, Head, digest_of, entries, head_path, read_head, verify

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fedseg.site.audit"])
FAULTS = ("audit-announced", "audit-written", "audit-confirmed", "checkpoint-written")


def request(number=1, decided="allowed", experiment="e" * 64):
    asked = {"kind": "train", "server_round": number, "experiment": experiment}
    return {"event": "request", "asked": asked, "decided": decided, "cases": 12, "seconds": 1.5}


def write(path, count):
    return [AuditLog(path).append(request(number)) for number in range(1, count + 1)]


@contextmanager
def folder():
    """For hypothesis, which runs a test many times with one `tmp_path`."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a log of five entries and of its head."""
    path = tmp_path_factory.mktemp("whole") / "audit.jsonl"
    write(path, 5)
    return path.read_bytes(), head_path(path).read_bytes()


def verdict_of(log, head, expected=None):
    with folder() as place:
        path = place / "audit.jsonl"
        path.write_bytes(log)
        if head is not None:
            head_path(path).write_bytes(head)
        return verify(path, expected)


def test_what_is_appended_is_read_back_and_holds_together(tmp_path):
    path = tmp_path / "state" / "audit.jsonl"
    made = write(path, 3)
    assert list(entries(path)) == made
    assert [entry.seq for entry in made] == [1, 2, 3]
    assert [entry.previous for entry in made] == [GENESIS, made[0].digest, made[1].digest]
    assert [entry.entry["asked"]["server_round"] for entry in made] == [1, 2, 3]
    verdict = verify(path)
    assert verdict == type(verdict)(3, made[0].time, made[2].time, made[2].digest)


def test_only_the_owner_can_read_what_a_log_consists_of(tmp_path):
    path = tmp_path / "audit.jsonl"
    before = os.umask(0o002)
    try:
        path.touch(mode=0o664)
        write(path, 1)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(file.stat().st_mode) for file in (path, head_path(path))] == [0o600, 0o600]


@given(st.data())
@settings(max_examples=300)
def test_any_changed_byte_is_found(whole, data):
    log, head = whole
    place = data.draw(st.integers(0, len(log) - 1))
    changed = bytearray(log)
    changed[place] ^= data.draw(st.integers(1, 255))
    verdict = verdict_of(bytes(changed), head)
    assert verdict.problem
    assert abs(verdict.line - (log[:place].count(b"\n") + 1)) <= 1


@given(st.permutations(range(5)), st.integers(0, 5))
def test_removed_and_moved_lines_are_found(whole, order, kept):
    log, head = whole
    lines = log.splitlines(keepends=True)
    chosen = [lines[number] for number in order[:kept]]
    if chosen != lines:
        assert verdict_of(b"".join(chosen), head).problem


@given(st.integers(0, 5), st.integers(0, 4), st.booleans())
def test_added_lines_are_found(whole, at, which, chained):
    log, head = whole
    lines = log.splitlines(keepends=True)
    added = lines[which]
    if chained:
        added = Entry(at + 1, "2024-01-01", digest_of(lines[at - 1]) if at else GENESIS, request()).line()
    verdict = verdict_of(b"".join([*lines[:at], added, *lines[at:]]), head)
    assert verdict.problem
    assert verdict.line in (at, at + 1, at + 2)


@given(st.integers(0, 10_000))
def test_a_log_that_was_cut_is_found(whole, length):
    log, head = whole
    assert verdict_of(log[: length % len(log)], head).problem


def test_damage_is_told_with_its_line(whole):
    log, head = whole
    lines = log.splitlines(keepends=True)
    changed = b"".join([*lines[:2], lines[2].replace(b'"cases":12', b'"cases":99'), *lines[3:]])
    assert verdict_of(changed, head).line == 3
    assert "line 3 is not the one that was written" in verdict_of(changed, head).problem
    assert "line 3 is entry 4, where 3 must stand" in verdict_of(b"".join([*lines[:2], *lines[3:]]), head).problem
    assert "ends after line 4, and had 5" in verdict_of(b"".join(lines[:4]), head).problem
    assert "line 5 is incomplete, and audit.jsonl.head knows of no crash" in verdict_of(log[:-9], head).problem
    assert "audit.jsonl.head, which says where the log ends, is missing" in verdict_of(log, None).problem
    last = b"".join([*lines[:4], lines[4].replace(b'"cases":12', b'"cases":99')])
    assert "line 5 is not the last one that audit.jsonl.head knows" in verdict_of(last, head).problem


def test_a_log_made_up_anew_is_found_by_a_digest_that_was_noted_elsewhere(tmp_path, whole):
    log, head = whole
    noted = [digest_of(line) for line in log.splitlines()]
    assert all(verdict_of(log, head, digest).problem is None for digest in noted)
    forged = tmp_path / "audit.jsonl"
    write(forged, 6)
    assert verify(forged).problem is None
    assert f"no line with SHA-256 {noted[2]}" in verify(forged, noted[2]).problem
    with pytest.raises(AuditError, match="'abc' is not a SHA-256"):
        verify(forged, "abc")


def test_a_missing_log_is_an_error_or_a_problem_if_there_was_one(tmp_path):
    path = tmp_path / "audit.jsonl"
    with pytest.raises(AuditError, match=r"audit\.jsonl: cannot be read"):
        verify(path)
    write(path, 1)
    path.unlink()
    assert "the log is missing" in verify(path).problem
    with pytest.raises(AuditError, match=r"cannot be read"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "bytes, and had"),
        (lambda path: path.unlink(), "it has 0 bytes, and had"),
        (lambda path: head_path(path).unlink(), "which says where it ends, is missing"),
        (lambda path: path.write_bytes(path.read_bytes() + b"{}\n"), "bytes, and had"),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b'"cases":12', b'"cases":13')),
            "its last line is not",
        ),
        (lambda path: head_path(path).write_bytes(b"{"), "not a readable head"),
    ],
)
def test_a_log_that_was_changed_is_not_continued(tmp_path, tamper, told):
    path = tmp_path / "audit.jsonl"
    write(path, 3)
    tamper(path)
    with pytest.raises(AuditError, match=told):
        write(path, 1)
    assert verify(path).problem


def append_and_die(path, fault, count):
    os.environ["FEDSEG_FAULT"] = fault
    write(path, count)


def spawn(target, *arguments):
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("count", [1, 3])
def test_a_process_killed_at_any_point_leaves_a_log_that_holds_together_and_goes_on(tmp_path, fault, count):
    path = tmp_path / "audit.jsonl"
    process = spawn(append_and_die, path, f"{fault}:{count}", 9)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert verify(path).problem is None
    there = verify(path).entries
    assert count - 2 <= there <= count
    assert [entry.seq for entry in write(path, 2)] == [there + 1, there + 2]
    assert verify(path).problem is None
    assert {file.name for file in tmp_path.iterdir()} == {"audit.jsonl", "audit.jsonl.head"}


def announced(path):
    """A log of two entries whose third was being written when the process was killed; and the bytes of that line."""
    process = spawn(append_and_die, path, "audit-written:3", 3)
    process.join()
    log = path.read_bytes()
    return log[: read_head(path).size], log[read_head(path).size :]


def test_a_half_written_line_is_kept_aside_and_told_of(tmp_path):
    path = tmp_path / "audit.jsonl"
    kept, line = announced(path)
    for number, length in enumerate((1, len(line) // 2, len(line) - 1), 1):
        place = tmp_path / str(number)
        place.mkdir()
        log = place / "audit.jsonl"
        shutil.copy(head_path(path), head_path(log))
        log.write_bytes(kept + line[:length])
        assert (
            verify(log).problem == "line 3 is half-written: a crash; the next entry will keep it aside and tell of it"
        )
        assert len(list(entries(log))) == 2
        made = AuditLog(log).append(request(3))
        aside = place / "audit.jsonl.torn-1"
        assert aside.read_bytes() == line[:length]
        assert stat.S_IMODE(aside.stat().st_mode) == 0o600
        assert made.torn == ({"file": aside.name, "bytes": length, "sha256": digest_of(line[:length])},)
        assert (made.seq, list(entries(log))[2]) == (3, made)
        assert AuditLog(log).append(request(4)).torn == ()
        assert verify(log).problem is None


def test_a_process_killed_while_it_repairs_loses_nothing(tmp_path):
    path = tmp_path / "audit.jsonl"
    kept, line = announced(path)
    path.write_bytes(kept + line[:20])
    process = spawn(append_and_die, path, "audit-kept-aside:1", 1)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process = spawn(append_and_die, path, "audit-announced:1", 1)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_bytes() == kept
    made = AuditLog(path).append(request(3))
    assert [one["file"] for one in made.torn] == ["audit.jsonl.torn-1"]
    assert [file.name for file in tmp_path.glob("*.torn-*")] == ["audit.jsonl.torn-1"]
    assert verify(path).problem is None


def test_a_line_that_was_announced_cannot_be_changed(tmp_path):
    path = tmp_path / "audit.jsonl"
    kept, line = announced(path)
    assert verify(path).problem is None
    path.write_bytes(kept + line.replace(b'"cases":12', b'"cases":13'))
    assert "line 3 is not the last one" in verify(path).problem


def append_until_killed(path, told):
    while True:
        told.send(AuditLog(path).append({"event": "note", "text": "x" * 20_000}).seq)


def test_a_process_killed_at_random_moments_loses_no_entry_that_it_knew_of(tmp_path):
    path, generator, known = tmp_path / "audit.jsonl", random.Random(5), 0
    for _ in range(12):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = spawn(append_until_killed, path, theirs)
        theirs.close()
        for _ in range(generator.randint(1, 5)):
            known = ours.recv()
        process.join(generator.uniform(0, 0.03))
        process.kill()
        process.join()
        with suppress(EOFError):
            while True:
                known = ours.recv()
        ours.close()
        assert known <= verify(path).entries <= known + 1
        assert "half-written" in (verify(path).problem or "half-written")
    AuditLog(path).append(request())
    assert verify(path).problem is None


def append_many(path, name, count):
    for number in range(count):
        AuditLog(path).append({"event": "note", "by": name, "number": number})


def test_processes_that_append_at_once_lose_no_entry(tmp_path):
    path = tmp_path / "audit.jsonl"
    processes = [spawn(append_many, path, name, 25) for name in ("a", "b", "c")]
    while any(process.is_alive() for process in processes):
        if path.exists():
            assert verify(path).problem is None
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert verify(path).entries == 75
    found = [(entry.entry["by"], entry.entry["number"]) for entry in entries(path)]
    assert [[number for by, number in found if by == name] for name in ("a", "b", "c")] == [list(range(25))] * 3


def long_log(path, count):
    """As `append` would write it, without syncing every line."""
    previous, size = GENESIS, 0
    with path.open("wb") as file:
        for seq in range(1, count + 1):
            line = Entry(seq, "2024-01-01T00:00:00+00:00", previous, {"event": "note", "text": "x" * 300}).line()
            previous, size = digest_of(line), size + len(line)
            file.write(line)
    write_durably(head_path(path), Head(count, previous, size).to_json().encode())


def test_verifying_a_long_log_takes_little_memory(tmp_path):
    path = tmp_path / "audit.jsonl"
    long_log(path, 50_000)
    tracemalloc.start()
    try:
        verdict = verify(path)
        assert (verdict.entries, verdict.problem) == (50_000, None)
        assert rounds_done(path, "e" * 64) == 0
        assert tracemalloc.get_traced_memory()[1] < 2_000_000 < path.stat().st_size / 10
    finally:
        tracemalloc.stop()
    assert AuditLog(path).append(request()).seq == 50_001


def test_a_line_without_end_takes_little_memory(tmp_path):
    path = tmp_path / "audit.jsonl"
    write(path, 1)
    with path.open("ab") as file:
        file.write(b"[" * 30_000_000)
    tracemalloc.start()
    try:
        assert f"line 2 is longer than {LONGEST_LINE} bytes" in verify(path).problem
        with pytest.raises(AuditError, match="was changed by something else"):
            write(path, 1)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=300), st.none() | st.binary(max_size=300))
@settings(max_examples=300)
def test_any_bytes_are_a_verdict_or_an_audit_error(log, head):
    check_anything(log, head)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(GENESIS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
LINES = st.fixed_dictionaries(
    {"seq": st.just(1) | JSON, "time": st.just("2024-01-01") | JSON, "previous": st.just(GENESIS) | JSON},
    optional={"entry": st.just(request()) | JSON, "torn": JSON, "asked": JSON},
)
HEADS = st.fixed_dictionaries(
    {"seq": st.integers(0, 2) | JSON, "digest": st.just(GENESIS) | JSON, "size": st.integers(0, 400) | JSON},
    optional={"torn": JSON, "next_digest": st.just(GENESIS) | JSON, "next_size": st.integers(0, 400) | JSON},
)


@given(st.lists(LINES, max_size=2), HEADS)
@settings(max_examples=300)
def test_any_json_is_a_verdict_or_an_audit_error(lines, head):
    check_anything(b"".join(json.dumps(line).encode() + b"\n" for line in lines), json.dumps(head).encode())


@pytest.mark.parametrize("log", [b"[" * 60_000 + b"\n", b'{"seq":' + b"9" * 9000 + b"}\n", b'{"a":' * 9000 + b"\n"])
def test_hostile_json_is_a_verdict_or_an_audit_error(log):
    check_anything(log, None)
    check_anything(b"", log[:4000])


def check_anything(log, head):
    assert verdict_of(log, head) is not None
    with folder() as place:
        path = place / "audit.jsonl"
        path.write_bytes(log)
        if head is not None:
            head_path(path).write_bytes(head)
        for reading in (lambda: write(path, 1), lambda: list(entries(path)), lambda: rounds_done(path, "e")):
            with suppress(AuditError):
                reading()


@pytest.mark.parametrize("entry", [{"path": Path("x")}, {1: 2, "1": {3}}, {"deep": None}, {"huge": 10**5000}])
def test_what_is_no_json_is_not_written(tmp_path, entry):
    if "deep" in entry:
        for _ in range(100_000):
            entry = {"deep": entry}
    with pytest.raises(AuditError, match="must be made of JSON values"):
        AuditLog(tmp_path / "audit.jsonl").append(entry)
    assert not list(tmp_path.iterdir())


def test_an_entry_that_is_too_long_is_not_written(tmp_path):
    path = tmp_path / "audit.jsonl"
    write(path, 1)
    with pytest.raises(AuditError, match=f"is too long; lines have {LONGEST_LINE} at most"):
        AuditLog(path).append({"event": "x", "names": ["y" * 900] * 100})
    assert verify(path).entries == 1
    assert AuditLog(path).append(request()).seq == 2


def test_a_peers_long_text_does_not_keep_a_request_out_of_the_log(tmp_path):
    path = tmp_path / "audit.jsonl"
    made = AuditLog(path).append({"asked": {"study": "s" * 100_000}, "loss": float("nan"), "odd": "\ud800\n\x1b"})
    assert made.entry["asked"]["study"].startswith("s" * 100 + "... (100000 characters, SHA-256 ")
    assert (made.entry["loss"], made.entry["odd"]) == ("nan", "\ud800\n\x1b")
    assert list(entries(path)) == [made]
    assert verify(path).problem is None


@given(st.dictionaries(st.text(max_size=20) | st.integers(), JSON, max_size=4))
@settings(max_examples=100)
def test_any_entry_of_json_values_can_be_written_and_verified(entry):
    with folder() as place:
        path = place / "audit.jsonl"
        made = AuditLog(path).append(entry)
        assert list(entries(path)) == [made]
        assert verify(path).problem is None


def test_a_log_that_cannot_be_written_is_an_audit_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "audit.jsonl"
    write(path, 1)
    monkeypatch.setattr("fedseg.site.audit.os.pwrite", full)
    with pytest.raises(AuditError, match=r"cannot be written: .*No space left.*nothing may leave"):
        write(path, 1)
    monkeypatch.undo()
    assert write(path, 1)[0].seq == 2
    assert verify(path).problem is None
    with pytest.raises(AuditError, match="cannot be written"):
        AuditLog(path / "below-a-file").append(request())


def test_only_answered_requests_of_the_experiment_count_as_rounds(tmp_path):
    path, log = tmp_path / "audit.jsonl", AuditLog(tmp_path / "audit.jsonl")
    assert rounds_done(path, "e" * 64) == 0
    for decided in ("allowed", "refused", "failed", "allowed", "cancelled"):
        log.append(request(1, decided))
    log.append(request(1, "allowed", "f" * 64))
    log.append({"event": "note", "decided": "allowed", "about": "e" * 64})
    log.append({"event": "request", "decided": "allowed", "asked": "e" * 64})
    assert rounds_done(path, "e" * 64) == 2
    assert rounds_done(path, "f" * 64) == 1


def test_what_left_is_told_without_values():
    delta = {"b": np.full((2, 3), 0.123, np.float32), "a": np.full(4, 0.456, np.float32)}
    update = SiteUpdate("Aare", 3, delta, 12, {"dice/liver/sum": 7.89}, {"loss": 0.987}, {"missing-label": 65})
    told = what_left(update, "c" * 64, 1234)
    assert (told["bytes"], told["sha256"], told["num_cases"]) == (1234, "c" * 64, 12)
    assert told["tensors"]["first"] == [["a", [4], "float32"], ["b", [2, 3], "float32"]]
    assert (told["tensors"]["count"], told["tensors"]["bytes"]) == (2, 40)
    assert (told["sums"], told["training"], told["quarantined"]) == (["dice/liver/sum"], ["loss"], ["missing-label"])
    assert not [value for value in ("0.123", "0.456", "7.89", "0.987", "65") if value in json.dumps(told)]


def test_what_left_of_the_largest_network_fits_a_line(tmp_path):
    names = [f"{number:04d}" + "\N{GRINNING FACE}" * 190 for number in range(1500)]
    update = SiteUpdate("Aare", 1, {name: np.zeros(1, np.float32) for name in names}, 9, dict.fromkeys(names, 1.0))
    told = what_left(update, "c" * 64, 10**9)
    assert told["sums"]["count"] == told["tensors"]["count"] == 1500
    assert AuditLog(tmp_path / "audit.jsonl").append(request() | {"left": told}).seq == 1
    changed = dict.fromkeys([*names[:-1], "x"], 1.0)
    assert what_left(SiteUpdate("Aare", 1, {}, 9, changed), "c", 1)["sums"]["sha256"] != told["sums"]["sha256"]
