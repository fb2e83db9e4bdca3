import json
import multiprocessing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load, save

from fedseg.federated.document import pack, unpack
from fedseg.federated.mailbox import Mailbox
from tests.federated.toys import toy_weights

TYPES = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]
arrays = st.sampled_from(TYPES).flatmap(
    lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))
)


@settings(max_examples=50)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), arrays, max_size=5))
def test_the_safetensors_library_reads_what_we_write_and_we_read_what_it_writes(tensors):
    tensors.pop("__metadata__", None)
    header = {"a": 1, "b": [None, "ü"]}
    ours, theirs = b"".join(pack(tensors, header)), save(tensors, metadata={"fedseg": json.dumps(header)})
    got_header, got = unpack(theirs)
    for read in (load(ours), got, unpack(ours)[1]):
        assert {name: (array.dtype, array.shape, array.tobytes()) for name, array in read.items()} == {
            name: (array.dtype, array.shape, array.tobytes()) for name, array in tensors.items()
        }
    assert got_header == header == unpack(ours)[0]


def test_the_same_tensors_give_the_same_bytes_whatever_their_order_and_strides():
    weights = toy_weights()
    other = dict(reversed(weights.items())) | {"conv": np.asfortranarray(weights["conv"])}
    assert b"".join(pack(weights, {})) == b"".join(pack(other, {}))


def test_tensors_are_neither_copied_on_the_way_out_nor_on_the_way_in():
    weights = {"w": np.arange(5, dtype=np.float32)}
    assert np.shares_memory(np.frombuffer(pack(weights, {})[1], np.float32), weights["w"])
    data = np.frombuffer(b"".join(pack(weights, {})), np.uint8)
    assert np.shares_memory(unpack(data.data)[1]["w"], data)


def document(table, size):
    text = json.dumps({"__metadata__": {"fedseg": "{}"}} | table).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def entry(begin, end, shape=(1,), kind="F32"):
    return {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("table", "size"),
    [
        ({"w": entry(0, 4)}, 3),
        ({"w": entry(0, 4)}, 5),
        ({"w": entry(4, 8)}, 8),
        ({"w": entry(0, 8)}, 8),
        ({"w": entry(0, 4), "x": entry(0, 4)}, 4),
        ({"w": entry(0, 4), "x": entry(2, 6)}, 6),
        ({"w": entry(-4, 0)}, 0),
        ({"w": entry(0, 4, (-1, -1))}, 4),
        ({"w": entry(0, 4, (1.0,))}, 4),
        ({"w": entry(0, 4, (True,))}, 4),
        ({"w": entry(0, 2**70, (2**68,))}, 4),
        ({"w": entry(0, 4, kind="F33")}, 4),
        ({"w": {"dtype": "F32"}}, 4),
        ({"w": 3}, 4),
    ],
)
def test_tensors_that_are_not_where_they_should_be_are_refused(table, size):
    with pytest.raises(ValueError, match=r"the table|the bytes of|bytes behind|cut short|whole numbers"):
        unpack(document(table, size))


@pytest.mark.parametrize(
    "data", [b"", b"1234567", (2**63).to_bytes(8, "little"), (9).to_bytes(8, "little") + b"{}", b"\0" * 8]
)
def test_a_table_that_is_not_there_is_refused(data):
    with pytest.raises(ValueError, match=r"the table is|Expecting value"):
        unpack(data)


def echo(pipe, inbox, outbox):
    size = int(pipe.recv_bytes())
    pipe.send_bytes(b"%d" % outbox.write(inbox.read(size), b"!"))


def test_a_mailbox_carries_bytes_between_processes():
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    inbox, outbox = Mailbox(), Mailbox()
    process = context.Process(target=echo, args=(theirs, inbox, outbox))
    process.start()
    ours.send_bytes(b"%d" % inbox.write(b"a longer message"[:9], b"x" * 300_000))
    got = bytes(outbox.read(int(ours.recv_bytes())))
    process.join()
    assert got == b"a longer " + b"x" * 300_000 + b"!"
    inbox.close()
    outbox.close()


def test_a_mailbox_keeps_only_the_last_message_and_says_when_it_is_too_short():
    mailbox = Mailbox()
    mailbox.write(b"first, longer")
    assert bytes(mailbox.read(mailbox.write(b"second"))) == b"second"
    with pytest.raises(EOFError, match="expected 99 bytes, found 13"):
        mailbox.read(99)
    mailbox.close()
