import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseg.losses import DiceCrossEntropy, label_on_grid, output_weights


def random_case(seed=0, labels=3, size=(4, 6, 5)):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, labels, *size, generator=generator)
    label = torch.randint(0, labels, (2, 1, *size), generator=generator, dtype=torch.uint8)
    return logits, label


def test_loss_of_an_undecided_network_is_one_half_plus_log_two():
    logits = torch.zeros(1, 2, 1, 1, 2)  # probability 1/2 everywhere
    label = torch.tensor([1, 0], dtype=torch.uint8).reshape(1, 1, 1, 1, 2)
    # soft Dice of the foreground: 2 * 0.5 / (1 + 1) = 0.5; cross-entropy: log 2
    assert DiceCrossEntropy()(logits, label).item() == pytest.approx(0.5 + math.log(2), abs=1e-5)


def test_loss_by_hand_with_unequal_probabilities():
    # softmax of (0, log 3) is (1/4, 3/4), of (log 4, 0) is (4/5, 1/5); the label is foreground, background
    logits = torch.tensor([[0.0, math.log(4)], [math.log(3), 0.0]]).reshape(1, 2, 1, 1, 2)
    label = torch.tensor([1, 0]).reshape(1, 1, 1, 1, 2)
    dice = 2 * 0.75 / (0.75 + 0.2 + 1)
    cross_entropy = -(math.log(0.75) + math.log(0.8)) / 2
    assert DiceCrossEntropy()(logits, label).item() == pytest.approx(1 - dice + cross_entropy, abs=1e-5)


def test_a_sure_and_right_network_has_no_loss():
    _, label = random_case()
    logits = 50 * torch.nn.functional.one_hot(label[:, 0].long(), 3).movedim(-1, 1).float()
    assert DiceCrossEntropy()(logits, label).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_single_output_loss_is_that_of_monai(batch_dice):
    from monai.losses import DiceCELoss

    logits, label = random_case()
    theirs = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=batch_dice)
    ours = DiceCrossEntropy(batch_dice=batch_dice)(logits, label)
    assert ours.item() == pytest.approx(theirs(logits, label.float()).item(), abs=1e-5)


def test_deep_supervision_is_the_weighted_sum_of_the_outputs_losses():
    fine, label = random_case(size=(8, 8, 4))
    coarse, _ = random_case(seed=1, size=(4, 2, 2))
    one = DiceCrossEntropy()
    separate = 0.8 * one(fine, label) + 0.2 * one(coarse, label_on_grid(label, (4, 2, 2)))
    assert DiceCrossEntropy([4, 1])((fine, coarse), label).item() == pytest.approx(separate.item(), abs=1e-6)


def test_a_tuple_of_one_output_is_that_output():
    logits, label = random_case()
    loss = DiceCrossEntropy([4 / 7, 2 / 7, 1 / 7])
    assert torch.equal(loss((logits,), label), loss(logits, label))


def test_the_default_weights_halve_and_sum_to_one():
    assert output_weights(3) == pytest.approx((4 / 7, 2 / 7, 1 / 7))


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5))
def test_weights_always_sum_to_one(weights):
    assert sum(output_weights(len(weights), weights)) == pytest.approx(1)


def test_more_outputs_than_weights_are_refused():
    with pytest.raises(ValueError, match="3 outputs need as many deep supervision weights"):
        output_weights(3, [1.0, 0.5])


def test_the_label_on_a_coarser_grid_takes_the_value_at_each_voxels_centre():
    label = torch.arange(8, dtype=torch.uint8).reshape(1, 1, 1, 1, 8)
    assert label_on_grid(label, (1, 1, 4)).flatten().tolist() == [1, 3, 5, 7]
    assert label_on_grid(label, (1, 1, 2)).flatten().tolist() == [2, 6]


def test_the_label_on_its_own_grid_is_itself():
    _, label = random_case()
    assert label_on_grid(label, label.shape[2:]) is label


@settings(deadline=None, max_examples=20)
@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 9)] * 3))
def test_a_resampled_label_has_no_new_values(size, coarser):
    label = torch.randint(0, 5, (1, 1, *size), dtype=torch.uint8)
    found = label_on_grid(label, coarser)
    assert found.shape[2:] == coarser
    assert set(found.int().unique().tolist()) <= set(label.int().unique().tolist())


def test_half_precision_logits_give_a_single_precision_loss():
    logits, label = random_case()
    assert DiceCrossEntropy()(logits.bfloat16(), label).dtype == torch.float32


def test_a_patch_without_a_structure_does_not_count_against_the_batch():
    label = torch.zeros(2, 1, 4, 4, 4, dtype=torch.uint8)
    label[0, :, :2] = 1  # the second patch has background only
    logits = 20 * torch.nn.functional.one_hot(label[:, 0].long(), 2).movedim(-1, 1).float()
    assert DiceCrossEntropy(batch_dice=True)(logits, label).item() < 1e-3
