"""Memory through which two processes on this machine hand each other large messages.

A pipe moves 10 MB in some fifty pieces and wakes both ends for each; on a busy machine that takes a second. A mailbox is
a file without a name: the bytes are written once, the pipe only says that they are there, and nothing is left behind when
both processes are killed.
"""

import os
import sys
import tempfile
from multiprocessing import reduction
from typing import Any

import numpy as np

from fedseg.federated.document import Buffer


class Mailbox:
    """Holds one message, and its memory until it is closed; may be passed to a new process as an argument.

    The two ends must take turns, which is what the pipe beside it is for.
    """

    def __init__(self) -> None:
        if sys.platform == "linux":
            self._descriptor = os.memfd_create("fedseg")
        else:
            with tempfile.TemporaryFile() as file:
                self._descriptor = os.dup(file.fileno())

    def write(self, *buffers: Buffer) -> int:
        """Replace the message; returns its size, which the reader needs."""
        end = 0
        for buffer in buffers:
            view = memoryview(buffer)
            while view:
                written = os.pwrite(self._descriptor, view, end)
                view, end = view[written:], end + written
        return end

    def read(self, size: int) -> memoryview:
        """A copy of the first `size` bytes of the message; it may be written to.

        Raises:
            EOFError: there are fewer.
        """
        copy, done = np.empty(size, np.uint8).data, 0
        while done < size:
            got = os.preadv(self._descriptor, [copy[done:]], done)
            if not got:
                raise EOFError(f"expected {size} bytes, found {done}")
            done += got
        return copy

    def close(self) -> None:
        """Close this end."""
        os.close(self._descriptor)

    def __getstate__(self) -> Any:
        return reduction.DupFd(self._descriptor)

    def __setstate__(self, duplicate: Any) -> None:
        self._descriptor = duplicate.detach()
