"""Ask a process for its health by the standard gRPC protocol: exit code 0 if it serves, 1 if not, 2 for a wrong call.

health.py unix:/run/fedseg/site.sock
health.py 127.0.0.1:18001
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SECONDS = 5


def main(arguments: list[str]) -> int:
    """Ask once and say what came back."""
    if len(arguments) != 1:
        print("usage: health.py unix:/path/to/socket | host:port", file=sys.stderr)
        return 2
    with grpc.insecure_channel(arguments[0]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        except grpc.RpcError as error:
            print(f"{arguments[0]}: {error.code().name}", file=sys.stderr)
            return 1
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
