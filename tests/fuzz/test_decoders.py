"""What crosses a boundary is read or refused with an error of ours, whatever it is, and in memory that fits its size."""

import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.decoders import DECODERS, UNSIGNED, decode

FUZZ = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
JSON = [name for name, decoder in DECODERS.items() if decoder.seeds[0].startswith((b"{", b"["))]

numbers = st.integers() | st.sampled_from([-1, 2**31, 2**63, 2**64, 10**300, 10**4000]) | st.floats()
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw, seeds):
    """One of the seeds, with bytes changed, inserted, removed, repeated or swapped."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 5))):
        at, other = (draw(st.integers(0, len(data))) for _ in range(2))
        match draw(st.sampled_from(["set", "insert", "cut", "end", "repeat", "grow"])):
            case "set":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=9))
            case "cut":
                del data[min(at, other) : max(at, other)]
            case "end":
                del data[at:]
            case "repeat":
                data[at:at] = data[min(at, other) : max(at, other)]
            case "grow":
                data[at:at] = draw(st.sampled_from([b"9", b"[", b'{"a":', b"\xff", b" "])) * draw(st.integers(1, 3000))
    return bytes(data)


@pytest.mark.parametrize("name", DECODERS)
def test_damaged_input_is_read_or_refused_with_an_error_of_ours(name):
    @FUZZ
    @given(damaged(DECODERS[name].seeds) | st.binary(max_size=200))
    def hold(data):
        decode(name, data)

    hold()


@st.composite
def changed(draw, document):
    """A JSON document in which a value somewhere is another one, or a key is added or missing."""
    place, parents = document, []
    while isinstance(place, dict | list) and place and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        parents.append((place, key))
        place = place[key]
    value = draw(json_values)
    if isinstance(place, dict) and draw(st.booleans()):
        value = {**place, draw(st.text(max_size=6)): value}
    for parent, key in reversed(parents):
        copy = dict(parent) if isinstance(parent, dict) else list(parent)
        copy[key] = value
        value = copy
    return value


@pytest.mark.parametrize("name", JSON)
def test_a_document_with_wrong_values_is_read_or_refused_with_an_error_of_ours(name):
    document = json.loads(DECODERS[name].seeds[0])

    @FUZZ
    @given(changed(document))
    def hold(other):
        decode(name, json.dumps(other).encode())

    hold()


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_deeply_nested_is_refused(name):
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}"), (b"a = [", b"]"), (b"a.", b" = 1")):
        understood = decode(name, opening * 30_000 + b"1" + closing * 30_000)
        assert not understood or name in ("record", "pieces", "audit-line", "audit-log")  # which say so in other ways


@pytest.mark.parametrize("name", DECODERS)
def test_memory_is_in_proportion_to_what_came(name):
    seeds = DECODERS[name].seeds
    for seed in seeds:
        decode(name, seed)
    for data in (*seeds, b"[" + b"{}," * 20_000 + b"{}]", b'{"' + b"a" * 100_000 + b'": 1}', bytes(100_000)):
        tracemalloc.start()
        decode(name, data)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2_000_000 + 60 * len(data)


@pytest.mark.parametrize("name", sorted(DECODERS.keys() - UNSIGNED))
def test_the_seeds_are_understood(name):
    """Else only the first check of a decoder would ever be reached."""
    assert decode(name, DECODERS[name].seeds[0])
