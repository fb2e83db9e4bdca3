"""Flower's SuperLink as the coordinator runs it, and the few calls of its Control API that are needed.

The SuperLink listens on the loopback device only, with TLS and node authentication; the fence is what the sites see. Its database
keeps the registered keys over restarts. Runs do not survive a restart in Flower: the supervisor submits them again.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import httpx
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

from fedseg.app_bundle import bundle_digest
from fedseg.errors import SuperLinkError
from fedseg.kit import Kit
from fedseg.processes import start_process

REVOKED = "unregistered"


@dataclass(frozen=True)
class Node:
    """A registered key, as the SuperLink knows it."""

    node_id: int
    public_key: bytes
    """PEM."""
    status: str
    """`registered`, `online`, `offline` or `unregistered`."""
    started: float
    """When its SuperNode was started last, in seconds since 1970; 0: never."""


@dataclass(frozen=True)
class FlowerRun:
    """A submitted run."""

    run_id: int
    status: str
    """`pending`, `starting`, `running` or `finished`."""
    outcome: str
    """Of a finished one: `completed`, `failed` or `stopped`."""
    details: str


def start_superlink(kit: Kit, folder: Path, *, port: int, health_port: int) -> "subprocess.Popen[bytes]":
    """Start the SuperLink; it ends when this process does, however this one ends.

    Args:
        kit: the coordinator's.
        folder: for the database, Flower's own files and the log.
        port: on the loopback device.
        health_port: of the standard gRPC health service, on the loopback device.
    """
    home = folder / "flower"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    binaries = Path(sys.executable).parent
    command = [
        str(binaries / "flower-superlink"),
        "--ssl-ca-certfile", str(kit.ca.absolute()),
        "--ssl-certfile", str(kit.folder.absolute() / "loopback.crt"),
        "--ssl-keyfile", str(kit.folder.absolute() / "loopback.key"),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        "--database", str(folder / "superlink.db"),
        "--host", "127.0.0.1",
        "--port", str(port),
        "--health-server-address", f"127.0.0.1:{health_port}",
    ]  # fmt: skip
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "FLWR_LOG_LEVEL": "WARNING",
        "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    return start_process(command, folder / "superlink.log", folder=folder, environment=environment)


class Control:
    """The Control API of a SuperLink on this machine.

    Args:
        kit: the coordinator's; its authority must have signed the SuperLink's certificate.
        port: of the SuperLink.
    """

    def __init__(self, kit: Kit, port: int) -> None:
        self._client = ControlHttpClient.from_server_address(
            f"localhost:{port}",
            insecure=False,
            root_certificates=kit.ca.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def nodes(self) -> list[Node]:
        """Every key that was ever registered.

        Raises:
            SuperLinkError: the SuperLink does not answer, or refuses. So do all the other calls.
        """
        found = self._call(self._client.ListNodes, ListNodesRequest())
        return [
            Node(node.node_id, node.public_key, node.status, _seconds(node.last_activated_at))
            for node in found.nodes_info
        ]

    def register(self, public_key: bytes, name: str) -> int:
        """Let a key in; returns the node's number."""
        return int(self._call(self._client.RegisterNode, RegisterNodeRequest(public_key=public_key, name=name)).node_id)

    def unregister(self, node_id: int) -> None:
        """Shut a key out, for good."""
        self._call(self._client.UnregisterNode, UnregisterNodeRequest(node_id=node_id))

    def submit(self, bundle: bytes, settings: Mapping[str, bool | float | str]) -> int:
        """Start a run; returns its number."""
        fab = fab_to_proto(Fab(bundle_digest(bundle), bundle, {}))
        request = StartRunRequest(fab=fab, override_config=user_config_to_proto(dict(settings)))
        response = self._call(self._client.StartRun, request)
        if not response.run_id:
            raise SuperLinkError(f"the SuperLink did not start the run: {response.note or 'it says nothing'}")
        return int(response.run_id)

    def runs(self) -> list[FlowerRun]:
        """The runs of this SuperLink, newest first."""
        found = self._call(self._client.ListRuns, ListRunsRequest()).run_dict
        return [
            FlowerRun(run_id, run.status.status, run.status.sub_status, run.status.details)
            for run_id, run in sorted(found.items(), key=lambda item: item[1].pending_at, reverse=True)
        ]

    def stop(self, run_id: int) -> None:
        """End a run; one that has ended is left alone."""
        try:
            self._call(self._client.StopRun, StopRunRequest(run_id=run_id))
        except SuperLinkError:
            if any(run.run_id == run_id and run.status != "finished" for run in self.runs()):
                raise

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            known = FlowerError.from_json(error.response.text)
            told = f"{known.message} {known.public_details or ''}".strip() if known else str(error)
            raise SuperLinkError(f"the SuperLink refused {method.__name__}: {told}") from error
        except (httpx.HTTPError, ValueError) as error:
            raise SuperLinkError(f"the SuperLink does not answer: {type(error).__name__}: {error}") from error


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp() if moment else 0.0
