import json
import subprocess
import sys
from datetime import datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedseg.config import parse_experiment
from fedseg.errors import ConfigError, PolicyRefused, SiteAbstained
from fedseg.federated.messages import SiteUpdate
from fedseg.sections import load_section, validate_section
from fedseg.site.hours import within
from fedseg.site.policy import FIGURES, KINDS, SCORES, Policy, check_cases, check_request, only_allowed

NOON = datetime(2024, 1, 3, 12)  # a Wednesday
STRUCTURES = ("liver", "spleen")


def study(model="unet", privacy=None, **federation):
    document = {
        "name": "toy",
        "task": {"name": "toy", "modality": "mr", "labels": {"background": 0, "liver": 1, "spleen": 2}},
        "model": {"name": model},
        "training": {"patch_size": [32, 32, 32]},
        "federation": {"rounds": 3} | federation,
        "privacy": privacy or {},
    }
    return parse_experiment(json.dumps(document))


def policy(**rules):
    return validate_section(Policy, json.dumps(rules), source="site.toml")


def sums(cases=10.0, structures=STRUCTURES):
    found = {"cases": cases, "failures": 1.0}
    for score in SCORES:
        for name in structures:
            found |= {f"{score}/{name}/sum": 0.5 * cases, f"{score}/{name}/count": cases}
    return found


def update(delta=None, num_cases=20, **fields):
    delta = {"encoder.weight": np.ones((3, 4), np.float32)} if delta is None else delta
    figures = {"loss": 0.4, "steps": 9.0, "seconds": 3.0, "data_seconds": 1.0}
    found = {"sums": sums(), "training": figures, "quarantined": {"missing-label": 1}} | fields
    return SiteUpdate("Aare", 2, delta, num_cases, **found)


def ask(rules, experiment=None, *, train=True, now=NOON, rounds_done=0):
    check_request(rules, experiment or study(), train=train, now=now, rounds_done=rounds_done)


def leave(rules, found=None, validation_cases=10):
    return only_allowed(rules, found or update(), STRUCTURES, validation_cases=validation_cases)


def refused(rule, action):
    with pytest.raises(PolicyRefused, match=rf"^policy\.{rule}: ") as caught:
        action()
    assert caught.value.rule == caught.value.reason == rule
    assert isinstance(caught.value, SiteAbstained)


def broken_rule(action):
    try:
        action()
    except PolicyRefused as refusal:
        return refusal.rule
    return None


ENFORCED = {
    "models": lambda: refused("models", lambda: ask(policy(models=["mlru++"]))),
    "max_local_epochs": lambda: refused("max_local_epochs", lambda: ask(Policy(), study(local_epochs=11))),
    "max_minutes": lambda: same(policy(max_minutes=1.5).seconds, 90.0),
    "labels": lambda: same([name for name in leave(policy(labels=["liver"])).sums if "spleen" in name], []),
    "metrics": lambda: same([name for name in leave(policy(metrics=["dice"])).sums if "hd95" in name], []),
    "min_cases": lambda: refused("min_cases", lambda: check_cases(Policy(), 4)),
    "min_validation_cases": lambda: same(leave(Policy(), validation_cases=2).sums, {}),
    "max_clip_norm": lambda: refused("max_clip_norm", lambda: ask(policy(max_clip_norm=1.0))),
    "min_noise_multiplier": lambda: refused("min_noise_multiplier", lambda: ask(policy(min_noise_multiplier=1.0))),
    "tensors": lambda: refused("tensors", lambda: leave(policy(tensors=["decoder.*"]))),
    "max_megabytes": lambda: refused("max_megabytes", lambda: leave(policy(max_megabytes=0.0005))),
    "max_rounds": lambda: refused("max_rounds", lambda: ask(policy(max_rounds=3), rounds_done=3)),
    "hours": lambda: refused("hours", lambda: ask(policy(hours=["Mo-Fr 18:00-06:00"]))),
}


def same(found, expected):
    assert found == expected


