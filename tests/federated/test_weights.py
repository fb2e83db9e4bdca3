import math

import numpy as np
import pytest

from fedseg.federated.weights import chunks, digest, norm, num_bytes, subtract
from tests.federated.toys import toy_weights


def test_the_norm_is_over_all_tensors():
    assert norm({"a": np.array([3.0], np.float32), "b": np.array([[0.0, 4.0]], np.float32)}) == 5.0
    assert norm({}) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e25])
def test_the_norm_tells_of_any_value_that_is_not_finite_or_overflows(bad):
    values = np.ones(20_000, np.float32)
    values[12_345] = bad
    assert not math.isfinite(norm({"good": np.ones(3, np.float32), "bad": values}))


def test_the_norm_does_not_depend_on_the_order_of_tensors():
    generator = np.random.default_rng(0)
    weights = {str(number): np.float32(10) ** number * generator.random(99, np.float32) for number in range(-4, 4)}
    assert norm(weights) == norm(dict(reversed(weights.items()))) == norm(dict(sorted(weights.items())))


def test_an_update_is_trained_minus_received():
    delta = subtract({"w": np.array([3.0], np.float32)}, {"w": np.array([1.0], np.float32)})
    assert delta["w"].tolist() == [2.0]


def test_the_digest_is_of_names_shapes_and_bytes_and_not_of_order_or_strides():
    weights = toy_weights()
    assert digest(weights) == digest(dict(reversed(weights.items())))
    assert digest(weights) == digest(weights | {"conv": np.asfortranarray(weights["conv"])})
    assert digest(weights) != digest(weights | {"conv": weights["conv"].reshape(3, 4, 3)})
    assert digest(weights) != digest({f"_{name}": value for name, value in weights.items()})
    changed = weights["conv"].copy()
    changed[0, 0, 0] = np.nextafter(changed[0, 0, 0], np.float32(9))
    assert digest(weights) != digest(weights | {"conv": changed})


def test_bytes_and_chunks_cover_everything_once():
    assert num_bytes(toy_weights()) == 4 * (36 + 5 + 1 + 0 + 4)
    flat = np.arange(10, dtype=np.float32)
    assert [part.tolist() for part in chunks(flat, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
