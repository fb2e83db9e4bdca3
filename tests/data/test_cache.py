"""Prepared volumes on disk: whole or not there, found by content, shared by processes."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from fedseg.data import preprocess
from fedseg.data.cache import Cache
from fedseg.data.cohort import read_cohort
from fedseg.data.preprocess import prepare_cohort
from fedseg.errors import DataError
from tests.data.niftis import ball, config, decathlon, noise, save, task

KEY = "ab" * 32


@pytest.fixture
def counted(monkeypatch):
    """Names of the cases that are prepared from their files."""
    names = []
    prepare_case = preprocess.prepare_case
    monkeypatch.setattr(
        preprocess, "prepare_case", lambda case, *rest: names.append(case.name) or prepare_case(case, *rest)
    )
    return names


def prepare(folder, cache, **settings):
    return prepare_cohort(read_cohort(folder), task(), config(**settings), cache)


def same(one, other):
    return all(
        np.array_equal(a.image, b.image)
        and np.array_equal(a.label, b.label)
        and a.geometry == b.geometry
        and a.spacing == b.spacing
        and all(np.array_equal(a.foreground[value], b.foreground[value]) for value in a.foreground)
        for a, b in zip(one.cases, other.cases, strict=True)
    )


def entries(cache):
    return sorted(path.parent for path in cache.glob("*/*/entry.json"))


def test_the_second_time_comes_from_disk_memory_mapped(tmp_path, counted):
    decathlon(tmp_path / "data", ["a", "b"])
    first = prepare(tmp_path / "data", tmp_path / "cache")
    second = prepare(tmp_path / "data", tmp_path / "cache")
    assert counted == ["a", "b"]
    assert same(first, second)
    for case in second.cases:
        assert isinstance(case.image, np.memmap)
        assert not case.image.flags.writeable


def test_the_cache_tells_nothing_of_paths_and_names(tmp_path):
    decathlon(tmp_path / "data", ["patient-schmidt"])
    prepare(tmp_path / "data", tmp_path / "cache")
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(files) >= 4
    for path in files:
        assert "schmidt" not in str(path.relative_to(tmp_path))
        assert b"schmidt" not in path.read_bytes()


def test_moved_and_renamed_files_are_recognised(tmp_path, counted):
    decathlon(tmp_path / "data", ["a"])
    prepare(tmp_path / "data", tmp_path / "cache")
    for kind in ("images", "labels"):
        (tmp_path / "moved" / kind).mkdir(parents=True)
        shutil.copy(tmp_path / f"data/{kind}Tr/a.nii.gz", tmp_path / f"moved/{kind}/renamed.nii.gz")
    (case,) = prepare(tmp_path / "moved", tmp_path / "cache").cases
    assert counted == ["a"]
    assert case.name == "renamed"


def test_changed_content_is_prepared_again(tmp_path, counted):
    decathlon(tmp_path / "data", ["a"])
    before = prepare(tmp_path / "data", tmp_path / "cache").cases[0].image.copy()
    save(tmp_path / "data/imagesTr/a.nii.gz", noise(99))
    assert not np.array_equal(prepare(tmp_path / "data", tmp_path / "cache").cases[0].image, before)
    save(tmp_path / "data/labelsTr/a.nii.gz", np.roll(ball(), 1))
    prepare(tmp_path / "data", tmp_path / "cache")
    assert counted == ["a"] * 3


def test_settings_that_matter_make_other_entries_and_others_do_not(tmp_path, counted):
    decathlon(tmp_path / "data", ["a"])
    prepare(tmp_path / "data", tmp_path / "cache")
    prepare(tmp_path / "data", tmp_path / "cache", min_cases=9, min_usable_share=0.1, validation_fraction=0.5)
    assert len(counted) == 1
    for number, settings in enumerate(
        ({"spacing": (2.0, 2.0, 2.0)}, {"orientation": "LPS"}, {"crop": "nonzero"}, {"percentiles": (0.1, 0.9)}),
        start=2,
    ):
        prepare(tmp_path / "data", tmp_path / "cache", **settings)
        assert len(counted) == number


def test_a_stricter_task_does_not_get_what_it_would_refuse(tmp_path):
    decathlon(tmp_path / "data", ["a"])
    save(tmp_path / "data/labelsTr/a.nii.gz", ball(value=2))
    wide = task(labels={"background": 0, "a": 1, "b": 2})
    assert len(prepare_cohort(read_cohort(tmp_path / "data"), wide, config(), tmp_path / "cache").cases) == 1
    narrow = prepare_cohort(read_cohort(tmp_path / "data"), task(), config(), tmp_path / "cache")
    assert narrow.quarantined == {"a": "unknown-label"}


def damage_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped bit in an array": lambda entry: damage_bit(entry / "image.npy"),
    "array cut short": lambda entry: os.truncate(entry / "label.npy", 100),
    "array gone": lambda entry: (entry / "foreground.npy").unlink(),
    "flipped bit in the description": lambda entry: damage_bit(entry / "entry.json"),
    "description empty": lambda entry: os.truncate(entry / "entry.json", 0),
    "description gone": lambda entry: (entry / "entry.json").unlink(),
    "description no text": lambda entry: (entry / "entry.json").write_bytes(b"\xff\xfe\n\x00"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_rebuilt(tmp_path, counted, damage):
    decathlon(tmp_path / "data", ["a"])
    whole = prepare(tmp_path / "data", tmp_path / "cache")
    kept = [np.array(case.image) for case in whole.cases]
    (entry,) = entries(tmp_path / "cache")
    damage(entry)
    again = prepare(tmp_path / "data", tmp_path / "cache")
    assert counted == ["a", "a"]
    assert np.array_equal(again.cases[0].image, kept[0])
    prepare(tmp_path / "data", tmp_path / "cache")
    assert counted == ["a", "a"]
    assert entries(tmp_path / "cache") == [entry]


WRITER = """
import os, signal, sys
import numpy as np
from pathlib import Path
from fedseg.data.cache import Cache
original = np.save
def save(path, array, **kw):
    original(path, array, **kw)
    if Path(path).name == "label.npy":
        os.kill(os.getpid(), signal.SIGKILL)