@pytest.mark.parametrize("rule", Policy.model_fields)
def test_every_rule_of_the_policy_is_enforced(rule):
    ENFORCED[rule]()


def test_policy_log_and_manifest_do_not_wait_for_torch():
    code = "import sys, fedseg.site.policy, fedseg.site.audit, fedseg.site.manifest, fedseg.cli.site_audit as _; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_hospital_without_a_policy_lets_an_ordinary_study_pass():
    ask(Policy())
    check_cases(Policy(), 5)
    assert leave(Policy()).encode() == update().encode()


@pytest.mark.parametrize(
    ("rules", "request_", "rule"),
    [
        ({"models": ["unet", "dynunet"]}, {}, None),
        ({"models": []}, {}, "models"),
        ({"max_local_epochs": 4}, {"experiment": study(local_epochs=4)}, None),
        ({"max_local_epochs": 4}, {"experiment": study(local_epochs=5)}, "max_local_epochs"),
        ({"max_local_epochs": 4}, {"experiment": study(local_epochs=5), "train": False}, None),
        ({"max_clip_norm": 1.0}, {"experiment": study(privacy={"clip_norm": 1.0})}, None),
        ({"max_clip_norm": 1.0}, {"experiment": study(privacy={"clip_norm": 1.0001})}, "max_clip_norm"),
        ({"max_clip_norm": 1.0}, {"train": False}, None),
        ({"min_noise_multiplier": 0.0}, {}, None),
        (
            {"min_noise_multiplier": 0.5},
            {"experiment": study(privacy={"clip_norm": 9.0, "noise_multiplier": 0.5})},
            None,
        ),
        (
            {"min_noise_multiplier": 0.5},
            {"experiment": study(privacy={"clip_norm": 9.0, "noise_multiplier": 0.4999})},
            "min_noise_multiplier",
        ),
        ({"max_rounds": 3}, {"rounds_done": 2}, None),
        ({"max_rounds": 3}, {"rounds_done": 3, "train": False}, "max_rounds"),
        ({"hours": ["We 12:00-13:00"]}, {}, None),
        ({"hours": ["We 12:01-13:00"]}, {"train": False}, "hours"),
    ],
)
def test_a_request_is_allowed_up_to_the_boundary_of_each_rule(rules, request_, rule):
    if rule is None:
        ask(policy(**rules), **request_)
    else:
        refused(rule, lambda: ask(policy(**rules), **request_))


def test_as_many_cases_as_the_rule_says_are_enough():
    check_cases(policy(min_cases=7), 7)
    refused("min_cases", lambda: check_cases(policy(min_cases=7), 6))


def test_an_update_of_too_few_cases_is_refused_even_if_nobody_asked_before():
    assert leave(policy(min_cases=20)).num_cases == 20
    refused("min_cases", lambda: leave(policy(min_cases=21)))
    assert leave(policy(min_cases=21), update({})).delta == {}


def test_sums_leave_only_with_enough_validation_cases():
    assert leave(policy(min_validation_cases=10)).sums == sums()
    assert leave(policy(min_validation_cases=11)).sums == {}
    assert leave(policy(min_validation_cases=4), update(sums=sums(3.0))).sums == {}
    assert leave(policy(min_validation_cases=4), update(sums=sums(float("nan")))).sums == {}


def test_a_sum_over_fewer_cases_than_the_others_stays_at_home():
    found = sums() | {"hd95/liver/count": 2.0}
    left = leave(Policy(), update(sums=found)).sums
    assert left.keys() == found.keys() - {"hd95/liver/sum", "hd95/liver/count"}


def test_failures_stay_at_home_where_they_would_tell_of_a_structure_that_may_not_leave():
    left = leave(policy(labels=["liver", "kidney"])).sums
    assert left.keys() == {"cases"} | {f"{score}/liver/{part}" for score in SCORES for part in ("sum", "count")}
    assert "failures" in leave(policy(labels=["spleen", "liver"])).sums


