"""Which tensors travel, for every setting and every kind of network."""

import json

import numpy as np
import pytest
import torch
from monai.networks.layers.factories import Norm
from torch import nn

from fedseg.config import parse_experiment
from fedseg.errors import ConfigError, ModelError
from fedseg.federated.driver import run_federation
from fedseg.federated.exchange import buffer_names, private_names, put_weights, take_weights
from fedseg.federated.local import InProcessFleet
from fedseg.federated.messages import SiteUpdate
from fedseg.federated.networks import new_model, private_of, start_state
from fedseg.federated.rounds import instructions_for
from fedseg.federated.store import RunStore
from fedseg.layers.norm import ChannelNorm, InstanceNorm, make_norm
from fedseg.model_file import load_model_file, read_model_file, save_model_file
from fedseg.models.registry import ARCHITECTURES

SMALL = {
    "mlru++": {"base_width": 2, "depths": [1, 1], "decoder_depth": 1},
    "unet": {"widths": [4, 8], "residual_units": 1},
    "dynunet": {"widths": [4, 8, 8]},
    "rwkv-unet": {"depths": [2, 2, 2, 2], "widths": [6, 8, 12, 16], "stem_width": 4},
    "rwkv-unet-3d": {"depths": [2, 2, 2, 2], "widths": [6, 8, 12, 16], "stem_width": 4},
}
"""A network without an entry is built as its preset has it."""

every_network = pytest.mark.parametrize("name", list(ARCHITECTURES))


def experiment(name="unet", exchange="all", norm="batch", **options):
    document = {
        "name": "tiny",
        "task": {"name": "phantom", "modality": "mr", "labels": {"background": 0, "liver": 1}},
        "model": {"name": name, "options": {**SMALL.get(name, {}), "norm": norm, **options}},
        "training": {"patch_size": [16, 32, 48]},
        "federation": {"rounds": 2, "exchange": exchange},
    }
    return parse_experiment(json.dumps(document))


@every_network
def test_everything_travels_unless_the_experiment_says_otherwise(name):
    state = start_state(experiment(name))
    assert state.private == frozenset()
    assert state.exchanged.keys() == state.weights.keys()


def by_name_of_class(model):
    """Weights of the layers whose class is called a norm."""
    norms = [prefix for prefix, module in model.named_modules() if "Norm" in type(module).__name__]
    return {tensor for tensor in take_weights(model) if tensor.rpartition(".")[0] in norms}


@pytest.mark.parametrize("norm", ["batch", "instance"])
@every_network
def test_fedbn_keeps_every_tensor_of_every_normalisation_layer_and_nothing_else(name, norm):
    one = experiment(name, "all-but-norms" if norm == "batch" else "all", norm)
    model = new_model(one)
    private = private_names(model, "all-but-norms", "")
    assert private == by_name_of_class(model)
    if norm == "batch":
        assert start_state(one).private == private
        assert {tensor.rpartition(".")[2] for tensor in private} == {"weight", "bias", "running_mean", "running_var"}
        assert buffer_names(model) <= private
        assert len(start_state(one).exchanged) > len(take_weights(model)) / 4


@every_network
def test_silobn_keeps_running_statistics_and_shares_the_affine_parameters(name):
    one = experiment(name, "all-but-statistics")
    state = start_state(one)
    assert state.private == state.buffers == buffer_names(new_model(one))
    assert {tensor.rpartition(".")[2] for tensor in state.private} == {"running_mean", "running_var"}
    assert state.exchanged.keys() == dict(new_model(one).named_parameters()).keys()


@pytest.mark.parametrize("exchange", ["all-but-norms", "all-but-statistics"])
def test_a_hospital_that_took_no_part_is_refused_a_network_without_statistics(tmp_path, exchange):
    one = experiment("unet", exchange)
    state = start_state(one)
    save_model_file(tmp_path / "server.safetensors", one, state.weights, "tiny/federated")
    with pytest.raises(ModelError, match=r"is no complete network: .* tensors stayed at the sites"):
        load_model_file(tmp_path / "server.safetensors")
    missing = read_model_file(tmp_path / "server.safetensors").missing
    statistics = {name: state.weights[name] for name in missing if name in state.buffers}
    assert statistics.keys() == state.buffers
    assert all((array == float("running_var" in name)).all() for name, array in statistics.items())