np.save = save
Cache(Path(sys.argv[1])).save("ab" * 32, {"image": np.ones(9), "label": np.ones(9), "foreground": np.ones(9)}, {})
"""


def test_a_killed_writer_leaves_no_entry_and_its_traces_are_swept(tmp_path):
    done = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert Cache(tmp_path).load(KEY) is None
    assert left.exists()  # it may still be somebody's
    os.utime(left, (time.time() - 2 * 24 * 3600,) * 2)
    Cache(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _prepare_in_another_process(folder, cache, start, answers):
    start.wait()
    prepared = prepare(folder, cache)
    answers.put([float(case.image.sum()) for case in prepared.cases])


def test_two_processes_may_prepare_the_same_cases_at_once(tmp_path):
    decathlon(tmp_path / "data", ["a", "b", "c"])
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(2), context.Queue()
    others = [
        context.Process(
            target=_prepare_in_another_process, args=(tmp_path / "data", tmp_path / "cache", start, answers)
        )
        for _ in range(2)
    ]
    for other in others:
        other.start()
    one, two = answers.get(timeout=60), answers.get(timeout=60)
    for other in others:
        other.join(timeout=60)
    assert one == two
    assert len(entries(tmp_path / "cache")) == 3
    assert not list((tmp_path / "cache").glob(".aside*"))
    assert [float(case.image.sum()) for case in prepare(tmp_path / "data", tmp_path / "cache").cases] == one


def test_the_quicker_writer_wins(tmp_path):
    cache = Cache(tmp_path)
    cache.save(KEY, {"image": np.zeros(3)}, {"by": "first"})
    cache.save(KEY, {"image": np.ones(3)}, {"by": "second"})
    entry = cache.load(KEY)
    assert entry.about == {"by": "first"}
    assert entry.arrays["image"].tolist() == [0, 0, 0]


def test_a_cache_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file: the cache cannot be written"):
        Cache(tmp_path / "file")
    cache = Cache(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match="the cache cannot be written"):
        cache.save(KEY, {"image": np.zeros(3)}, {})


def test_a_file_is_hashed_again_only_when_it_changed(tmp_path):
    path = tmp_path / "a.nii"
    path.write_bytes(b"one")
    cache = Cache(tmp_path / "cache")
    first = cache.digest(path)
    (note,) = (tmp_path / "cache/digests").iterdir()
    note.write_text(note.read_text().replace(first, "remembered"))
    assert cache.digest(path) == "remembered"
    path.write_bytes(b"two")
    second = cache.digest(path)
    assert second not in (first, "remembered")
    note.write_text("damaged")
    assert cache.digest(path) == second