def test_only_the_named_metrics_and_figures_leave():
    left = leave(policy(metrics=["dice", "loss"]))
    assert left.sums.keys() == {"cases"} | {f"dice/{name}/{part}" for name in STRUCTURES for part in ("sum", "count")}
    assert left.training == {"loss": 0.4}
    assert left.quarantined == {}
    nothing = leave(policy(metrics=[]))
    assert (nothing.sums, nothing.training, nothing.quarantined) == ({}, {}, {})
    assert nothing.delta.keys() == update().delta.keys()


def test_what_no_rule_knows_stays_at_home():
    odd = {"patient_7": 1.0, "dice/patient_7/sum": 9.0, "dice/patient_7/count": 9.0, "dice/liver/sum/x": 1.0}
    left = leave(Policy(), update(sums=sums() | odd, training={"loss": 0.4, "patient_7": 3.0}))
    assert left.sums == sums()
    assert left.training == {"loss": 0.4}


def test_a_structure_with_slashes_in_its_name_is_matched_as_a_whole():
    found = sums(structures=("a", "a/sum"))
    rules = policy(labels=["a"])
    left = only_allowed(rules, update(sums=found), ("a", "a/sum"), validation_cases=10).sums
    assert left.keys() == {"cases"} | {f"{score}/a/{part}" for score in SCORES for part in ("sum", "count")}


def test_one_tensor_that_may_not_leave_keeps_the_whole_update_at_home():
    delta = {"decoder.up.weight": np.ones(2, np.float32), "Decoder.secret": np.ones(2, np.float32)}
    refused("tensors", lambda: leave(policy(tensors=["decoder.*"]), update(delta)))
    assert leave(policy(tensors=["decoder.*", "?ecoder.secret"]), update(delta)).delta.keys() == delta.keys()
    refused("tensors", lambda: leave(policy(tensors=[])))
    assert leave(policy(tensors=[]), update({})).delta == {}


def test_the_size_is_that_of_the_message():
    size = len(leave(Policy()).encode())
    assert leave(policy(max_megabytes=size / 1e6)).encode() == update().encode()
    refused("max_megabytes", lambda: leave(policy(max_megabytes=(size - 1) / 1e6)))


def test_what_stays_at_home_does_not_count_as_size():
    size = len(leave(policy(metrics=[])).encode())
    assert leave(policy(metrics=[], max_megabytes=size / 1e6)).sums == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('models = ["unett"]', r"models: no network is called 'unett'; did you mean 'unet'"),
        ('metrics = ["precision"]', r"metrics: no metric is called 'precision'; known are dice, hd95"),
        ('hours = ["nights"]', r"hours: 'nights' is no span of hours; right is"),
        ("hours = []", r"hours: .*at least 1 item"),
        ("min_cases = 0", r"min_cases: .*greater than 0"),
        ("max_minutes = inf", r"max_minutes: "),
        ("max_clip_norms = 1.0", r"max_clip_norms: unknown key; did you mean 'max_clip_norm'"),
        ('tensors = "*"', r"tensors: "),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused_with_the_key(tmp_path, text, told):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_section(Policy, path)


def test_a_policy_is_told_in_words():
    told = dict(policy(models=["unet"], labels=[], hours=["Mo-Fr 18:00-06:00"], max_rounds=9).describe())
    assert list(told) == list(Policy.model_fields)
    assert told["models"] == "networks: only unet"
    assert told["max_local_epochs"] == "at most 10 local epochs"
    assert told["labels"] == "structures whose metrics leave: none"
    assert told["metrics"] == "metrics and figures that leave: all"
    assert told["hours"] == "begins Mo-Fr 18:00-06:00"
    everything = {"max_minutes": None, "tensors": ["a.*"], "max_clip_norm": 1.0, "min_noise_multiplier": 0.5}
    assert dict(policy(**everything).describe())["min_noise_multiplier"] == "noise multiplier of 0.5 or more"
    assert all(words for _, words in policy(**everything).describe())


