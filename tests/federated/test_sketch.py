import math

import numpy as np
import pytest

from fedseg.federated.sketch import BUCKETS, cosine, sketch
from tests.federated.toys import toy_weights


def tensors(seed, *sizes):
    generator = np.random.default_rng(seed)
    return {f"layer-{number}": generator.standard_normal(size, np.float32) for number, size in enumerate(sizes)}


def mixed(one, other, wanted):
    """Something whose cosine with `one` is about `wanted`."""
    rest = math.sqrt(1 - wanted**2)
    return {name: np.float32(wanted) * one[name] + np.float32(rest) * other[name] for name in one}


def exactly(one, other):
    x, y = (np.concatenate([part[name].reshape(-1) for name in sorted(part)]).astype(float) for part in (one, other))
    return x @ y / np.linalg.norm(x) / np.linalg.norm(y)


@pytest.mark.parametrize("wanted", [-0.9, -0.3, 0.0, 0.1, 0.5, 0.95])
def test_cosines_are_within_four_standard_errors_of_the_exact_ones(wanted):
    one = tensors(1, (64, 32, 3, 3, 3), 100_000, 64, (), (0, 3))
    other = mixed(one, tensors(2, (64, 32, 3, 3, 3), 100_000, 64, (), (0, 3)), wanted)
    assert abs(cosine(sketch(one), sketch(other)) - exactly(one, other)) < 4 * math.sqrt(2 / BUCKETS)


def test_the_mean_over_many_vectors_is_right_and_their_spread_is_the_promised_one():
    errors = []
    for seed in range(200):
        one, other = tensors(seed, 40_000, 50), tensors(1000 + seed, 40_000, 50)
        errors.append(cosine(sketch(one), sketch(other)) - exactly(one, other))
    assert abs(np.mean(errors)) < 4 / math.sqrt(200 * BUCKETS)
    assert np.std(errors) < 1.3 / math.sqrt(BUCKETS)


def test_energy_that_repeats_with_the_rows_does_not_pile_up():
    """The same column of every row, as in a tensor with one strong channel: with fixed buckets all of it would fall into one."""
    one, other = (np.zeros((64, BUCKETS), np.float32) for _ in range(2))
    one[:, 0], other[:, 0] = np.random.default_rng(3).choice([-1, 1], (2, 64))
    found = cosine(sketch({"conv": one}), sketch({"conv": other}))
    assert abs(found - exactly({"conv": one}, {"conv": other})) < 0.1


def test_a_sketch_is_linear_so_parallel_updates_have_cosines_of_one():
    one = tensors(4, 30_000, 7)
    assert cosine(sketch(one), sketch({name: -2 * array for name, array in one.items()})) == pytest.approx(-1)
    other = tensors(5, 30_000, 7)
    both = sketch({name: one[name] + other[name] for name in one})
    np.testing.assert_allclose(both, sketch(one) + sketch(other), atol=1e-4)


def test_a_sketch_is_the_same_every_time_whatever_the_order_and_the_layout_of_tensors():
    one = toy_weights()
    turned = {name: np.asfortranarray(one[name]) for name in reversed(one)}
    assert sketch(one).tobytes() == sketch(turned).tobytes()


def test_tensors_that_are_left_out_do_not_count():
    one = toy_weights()
    other = one | {"norm.running_var": 1e6 * one["norm.running_var"]}
    assert cosine(sketch(one, {"norm.running_var"}), sketch(other, {"norm.running_var"})) == pytest.approx(1)


def test_an_update_of_zeros_has_no_direction():
    nothing = {name: np.zeros_like(array) for name, array in toy_weights().items()}
    assert cosine(sketch(nothing), sketch(toy_weights())) is None
    assert cosine(sketch({}), sketch(toy_weights())) is None
