import copy
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedseg.config import TrainingConfig
from fedseg.device import seed_everything
from fedseg.errors import ConfigError, ModelError, TrainingDiverged
from fedseg.losses import DiceCrossEntropy
from fedseg.training import add_proximal_gradient, learning_rate, train_locally, use_channels_last


@dataclass(frozen=True)
class Patches:
    image: torch.Tensor
    label: torch.Tensor


class TwoHeads(nn.Module):
    """Two outputs in training mode, the second on a grid half as fine; dropout between."""

    deep_supervision = True
    deep_supervision_weights = (2 / 3, 1 / 3)

    def __init__(self, dropout=0.2):
        super().__init__()
        self.stem = nn.Conv3d(1, 4, 3, padding=1)
        self.norm = nn.InstanceNorm3d(4, affine=True)
        self.drop = nn.Dropout(dropout)
        self.fine = nn.Conv3d(4, 3, 1)
        self.coarse = nn.Conv3d(4, 3, 2, stride=2)

    def forward(self, image):
        features = self.drop(torch.relu(self.norm(self.stem(image))))
        return (self.fine(features), self.coarse(features)) if self.training else self.fine(features)


def network(seed=0, **options):
    seed_everything(seed)
    return TwoHeads(**options)


def batches(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        label = torch.randint(0, 3, (2, 1, 6, 8, 4), generator=generator, dtype=torch.uint8)
        made.append(Patches(label + 0.3 * torch.randn(label.shape, generator=generator), label))
    return made


def config(**changes):
    return TrainingConfig(**{"patch_size": (6, 8, 4), "learning_rate": 0.01} | changes)


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trained(model=None, settings=None, data=None, seed=1, **options):
    model = network() if model is None else model
    seed_everything(seed)
    report = train_locally(model, batches() if data is None else data, settings or config(), **options)
    return weights(model), report


# ------------------------------------------------------------------------------------------------------- FedProx


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_mu_zero_equals_plain_training_bit_for_bit(optimizer):
    settings = config(optimizer=optimizer)
    anchor = {name: value + 1 for name, value in weights(network()).items()}
    plain, _ = trained(settings=settings)
    with_zero, _ = trained(settings=settings, anchor=anchor, proximal_mu=0.0)
    assert same_bits(plain, with_zero)


@pytest.mark.parametrize("mu", [0.001, 0.3, 1.0])
def test_the_proximal_gradient_is_mu_times_the_distance_to_the_anchor(mu):
    model = network().double()
    anchors = [torch.randn_like(weight) for weight in model.parameters()]
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    add_proximal_gradient(list(model.parameters()), anchors, mu)
    for weight, anchor in zip(model.parameters(), anchors, strict=True):
        torch.testing.assert_close(weight.grad, mu * (weight.detach() - anchor), rtol=1e-14, atol=0)


def test_the_proximal_gradient_is_that_of_the_term_in_the_autograd_graph():
    mu, batch = 0.3, batches(1)[0]
    ours, theirs = network(dropout=0.0), network(dropout=0.0)
    anchors = [torch.randn_like(weight) for weight in ours.parameters()]
    loss = DiceCrossEntropy(TwoHeads.deep_supervision_weights)

    loss(ours(batch.image), batch.label).backward()
    add_proximal_gradient(list(ours.parameters()), anchors, mu)

    term = sum((weight - anchor).square().sum() for weight, anchor in zip(theirs.parameters(), anchors, strict=True))
    (loss(theirs(batch.image), batch.label) + mu / 2 * term).backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_step_from_the_anchor_feels_no_pull():
    model = network()
    plain, _ = trained(copy.deepcopy(model), data=batches(1))
    pulled, _ = trained(copy.deepcopy(model), data=batches(1), anchor=weights(model), proximal_mu=10.0)
    assert same_bits(plain, pulled)


def test_a_larger_mu_stays_nearer_to_the_anchor():
    start = weights(network())
    settings = config(optimizer="sgd", momentum=0.0, learning_rate=0.05)

    def distance(mu):
        found, _ = trained(settings=settings, data=batches(8), anchor=start, proximal_mu=mu)
        return math.sqrt(sum((found[name] - start[name]).square().sum().item() for name in start))

    assert distance(0.0) > distance(1.0) > distance(5.0) > 0


def test_a_step_of_gradient_descent_with_pull_and_clipping_is_that_of_the_formula():
    mu, rate, clip, batch = 0.5, 0.1, 0.2, batches(1)[0]
    model = network(dropout=0.0)
    anchor = {name: value + 0.1 for name, value in weights(model).items()}
    expected = copy.deepcopy(model)
    DiceCrossEntropy(TwoHeads.deep_supervision_weights)(expected(batch.image), batch.label).backward()
    gradients = {name: w.grad + mu * (w.detach() - anchor[name]) for name, w in expected.named_parameters()}
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
    assert norm > clip

    settings = config(optimizer="sgd", momentum=0.0, weight_decay=0.0, learning_rate=rate, clip_norm=clip)
    found, report = trained(model, settings, [batch], anchor=anchor, proximal_mu=mu)
    for name, start in expected.state_dict().items():
        torch.testing.assert_close(found[name], start - rate * clip / norm * gradients[name])
    assert report.gradient_norm == pytest.approx(norm, rel=1e-5)


def test_the_reported_loss_is_without_the_proximal_term():
    far = {name: value + 5 for name, value in weights(network()).items()}
    _, plain = trained(data=batches(1))
    _, pulled = trained(data=batches(1), anchor=far, proximal_mu=1.0)
    assert pulled.loss == plain.loss
    assert pulled.gradient_norm > plain.gradient_norm


def test_a_parameter_without_gradient_is_pulled_too():
    model = network()
    anchor = {name: value + 0.1 for name, value in weights(model).items()}
    before = weights(model)
    found, _ = trained(model, config(deep_supervision=False), anchor=anchor, proximal_mu=1.0)
    assert not torch.equal(found["coarse.weight"], before["coarse.weight"])


@pytest.mark.parametrize(
    ("anchor", "mu", "error", "message"),
    [
        (None, 0.1, ConfigError, "needs an anchor"),
        ({}, -0.1, ConfigError, "not negative"),
        ({}, math.nan, ConfigError, "must be finite"),
        ({}, 0.1, ModelError, "lacks the parameter 'stem.weight'"),
        ({"stem.weight": torch.zeros(2)}, 0.1, ModelError, r"must be \(4, 1, 3, 3, 3\), got \(2,\)"),
    ],
)
def test_an_anchor_that_does_not_fit_is_refused(anchor, mu, error, message):
    with pytest.raises(error, match=message):
        trained(anchor=anchor, proximal_mu=mu)


# ------------------------------------------------------------------------------------------------------ repetition


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_bits(precision):
    settings = config(precision=precision)
    one, report = trained(settings=settings)
    other, again = trained(settings=settings)
    assert same_bits(one, other)
    assert report.loss == again.loss


def test_another_seed_drops_other_features():
    assert not same_bits(trained(seed=1)[0], trained(seed=2)[0])


def test_every_call_starts_with_a_new_optimizer_state():
    settings = config(optimizer="sgd")
    after_one_round, _ = trained(settings=settings)
    model = network()
    trained(model, settings)
    continued, _ = trained(model, settings, batches(seed=5))
    fresh = network(seed=7)
    fresh.load_state_dict(after_one_round)
    assert same_bits(continued, trained(fresh, settings, batches(seed=5))[0])


# --------------------------------------------------------------------------------------------------------- the loop


def test_training_lowers_the_loss():
    losses = []
    data = batches(1) * 40
    trained(network(dropout=0.0), data=data, on_step=lambda step, loss: losses.append(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_the_report_counts_steps_and_patches():
    seen = []
    _, report = trained(data=batches(3), on_step=lambda step, loss: seen.append((step, loss)))
    assert (report.steps, report.cases) == (3, 6)
    assert [step for step, _ in seen] == [1, 2, 3]
    assert report.loss == pytest.approx(sum(loss for _, loss in seen) / 3)
    assert 0 <= report.data_seconds <= report.seconds


def test_a_stopped_training_reports_the_steps_that_it_took():
    taken = []
    found, report = trained(
        data=(taken.append(1) or batch for batch in batches(5)), should_stop=lambda: len(taken) >= 2
    )
    assert report.steps == len(taken) == 2
    assert same_bits(found, trained(data=batches(2))[0])


def test_no_batches_leave_the_weights_alone():
    found, report = trained(data=[])
    assert same_bits(found, weights(network()))
    assert (report.steps, report.cases, report.loss, report.gradient_norm) == (0, 0, 0.0, 0.0)


def test_frozen_parameters_keep_their_bits():
    model = network()
    model.stem.requires_grad_(False)
    before = weights(model)
    after, _ = trained(model, anchor={n: v + 1 for n, v in before.items() if "stem" not in n}, proximal_mu=0.1)
    assert torch.equal(before["stem.weight"], after["stem.weight"])
    assert not torch.equal(before["fine.weight"], after["fine.weight"])


def test_without_deep_supervision_only_the_finest_output_is_trained():
    before = weights(network())
    after, _ = trained(settings=config(deep_supervision=False))
    assert torch.equal(before["coarse.weight"], after["coarse.weight"])
    assert not torch.equal(before["fine.weight"], after["fine.weight"])


def test_a_network_with_a_plain_tensor_as_output_can_be_trained():
    _, report = trained(nn.Conv3d(1, 3, 1))
    assert report.steps == 3


def test_reduced_precision_keeps_single_precision_parameters():
    found, _ = trained(settings=config(precision="bf16"))
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        trained(settings=config(precision="fp16"))


def test_training_that_diverges_says_at_which_step():
    data = batches(3)
    data[1].image[0, 0, 0, 0, 0] = math.nan
    seen = []
    with pytest.raises(TrainingDiverged, match="step 2: loss nan"):
        trained(data=data, on_step=lambda step, loss: seen.append(step))
    assert seen == [1]


def test_training_that_diverges_in_its_last_step_is_noticed():
    data = batches(1)
    data[0].image.fill_(math.inf)
    with pytest.raises(TrainingDiverged, match="step 1"):
        trained(data=data)


def test_channels_last_keeps_values_and_layers_in_2d():
    model = nn.ModuleList([nn.Conv3d(2, 3, 3), nn.Conv2d(2, 3, 3), nn.Linear(2, 3)])
    before = weights(model)
    use_channels_last(model)
    assert same_bits(before, weights(model))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert model[1].weight.is_contiguous()


# ------------------------------------------------------------------------------------------------ the learning rate


@pytest.mark.parametrize(
    ("schedule", "progress", "rate"),
    [
        ("constant", 0.7, 0.01),
        ("poly", 0.0, 0.01),
        ("poly", 0.5, 0.01 * 0.5358867),  # 0.5^0.9
        ("poly", 1.0, 0.0),
        ("cosine", 0.0, 0.01),
        ("cosine", 1 / 3, 0.0075),
        ("cosine", 1.0, 0.0),
    ],
)
def test_learning_rates_by_hand(schedule, progress, rate):
    assert learning_rate(config(schedule=schedule), progress) == pytest.approx(rate, rel=1e-6, abs=1e-12)


@given(st.sampled_from(["constant", "poly", "cosine"]), st.floats(0, 1), st.floats(0, 1))
def test_learning_rates_never_rise(schedule, one, other):
    early, late = sorted((one, other))
    assert learning_rate(config(schedule=schedule), early) >= learning_rate(config(schedule=schedule), late)


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_progress_outside_the_federation_is_refused(progress):
    with pytest.raises(ConfigError, match=r"progress must be in \[0, 1\]"):
        learning_rate(config(), progress)


def test_a_step_at_the_end_of_the_schedule_changes_nothing():
    settings = config(schedule="poly", optimizer="sgd")
    assert same_bits(trained(settings=settings, progress=1.0)[0], weights(network()))
