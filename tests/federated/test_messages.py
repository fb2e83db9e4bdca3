import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save as save_tensors

from fedseg.errors import MessageError
from fedseg.federated.messages import FORMAT, RoundInstructions, SiteUpdate
from tests.federated.toys import same, toy_update, toy_weights

INSTRUCTIONS = RoundInstructions(4, toy_weights(), '{"name": "ü"}', train=False, evaluate=True, surface=True)
UPDATE = toy_update("A", RoundInstructions(4, toy_weights(), "{}"))


def document(**changes):
    header = {"format": FORMAT, "version": "0", "kind": "update"} | UPDATE.header() | changes
    return save_tensors(UPDATE.delta, metadata={"fedseg": json.dumps(header)})


def test_instructions_survive_the_wire():
    got = RoundInstructions.decode(INSTRUCTIONS.encode())
    assert got.header() == INSTRUCTIONS.header()
    assert same(got.weights, INSTRUCTIONS.weights)


def test_updates_survive_the_wire():
    got = SiteUpdate.decode(UPDATE.encode())
    assert got.header() == UPDATE.header()
    assert same(got.delta, UPDATE.delta)


names = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=8)
arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))


@settings(max_examples=50)
@given(st.dictionaries(names, arrays, max_size=3), st.dictionaries(names, st.floats(), max_size=3))
def test_every_bit_of_tensors_and_numbers_survives(delta, sums):
    got = SiteUpdate.decode(SiteUpdate("Zürich", 1, delta, 3, sums).encode())
    assert same(got.delta, delta)
    assert {key: value.hex() for key, value in got.sums.items()} == {key: value.hex() for key, value in sums.items()}


def test_tensors_with_other_strides_arrive_in_their_logical_order():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    got = SiteUpdate.decode(replace(UPDATE, delta={"w": array.T}).encode())
    assert (got.delta["w"] == array.T).all()


@given(st.binary(max_size=300))
def test_random_bytes_are_no_message(data):
    for kind in (RoundInstructions, SiteUpdate):
        with pytest.raises(MessageError):
            kind.decode(data)


@settings(max_examples=300)
@given(st.data())
def test_damaged_messages_raise_nothing_but_message_errors(data):
    message = bytearray(data.draw(st.sampled_from([UPDATE.encode(), INSTRUCTIONS.encode()])))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(message) - 1))
        match data.draw(st.sampled_from(["change", "insert", "cut", "end"])):
            case "change":
                message[position] = data.draw(st.integers(0, 255))
            case "insert":
                message[position:position] = data.draw(st.binary(min_size=1, max_size=9))
            case "cut":
                del message[position : position + data.draw(st.integers(1, 40))]
            case "end":
                message = message[: max(position, 1)]
        if not message:
            return
    for kind in (RoundInstructions, SiteUpdate):
        try:
            kind.decode(bytes(message))
        except MessageError:
            continue


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@settings(max_examples=200)
@given(
    st.sampled_from(["site", "server_round", "num_cases", "sums", "training", "quarantined", "kind", "format", "x"]),
    json_values,
)
def test_wrong_fields_raise_nothing_but_message_errors(key, value):
    try:
        got = SiteUpdate.decode(document(**{key: value}))
    except MessageError:
        return
    assert type(got.num_cases) is int
    assert all(type(number) is float for number in (*got.sums.values(), *got.training.values()))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "instructions"}, "kind 'update'"),
        ({"format": 99}, "same fedseg release"),
        ({"more": 1}, r"\['more'\] are missing or unknown"),
        ({"num_cases": 3.0}, "num_cases must be int, got float"),
        ({"num_cases": -1}, "num_cases must be between 0 and 1000000000"),
        ({"num_cases": 10**30}, "num_cases must be between"),
        ({"server_round": -1}, "server_round must be between"),
        ({"server_round": 2**63}, "server_round must be between"),
        ({f"{number:04d}" * 200: 1 for number in range(20)}, r"^.{0,2000}are missing or unknown"),
        ({"num_cases": True}, "num_cases must be int, got bool"),
        ({"sums": {"dice": "1"}}, "sums must map"),
        ({"sums": {"dice": True}}, "sums must map"),
        ({"sums": {"dice": 10**400}}, "too large"),
        ({"sums": {"x" * 5000: 1.0}}, "sums must map short printable names"),
        ({"training": {"\ud800": 1.0}}, "training must map short printable names"),
        ({"training": {"a\nb": 1.0}}, "training must map short printable names"),
        ({"quarantined": {"missing-label": -1}}, "quarantined must map"),
        ({"quarantined": {"missing-label": 1.5}}, "quarantined must map"),
        ({"quarantined": {"": 1}}, "quarantined must map"),
        ({"site": ""}, "site must be a short printable name"),
        ({"site": "\ud800"}, "site must be a short printable name"),
    ],
)
def test_a_field_that_does_not_fit_is_named(changes, match):
    with pytest.raises(MessageError, match=match):
        SiteUpdate.decode(document(**changes))


def test_nested_headers_do_not_exhaust_the_stack():
    nested = "[" * 200_000 + "]" * 200_000
    with pytest.raises(MessageError):
        SiteUpdate.decode(save_tensors({}, metadata={"fedseg": nested}))


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F16", "I64", "U8", "BOOL", "X"])
def test_tensors_of_any_other_type_are_decoded_for_screening_or_are_no_message(dtype):
    header = {
        "w": {"dtype": dtype, "shape": [], "data_offsets": [0, 8 if dtype == "I64" else 2 if "16" in dtype else 1]}
    }
    header["__metadata__"] = {"fedseg": json.dumps({"format": FORMAT, "kind": "update"} | UPDATE.header())}
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(header["w"]["data_offsets"][1])
    try:
        assert SiteUpdate.decode(data).delta["w"].dtype != np.float32
    except MessageError:
        assert dtype not in ("F16", "I64")


def test_values_that_are_not_finite_reach_screening_as_they_are():
    got = SiteUpdate.decode(document(sums={"dice/a/sum": math.nan, "dice/a/count": math.inf}))
    assert math.isnan(got.sums["dice/a/sum"])
    assert got.sums["dice/a/count"] == math.inf