@pytest.mark.parametrize("optimizer", ["average", "momentum", "adam"])
@pytest.mark.parametrize("algorithm", [{}, {"normalise_steps": True}, {"control_variates": True}])
def test_batch_statistics_take_the_plain_mean_whatever_the_algorithm(tmp_path, algorithm, optimizer):
    """The control of FedBN: sites of 1 and 3 cases, 2 and 8 steps; statistics move by 1 and 5, thus by 4."""
    document = json.loads(experiment().to_json())
    document["training"]["optimizer"] = "sgd"
    document["federation"] |= {"server_optimizer": optimizer, "server_learning_rate": 0.5} | algorithm
    one = parse_experiment(json.dumps(document))
    state = start_state(one)

    def ask(site, instructions):
        assert instructions.control.keys() <= state.weights.keys() - state.buffers
        cases, steps, moved = {"A": (1, 2, 1.0), "B": (3, 8, 5.0)}[site]
        delta = {
            name: np.full_like(array, moved if name in state.buffers else 0.01) for name, array in state.weights.items()
        }
        return SiteUpdate(site, instructions.server_round, delta, cases, {}, {"steps": float(steps)})

    store = RunStore(tmp_path)
    try:
        final = run_federation(one, InProcessFleet(("A", "B"), ask), store, lambda: state)
    finally:
        store.close()
    for name in state.buffers:
        assert final.weights[name] == pytest.approx(state.weights[name] + 2 * 4.0, rel=1e-6), name
    assert all(state.buffers.isdisjoint(moment) for moment in final.moments.values())
    assert all(size == pytest.approx(final.norms[0]) and size < 5 for size in final.norms)


@every_network
def test_a_private_encoder_leaves_the_decoder_to_travel(name):
    state = start_state(experiment(name, "decoder"))
    assert state.private
    assert state.exchanged
    assert state.private == private_names(new_model(experiment(name)), "decoder", ARCHITECTURES[name].encoder)


def test_a_private_encoder_of_a_unet_is_its_strided_half_with_its_norms():
    private = private_of(experiment("unet", "decoder", residual_units=0))
    down, bottom = "net.model.0", "net.model.1.submodule"
    statistics = [f"adn.N.{tensor}" for tensor in ("weight", "bias", "running_mean", "running_var")]
    tensors = ["conv.weight", "conv.bias", "adn.A.weight", *statistics]
    assert private == {f"{part}.{tensor}" for part in (down, bottom) for tensor in tensors}


class EveryNorm(nn.Module):
    """One layer of every kind, of PyTorch, of MONAI and of ours, and a convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3)
        self.torch = nn.ModuleList(
            [
                nn.BatchNorm2d(4),
                nn.SyncBatchNorm(4),
                nn.InstanceNorm3d(4, affine=True, track_running_stats=True),
                nn.GroupNorm(2, 4),
                nn.LayerNorm(4),
                nn.RMSNorm(4),
            ]
        )
        self.monai = nn.ModuleList([Norm[kind, 3](4) for kind in ("batch", "instance")])
        self.monai.extend([Norm["group", 3](num_channels=4, num_groups=2), Norm["layer", 3](4)])
        self.ours = nn.ModuleList([InstanceNorm(4, affine=True), ChannelNorm(4), make_norm("group", 4)])
        self.again = self.ours[0]


def test_every_kind_of_normalisation_layer_is_known_and_a_shared_one_by_both_of_its_names():
    model = EveryNorm()
    travels = take_weights(model).keys() - private_names(model, "all-but-norms", "")
    assert travels == {"conv.weight", "conv.bias"}
    assert {"again.weight", "ours.0.weight"} <= private_names(model, "all-but-norms", "")


@pytest.mark.parametrize("exchange", ["all-but-norms", "decoder"])
def test_the_server_sends_the_initial_values_of_private_tensors_too(exchange):
    one = experiment("unet", exchange)
    state = start_state(one)
    message = instructions_for(state, one, one.to_json())
    model = new_model(one)
    put_weights(model, message.weights)
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 1, 16, 32, 32)).isfinite().all()
    assert all(np.array_equal(message.weights[name], start_state(experiment()).weights[name]) for name in state.weights)


def test_names_of_private_tensors_are_known_without_a_network_in_memory():
    for exchange in ("all", "all-but-norms", "all-but-statistics", "decoder"):
        one = experiment("dynunet", exchange)
        assert private_of(one) == start_state(one).private


def test_keeping_norms_of_a_network_whose_norms_hold_nothing_is_refused():
    one = experiment("unet", "all-but-norms", "instance")
    for function in (private_of, start_state):
        with pytest.raises(ConfigError, match=r"'all-but-norms': no tensor of unet .* model\.options\.norm, such as"):
            function(one)
