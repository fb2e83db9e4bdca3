import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseg.errors import UpdateRefused
from fedseg.federated.aggregation import RobustMean, StreamingMean, make_aggregator
from fedseg.federated.weights import CHUNK
from tests.federated.toys import same, toy_weights


def array(*values):
    return {"w": np.array(values, np.float32)}


def join(aggregator, updates):
    for number, (delta, weight) in enumerate(updates):
        aggregator.fold(f"site-{number}", delta, weight)
    return aggregator.result()


def test_the_mean_is_weighted_by_cases():
    joined = join(StreamingMean(), [(array(1.0, -2.0), 1), (array(4.0, 2.0), 3), (array(0.0, 0.0), 4)])
    assert joined["w"].tolist() == [(1 + 12) / 8, (-2 + 6) / 8]
    assert joined["w"].dtype == np.float32


def test_the_mean_of_one_update_is_that_update():
    delta = array(1e-30, -3e-12, 0.1)
    assert same(join(StreamingMean(), [(delta, 7)]), delta)


def test_the_mean_keeps_every_shape():
    joined = join(StreamingMean(), [(toy_weights(seed), 2) for seed in (1, 2)])
    assert {name: value.shape for name, value in joined.items()} == {
        "conv": (4, 3, 3), "bias": (5,), "temperature": (), "none": (0, 2), "norm.running_var": (4,)
    }  # fmt: skip


def test_the_mean_reads_tensors_in_their_logical_order_whatever_their_strides():
    one, other = (np.arange(12, dtype=np.float32).reshape(3, 4) * scale for scale in (1, 3))
    joined = join(StreamingMean(), [({"w": np.asfortranarray(one)}, 1), ({"w": other.T.copy().T}, 1)])
    assert (joined["w"] == 2 * one).all()


def test_the_order_of_sites_does_not_change_a_bit():
    updates = [(toy_weights(seed, scale=10.0 ** (seed - 3)), seed + 1) for seed in range(5)]
    results = [join(StreamingMean(), order) for order in itertools.permutations(updates)]
    assert all(same(result, results[0]) for result in results)


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.floats(-6e7, 6e7, width=32) | st.floats(-(2.0**45), 2.0**45, width=32), st.integers(1, 1)),
        min_size=2,
        max_size=8,
    ),
    st.randoms(use_true_random=False),
)
def test_sums_beyond_64_bits_are_still_exact_in_any_order(updates, random):
    shuffled = random.sample(updates, len(updates))
    one, other = (
        join(StreamingMean(), [(array(value), weight) for value, weight in order]) for order in (updates, shuffled)
    )
    assert same(one, other)
    units = sum(Fraction(round(Fraction(value) * 2**36)) for value, _ in updates)
    assert one["w"][0] == np.float32(float(units) * (1 / len(updates)) * 2.0**-36)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(-3, 3, width=32), st.integers(1, 500)), min_size=1, max_size=12))
def test_the_mean_is_within_its_bound_of_the_exact_mean(updates):
    exact = sum(Fraction(value) * weight for value, weight in updates) / sum(weight for _, weight in updates)
    joined = join(StreamingMean(), [(array(value), weight) for value, weight in updates])["w"][0]
    assert abs(Fraction(float(joined)) - exact) <= Fraction(abs(exact)) / 2**23 + Fraction(len(updates), 2**36)


def test_a_tensor_longer_than_a_chunk_is_added_whole():
    values = np.arange(2 * CHUNK + 3, dtype=np.float32)
    assert (join(StreamingMean(), [({"w": values}, 1), ({"w": 3 * values}, 1)])["w"] == 2 * values).all()


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_value_too_large_to_add_is_refused_whenever_it_comes_and_changes_nothing(position):
    mean, small = StreamingMean(), [array(1.0), array(3.0)]
    for number in range(3):
        if number == position:
            with pytest.raises(UpdateRefused, match="cannot be added exactly") as caught:
                mean.fold("large", array(1e12), 100)
            assert caught.value.reason == "too-large"
        else:
            mean.fold("small", small.pop(0), 1)
    assert mean.result()["w"].tolist() == [2.0]


def test_the_mean_does_not_change_what_it_was_given():
    deltas = [toy_weights(1), toy_weights(2)]
    join(StreamingMean(), [(delta, 3) for delta in deltas])
    assert same(deltas[0], toy_weights(1))
    assert same(deltas[1], toy_weights(2))


def test_the_median_is_taken_per_value_and_ignores_weights():
    updates = [(array(1.0, 9.0), 100), (array(2.0, -5.0), 1), (array(1e30, 0.0), 1)]
    assert join(make_aggregator("median", 0.2), updates)["w"].tolist() == [2.0, 0.0]


def test_the_median_of_an_even_number_is_the_mean_of_the_two_in_the_middle():
    assert join(make_aggregator("median", 0.2), [(array(value), 1) for value in (9.0, 1.0, 2.0, 4.0)])[
        "w"
    ].tolist() == [3.0]


def test_the_trimmed_mean_drops_its_share_at_each_end():
    values = [(array(value), 1) for value in (100.0, 1.0, 2.0, 6.0, -100.0)]
    assert join(make_aggregator("trimmed-mean", 0.2), values)["w"].tolist() == [3.0]
    assert join(make_aggregator("trimmed-mean", 0.0), values)["w"][0] == pytest.approx(1.8)


@pytest.mark.parametrize(("trim", "count", "dropped"), [(0.1, 30, 3), (0.29, 100, 29), (0.2, 4, 0), (0.49, 3, 1)])
def test_the_number_of_dropped_values_is_not_at_the_mercy_of_rounding(trim, count, dropped):
    values = [float(10**6)] * dropped + [1.0] * (count - 2 * dropped) + [-float(10**6)] * dropped
    assert join(RobustMean(trim), [(array(value), 1) for value in values])["w"].tolist() == [1.0]


@pytest.mark.parametrize("aggregate", ["median", "trimmed-mean"])
def test_robust_means_do_not_depend_on_the_order_of_sites(aggregate):
    updates = [(toy_weights(seed), 1) for seed in range(4)]
    results = [join(make_aggregator(aggregate, 0.3), order) for order in itertools.permutations(updates)]
    assert all(same(result, results[0]) for result in results)
    assert results[0]["temperature"].shape == ()


def test_large_and_small_updates_are_averaged_to_float32_precision():
    deltas = [np.float32(math.pi) * np.float32(10.0) ** exponent for exponent in (-4, 0, 3)]
    joined = join(StreamingMean(), [(array(delta), 5) for delta in deltas])["w"][0]
    assert joined == np.float32(sum(float(delta) for delta in deltas) / 3)
