import math
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedseg.errors import StoreError
from fedseg.federated.checkpoint import load_state, save_state, write_durably
from fedseg.federated.rounds import apply_round
from tests.federated.toys import same, toy_experiment, toy_state, toy_weights


@pytest.mark.parametrize("optimizer", ["average", "momentum", "adam"])
def test_a_state_survives_the_disk_to_the_last_bit(tmp_path, optimizer):
    experiment = toy_experiment(server_optimizer=optimizer)
    state = apply_round(toy_state(experiment), toy_weights(1), (1 / 3, math.pi), experiment.federation)
    sha256 = save_state(tmp_path / "state.safetensors", state)
    got = load_state(tmp_path / "state.safetensors", sha256)
    assert replace(got, weights={}, moments={}) == replace(state, weights={}, moments={})
    assert same(got.weights, state.weights)
    assert got.moments.keys() == state.moments.keys()
    assert all(same(got.moments[kind], state.moments[kind]) for kind in state.moments)


def test_the_next_round_from_disk_is_the_next_round(tmp_path):
    experiment = toy_experiment(server_optimizer="adam")
    state = apply_round(toy_state(experiment), toy_weights(1), (1.0,), experiment.federation)
    save_state(tmp_path / "state.safetensors", state)
    loaded = load_state(tmp_path / "state.safetensors")
    one, other = (apply_round(before, toy_weights(2), (1.0,), experiment.federation) for before in (state, loaded))
    assert same(one.weights, other.weights)


def test_the_same_state_gives_the_same_file(tmp_path):
    state = toy_state(toy_experiment())
    reordered = replace(state, weights=dict(reversed(state.weights.items())))
    assert save_state(tmp_path / "one", state) == save_state(tmp_path / "other", reordered)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(StoreError, match="round-7: no such checkpoint"):
        load_state(tmp_path / "round-7")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("keep", [0, 3, 8, 100, -1])
def test_a_cut_checkpoint_is_refused(tmp_path, keep, known):
    path = tmp_path / "state.safetensors"
    sha256 = save_state(path, toy_state(toy_experiment()))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError, match=r"state\.safetensors"):
        load_state(path, sha256 if known else None)


def test_a_changed_bit_is_found_by_the_digest(tmp_path):
    path = tmp_path / "state.safetensors"
    sha256 = save_state(path, toy_state(toy_experiment()))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="is damaged: its SHA-256"):
        load_state(path, sha256)


def test_other_files_are_no_checkpoints(tmp_path):
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "foreign.safetensors")
    with pytest.raises(StoreError, match="not a readable checkpoint"):
        load_state(tmp_path / "foreign.safetensors")


def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    write_durably(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"new"
