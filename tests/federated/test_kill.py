"""Kill -9 at any moment loses at most the current round, and the final weights are those of an undisturbed run.

SIGKILL proves that a process may vanish between any two instructions: files and the database are whole, and a resumed run
repeats at most one round. It does not prove anything about a power loss, in which the kernel's unwritten pages vanish too.
For that, checkpoints and their folder are synced before the row that names them is committed with `synchronous = FULL`;
a test cannot cut the power.
"""

import multiprocessing
import os
import random
import signal
from collections import Counter
from pathlib import Path

import pytest

from fedseg.federated.faults import WRITE_POINTS
from fedseg.federated.local import InProcessFleet
from tests.federated.toys import PRELOAD, SITES, ask_toy, history, rows, run_toy, toy_experiment

ROUNDS = 3
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(list(PRELOAD))


def experiment():
    return toy_experiment(rounds=ROUNDS, server_optimizer="momentum", participation=0.5)


def run(output: Path, fault: str, started=None):
    """In a process of its own: run or resume, and note on disk which site is asked when."""
    os.environ["FEDSEG_FAULT"] = fault

    def ask(site, instructions):
        with (output / "asked.log").open("a") as log:
            log.write(f"{instructions.server_round} {site}\n")
        return ask_toy(site, instructions)

    output.mkdir(exist_ok=True)
    if started is not None:
        started.send_bytes(b"go")
    run_toy(experiment(), output, InProcessFleet(SITES, ask), resume=True)


def spawn(output, fault="", kill_after=None):
    """Start such a process, perhaps kill it after some seconds, and return its exit code."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=run, args=(output, fault, theirs))
    process.start()
    theirs.close()
    ours.recv_bytes()
    if kill_after is not None:
        process.join(kill_after)
        process.kill()
    process.join()
    ours.close()
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    assert spawn(output) == 0
    begun, finished = rows(output, "SELECT started, finished FROM runs")[0].values()
    return history(output), asked(output), finished - begun


def asked(output):
    return Counter((output / "asked.log").read_text().splitlines())


def check(output, undisturbed, kills):
    expected, asked_once, _ = undisturbed
    assert history(output) == expected
    assert {path.name for path in (output / "checkpoints").iterdir()} == {
        f"federated-round-{number:04d}.safetensors" for number in (ROUNDS - 1, ROUNDS)
    }
    repeated = {line.split()[0] for line, times in asked(output).items() if times > asked_once[line]}
    assert asked(output).keys() == asked_once.keys()
    assert len(repeated) <= kills
    assert all(times <= asked_once[line] + kills for line, times in asked(output).items())


LATER = {"round-begun": ROUNDS, "update-folded": 2 * ROUNDS, "final-written": 1}
MOMENTS = sorted({(point, 1) for point in WRITE_POINTS} | {(point, LATER.get(point, ROUNDS)) for point in WRITE_POINTS})


@pytest.mark.parametrize(("point", "count"), MOMENTS)
def test_a_run_killed_at_a_write_point_ends_as_if_undisturbed(tmp_path, undisturbed, point, count):
    assert spawn(tmp_path, f"{point}:{count}") == -signal.SIGKILL
    assert spawn(tmp_path) == 0
    check(tmp_path, undisturbed, kills=1)


@pytest.mark.parametrize("point", ["update-folded", "checkpoint-written", "store-written", "checkpoints-pruned"])
def test_a_run_killed_again_while_it_resumes_ends_as_if_undisturbed(tmp_path, undisturbed, point):
    assert spawn(tmp_path, "store-written:3") == -signal.SIGKILL
    assert spawn(tmp_path, f"{point}:1") == -signal.SIGKILL
    assert spawn(tmp_path) == 0
    check(tmp_path, undisturbed, kills=2)


def test_a_run_killed_at_random_moments_ends_as_if_undisturbed(tmp_path, undisturbed):
    generator, longest, number, killed = random.Random(5), undisturbed[2], 0, 0
    while killed < 12:
        number += 1
        output = tmp_path / str(number)
        if spawn(output, kill_after=generator.uniform(0, longest)) == -signal.SIGKILL:
            killed += 1
        else:
            longest *= 0.8  # it was quicker than the kill: this machine is less busy than it was
        if number % 4 == 0:
            spawn(output, kill_after=generator.uniform(0, longest))
        assert spawn(output) == 0
        check(output, undisturbed, kills=2)


def test_every_write_point_is_passed_in_the_order_in_which_it_is_listed(tmp_path, monkeypatch):
    passed = []
    for module in ("driver", "checkpoint", "store"):
        monkeypatch.setattr(f"fedseg.federated.{module}.reach", passed.append)
    run_toy(toy_experiment(rounds=1), tmp_path)
    first = passed.index("round-begun")
    assert list(dict.fromkeys(passed[first:])) == list(WRITE_POINTS)


def test_a_resumed_run_says_so(tmp_path):
    assert spawn(tmp_path, "store-written:3") == -signal.SIGKILL
    assert spawn(tmp_path) == 0
    assert rows(tmp_path, "SELECT resumed FROM runs") == [{"resumed": 1}]
    assert rows(tmp_path, "SELECT kind, server_round FROM events") == [{"kind": "resumed", "server_round": 1}]
