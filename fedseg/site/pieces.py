"""Documents in pieces, so that no limit on the size of a message applies and progress can be told in between."""

from collections.abc import Iterable, Iterator

from fedseg.errors import MessageError
from fedseg.federated.document import Buffer
from fedseg.site.wire.site_pb2 import Piece

PIECE = 1 << 20
"""Bytes in a piece."""


def cut(*buffers: Buffer) -> Iterator[Piece]:
    """The bytes of several buffers, one after the other, as pieces; even an empty document has one."""
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    total = sum(len(view) for view in views)
    sent = False
    for view in views:
        for start in range(0, len(view), PIECE):
            yield Piece(data=bytes(view[start : start + PIECE]), total=0 if sent else total)
            sent = True
    if not sent:
        yield Piece()


def join(pieces: Iterable[Piece], limit: int) -> bytearray:
    """Put a document together; memory grows with what really arrives.

    Args:
        pieces: of `cut`.
        limit: largest document in bytes.

    Raises:
        MessageError: it is larger than the limit, or not as long as its first piece says.
    """
    document, total = bytearray(), None
    for piece in pieces:
        if total is None:
            total = piece.total
            if total > limit:
                raise MessageError(f"a document of {total} bytes is announced, {limit} are allowed")
        if len(document) + len(piece.data) > total:
            raise MessageError(f"more than the {total} bytes that were announced have come")
        document += piece.data
    if total is None or len(document) != total:
        raise MessageError(f"{len(document)} of {total or 0} bytes have come")
    return document