maybe = st.none
POLICIES = st.fixed_dictionaries(
    {
        "models": maybe() | st.lists(st.sampled_from(["unet", "dynunet", "mlru++"])),
        "max_local_epochs": st.integers(1, 4),
        "labels": maybe() | st.lists(st.sampled_from([*STRUCTURES, "kidney"])),
        "metrics": maybe() | st.lists(st.sampled_from(KINDS)),
        "min_cases": st.integers(1, 6),
        "min_validation_cases": st.integers(1, 6),
        "max_clip_norm": maybe() | st.floats(0.5, 2.0),
        "min_noise_multiplier": maybe() | st.floats(0.0, 2.0),
        "tensors": st.lists(st.sampled_from(["*", "enc*", "dec*", "*.bias"])),
        "max_megabytes": st.sampled_from([0.0005, 0.001, 0.002, 1.0]),
        "max_rounds": maybe() | st.integers(1, 4),
        "hours": maybe() | st.sampled_from([["Mo-Fr 18:00-06:00"], ["Sa-Su 00:00-24:00"], ["We 12:00-12:01"]]),
    }
)
STUDIES = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["unet", "dynunet"]),
        "local_epochs": st.integers(1, 5),
        "privacy": maybe()
        | st.fixed_dictionaries({"clip_norm": st.floats(0.5, 3.0), "noise_multiplier": st.floats(0.0, 3.0)}),
    }
)


@given(POLICIES, STUDIES, st.booleans(), st.datetimes(), st.integers(0, 5))
def test_no_request_passes_that_any_rule_forbids(rules, asked, train, now, rounds_done):
    hospital, experiment = policy(**rules), study(**asked)
    clip, noise = experiment.privacy.clip_norm, experiment.privacy.noise_multiplier
    broken = {
        "models": rules["models"] is not None and asked["model"] not in rules["models"],
        "max_rounds": rules["max_rounds"] is not None and rounds_done >= rules["max_rounds"],
        "max_local_epochs": train and asked["local_epochs"] > rules["max_local_epochs"],
        "max_clip_norm": train and rules["max_clip_norm"] is not None and (clip or 1e9) > rules["max_clip_norm"],
        "min_noise_multiplier": train and noise < (rules["min_noise_multiplier"] or 0.0),
        "hours": rules["hours"] is not None and not within(rules["hours"], now),
    }
    rule = broken_rule(lambda: ask(hospital, experiment, train=train, now=now, rounds_done=rounds_done))
    assert broken[rule] if rule else not any(broken.values())


@given(
    POLICIES,
    st.lists(st.sampled_from(["encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"]), unique=True),
    st.integers(0, 8),
    st.integers(0, 8),
    st.lists(st.sampled_from([*STRUCTURES, "patient_7"]), unique=True),
)
def test_nothing_leaves_that_any_rule_forbids(rules, tensors, training, validation, scored):
    hospital = policy(**rules)
    found = update({name: np.ones(16, np.float32) for name in tensors}, training, sums=sums(float(validation), scored))
    rule = broken_rule(lambda: leave(hospital, found, validation))
    assert rule in {None, "tensors", "max_megabytes", "min_cases"}
    if rule is not None:
        return
    left = leave(hospital, found, validation)
    kinds = KINDS if rules["metrics"] is None else rules["metrics"]
    labels = STRUCTURES if rules["labels"] is None else rules["labels"]
    assert left.delta.keys() == found.delta.keys()
    assert not left.delta or training >= rules["min_cases"]
    assert len(left.encode()) <= 1e6 * rules["max_megabytes"]
    assert not left.sums or validation >= rules["min_validation_cases"]
    assert left.training.keys() == set(FIGURES) & set(kinds)
    for name in left.sums.keys() - {"cases", "failures"}:
        score, label, _ = name.split("/")
        assert score in kinds
        assert label in labels
        assert label in STRUCTURES
    assert "failures" not in left.sums or ("failures" in kinds and set(STRUCTURES) <= set(labels))
