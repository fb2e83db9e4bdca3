"""A site service that answers as a broken or malicious one might: NaN, other shapes, another site's name, nothing sensible.

`python rogue.py SOCKET SITE MISBEHAVIOUR` serves until it is ended.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np

from fedseg.federated.messages import RoundInstructions, SiteUpdate
from fedseg.federated.weights import Weights
from fedseg.site.pieces import cut, join
from fedseg.site.wire import site_pb2_grpc
from fedseg.site.wire.site_pb2 import DescribeRequest, Description, Event, Piece

Delta = Callable[[Weights], Weights]


def _poisoned(weights: Weights) -> Weights:
    delta = {name: np.zeros_like(array) for name, array in weights.items()}
    next(iter(delta.values())).reshape(-1)[:1] = np.nan
    return delta


def _misshapen(weights: Weights) -> Weights:
    return {name: np.zeros((*array.shape, 2), np.float32) for name, array in weights.items()}


MISBEHAVIOURS: dict[str, Delta] = {"nan": _poisoned, "shape": _misshapen, "name": _poisoned}


class Rogue(site_pb2_grpc.SiteServicer):
    """Answers every round at once."""

    def __init__(self, site: str, misbehaviour: str) -> None:
        self.site, self.misbehaviour = site, misbehaviour

    def Describe(self, request: DescribeRequest, context: grpc.ServicerContext) -> Description:
        return Description(site=self.site, version="rogue", state="idle")

    def RunRound(self, request: Iterator[Piece], context: grpc.ServicerContext) -> Iterator[Event]:
        instructions = RoundInstructions.decode(join(request, 1 << 30))
        if self.misbehaviour == "garbage":
            yield from (Event(piece=piece) for piece in cut(b"\x00" * 1000))
            return
        site = "Aare" if self.misbehaviour == "name" else self.site
        delta = MISBEHAVIOURS[self.misbehaviour](instructions.weights)
        update = SiteUpdate(site, instructions.server_round, delta, 1)
        yield from (Event(piece=piece) for piece in cut(update.encode()))

    Evaluate = RunRound


def main() -> None:
    socket, site, misbehaviour = sys.argv[1:]
    server = grpc.server(ThreadPoolExecutor(4))
    site_pb2_grpc.add_SiteServicer_to_server(Rogue(site, misbehaviour), server)
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    main()
