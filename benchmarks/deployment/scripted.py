"""Site services without data: each answers at once with an update of zeros in the shape of the weights that it received.

python benchmarks/deployment/scripted.py SOCKET=SITE ...
"""

import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np

from fedseg.federated.messages import RoundInstructions, SiteUpdate
from fedseg.site.pieces import cut, join
from fedseg.site.wire import site_pb2_grpc
from fedseg.site.wire.site_pb2 import DescribeRequest, Description, Event, Piece


class Scripted(site_pb2_grpc.SiteServicer):
    """One site."""

    def __init__(self, site: str) -> None:
        self.site = site

    def Describe(self, request: DescribeRequest, context: grpc.ServicerContext) -> Description:  # noqa: ARG002, N802
        return Description(site=self.site, version="scripted", state="idle")

    def RunRound(self, request: Iterator[Piece], context: grpc.ServicerContext) -> Iterator[Event]:  # noqa: ARG002, N802
        received = RoundInstructions.decode(join(request, 1 << 32))
        delta = {name: np.zeros_like(array) for name, array in received.weights.items()} if received.train else {}
        update = SiteUpdate(self.site, received.server_round, delta, 1)
        for piece in cut(*update.buffers()):
            yield Event(piece=piece)

    Evaluate = RunRound


def main() -> None:
    """Serve until SIGTERM."""
    servers = []
    for argument in sys.argv[1:]:
        socket, site = argument.split("=")
        server = grpc.server(ThreadPoolExecutor(2))
        site_pb2_grpc.add_SiteServicer_to_server(Scripted(site), server)
        server.add_insecure_port(f"unix:{socket}")
        server.start()
        servers.append(server)
    signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    main()
