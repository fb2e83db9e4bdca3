import numpy as np
import pytest

from fedseg.errors import MessageError
from fedseg.site.pieces import PIECE, cut, join
from fedseg.site.wire.site_pb2 import Piece


@pytest.mark.parametrize("sizes", [(0,), (1,), (PIECE,), (PIECE + 1,), (3 * PIECE, 0, 5), (7, PIECE, 7)])
def test_what_is_cut_is_joined_again(sizes):
    buffers = [np.arange(size, dtype=np.uint8) for size in sizes]
    pieces = list(cut(*buffers))
    assert join(pieces, 1 << 30) == b"".join(buffer.tobytes() for buffer in buffers)
    assert all(len(piece.data) <= PIECE for piece in pieces)
    assert pieces[0].total == sum(sizes)


def test_arrays_of_any_type_are_cut_into_their_bytes():
    array = np.arange(6, dtype=np.float64).reshape(2, 3)
    assert join(cut(array, b"x"), 100) == array.tobytes() + b"x"


def test_a_document_that_is_announced_too_large_is_refused_before_it_comes():
    taken = []

    def pieces():
        for piece in [Piece(data=b"x", total=101), Piece(data=b"y" * 100)]:
            taken.append(piece)
            yield piece

    with pytest.raises(MessageError, match="a document of 101 bytes is announced, 100 are allowed"):
        join(pieces(), 100)
    assert len(taken) == 1


def test_more_than_was_announced_is_refused_as_soon_as_it_comes():
    endless = (Piece(data=b"x" * 10, total=15) for _ in iter(int, 1))
    with pytest.raises(MessageError, match="more than the 15 bytes"):
        join(endless, 100)


@pytest.mark.parametrize("pieces", [[], [Piece(data=b"abc", total=4)], [Piece(total=4), Piece(data=b"abc")]])
def test_a_document_that_is_cut_short_is_refused(pieces):
    with pytest.raises(MessageError, match="bytes have come"):
        join(pieces, 100)


def test_an_empty_document_is_one():
    assert join([Piece()], 100) == b""
