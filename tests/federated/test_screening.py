import math
from dataclasses import replace

import numpy as np
import pytest

from fedseg.config import ScreeningConfig
from fedseg.errors import UpdateRefused
from fedseg.federated.messages import RoundInstructions
from fedseg.federated.screening import MAX_CASES, screen
from fedseg.federated.weights import norm
from tests.federated.toys import toy_update, toy_weights, with_delta

WEIGHTS = toy_weights()
GOOD = toy_update("A", RoundInstructions(2, WEIGHTS, "{}"))


def refusal(update, norms=(), **limits):
    with pytest.raises(UpdateRefused, match="update of A for round") as caught:
        screen(update, 2, WEIGHTS, norms, ScreeningConfig(**limits))
    return caught.value.reason


def spoiled(value):
    bias = GOOD.delta["bias"].copy()
    bias[3] = value
    return with_delta(GOOD, bias=bias)


def without(name):
    return replace(GOOD, delta={key: value for key, value in GOOD.delta.items() if key != name})


def test_a_good_update_passes_with_its_norm():
    assert screen(GOOD, 2, WEIGHTS, (), ScreeningConfig()) == norm(GOOD.delta)


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (replace(GOOD, server_round=1), "stale"),
        (replace(GOOD, server_round=3), "stale"),
        (replace(GOOD, num_cases=0), "no-cases"),
        (replace(GOOD, num_cases=-3), "no-cases"),
        (replace(GOOD, num_cases=MAX_CASES + 1), "no-cases"),
        (replace(GOOD, num_cases=10**400), "no-cases"),
        (replace(GOOD, delta={}), "wrong-names"),
        (without("bias"), "wrong-names"),
        (with_delta(GOOD, extra=np.zeros(1, np.float32)), "wrong-names"),
        (with_delta(GOOD, bias=GOOD.delta["bias"].astype(np.float64)), "wrong-dtype"),
        (with_delta(GOOD, bias=GOOD.delta["bias"].astype(np.float16)), "wrong-dtype"),
        (with_delta(GOOD, bias=np.zeros(5, np.int64)), "wrong-dtype"),
        (with_delta(GOOD, bias=GOOD.delta["bias"][:4]), "wrong-shape"),
        (with_delta(GOOD, bias=GOOD.delta["bias"][None]), "wrong-shape"),
        (with_delta(GOOD, temperature=np.zeros(1, np.float32)), "wrong-shape"),
        (spoiled(math.nan), "non-finite"),
        (spoiled(math.inf), "non-finite"),
        (spoiled(-math.inf), "non-finite"),
        (replace(GOOD, sums={"cases": math.nan}), "non-finite"),
        (replace(GOOD, training={"loss": math.inf}), "non-finite"),
        (replace(GOOD, sums={"dice/liver/sum": 1.0}), "wrong-metrics"),
        (replace(GOOD, sums={"dice/liver/count": 1.0}), "wrong-metrics"),
    ],
)
def test_each_fault_is_refused_with_its_reason(update, reason):
    assert refusal(update) == reason


def test_a_norm_far_above_the_usual_one_is_refused():
    usual = norm(GOOD.delta)
    assert refusal(spoiled(100.0), [usual] * 3, max_norm_ratio=20.0) == "absurd-norm"
    assert screen(GOOD, 2, WEIGHTS, [usual / 19] * 3, ScreeningConfig(max_norm_ratio=20.0)) == usual
    assert refusal(GOOD, [usual / 21] * 3, max_norm_ratio=20.0) == "absurd-norm"


def test_running_statistics_do_not_count_in_the_norm_but_must_be_finite():
    moved = spoiled(1e6)
    assert refusal(moved, norms=(1.0,)) == "absurd-norm"
    parameters = {key: value for key, value in GOOD.delta.items() if key != "bias"}
    assert screen(moved, 2, WEIGHTS, (1.0,), ScreeningConfig(), {"bias"}) == norm(parameters)
    with pytest.raises(UpdateRefused) as caught:
        screen(spoiled(np.inf), 2, WEIGHTS, (1.0,), ScreeningConfig(), {"bias"})
    assert caught.value.reason == "non-finite"


def test_a_fixed_limit_counts_from_the_first_round():
    assert refusal(GOOD, max_norm=norm(GOOD.delta) / 2) == "absurd-norm"


def test_sites_that_all_stood_still_do_not_lock_the_door():
    assert screen(GOOD, 2, WEIGHTS, [0.0] * 3, ScreeningConfig()) > 0


def test_a_refusal_does_not_name_more_tensors_than_fit_a_log_line():
    update = replace(GOOD, delta={f"layer-{number}": np.zeros(1, np.float32) for number in range(1000)})
    with pytest.raises(UpdateRefused) as caught:
        screen(update, 2, WEIGHTS, (), ScreeningConfig())
    assert len(str(caught.value)) < 300
