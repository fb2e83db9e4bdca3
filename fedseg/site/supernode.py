"""Flower's SuperNode as a hospital runs it: started by us, with the one change that Flower offers no setting for.

`GuardedFleetClient` takes the place of the class through which a SuperNode talks to its server. It shows the site's certificate
to the fence (Flower knows no client certificates), it waits at the server for work instead of sleeping three seconds between
looks, and it vouches for an app bundle only if the hospital has approved its bytes. The vouching uses Flower's own check of
trusted entities: the trusted key is made when the gate starts and never leaves the process, so a bundle that was not approved is
answered with Flower's "invalid bundle" before any of it is unpacked.

This is the only place that reaches into Flower's internals at a site; `check_flower` fails loudly when they have changed.
"""

import base64
import inspect
import json
import logging
import os
import random
import re
import shutil
import signal
import socket as sockets
import ssl
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import httpx
import uvicorn
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.object_store import ObjectStore
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.nodestate import NodeState
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from fedseg import logs
from fedseg.app_bundle import bundle_digest
from fedseg.errors import ConfigError, KitError
from fedseg.kit import Kit
from fedseg.site.approval import is_approved
from fedseg.site.clientapps import start_executor

log = logging.getLogger(__name__)
_told: dict[str, float] = {}
_flowers_push = start_client_internal._push_messages

ENTITY = "fedseg-site-approval"
LOOK_AGAIN = (0.2, 1.0)
"""Shortest and longest pause in seconds between two looks for work."""
LOOKS_SECONDS = 20.0
"""How long one call looks for work before it says that there is none."""
_APP = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w-]*", re.ASCII)
_VERSION = re.compile(r"[0-9][\w.+-]*", re.ASCII)
NOT_NOW = (429, 500, 502, 503, 504)
ANSWER_SECONDS = 0.1
"""Between two looks for an answer."""
BUSY_SECONDS = 300.0
"""How long a coordinator that answers so is asked again."""


class GuardedFleetClient(FleetHttpClient):
    """Talks to the server for one site; configured by `run_supernode` before Flower makes one."""

    kit: ClassVar[Kit]
    last_node: ClassVar[Path]
    vouch: ClassVar[ed25519.Ed25519PrivateKey]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._client.follow_redirects = False  # else a coordinator could send requests around in the hospital's network

    @classmethod
    def from_server_address(
        cls,
        server_address: str,
        insecure: bool,
        root_certificates: bytes | str | None,
        interceptors: Sequence[Any],
        *,
        retry_invoker: Any = None,
    ) -> "GuardedFleetClient":
        """TLS 1.3 or nothing: the study's authority and no other, the site's certificate shown."""
        if insecure or root_certificates is None:
            raise ConfigError("a gate speaks TLS only")
        return cls(
            f"https://{server_address}",
            interceptors=interceptors,
            verify=tls_context(cls.kit),
            retry_invoker=retry_invoker,
        )

    def _unary_unary(self, **call: Any) -> Any:
        """Ask again when the fence says "not now": Flower would throw the site's answer away."""
        end, pauses = time.monotonic() + BUSY_SECONDS, _pauses(0.2, 10.0)
        while True:
            try:
                return super()._unary_unary(**call)
            except httpx.HTTPStatusError as error:
                if error.response.status_code not in NOT_NOW or time.monotonic() > end:
                    raise
                if (
                    error.response.status_code != httpx.codes.TOO_MANY_REQUESTS
                ):  # its way to say that others are sending
                    _tell(f"the coordinator answered {error.response.status_code}; it is asked again")
            except httpx.TransportError as error:  # Flower asks again, and again
                _tell(f"the coordinator cannot be reached: {error}")
                raise
            time.sleep(next(pauses) * random.uniform(0.5, 1.5))  # sites that were sent away must not come back together

    def ActivateNode(self, request: Any) -> Any:  # noqa: N802
        """Join, as soon as the coordinator lets this site in.

        Flower takes a gate that was killed for connected for another minute; the next one on this machine says that it is gone.
        """
        if self.last_node.exists():
            with suppress(httpx.HTTPError, ValueError):
                super().DeactivateNode(DeactivateNodeRequest(node_id=int(self.last_node.read_text())))
        pauses = _pauses(1.0, 30.0)
        while True:
            try:
                response = super().ActivateNode(request)
            except httpx.HTTPStatusError as error:
                _tell(f"the coordinator does not let this site in: {_reason(error.response)}")
                time.sleep(next(pauses))
            else:
                self.last_node.write_text(str(response.node_id))
                log.info("connected")
                return response

    def PullMessages(self, request: Any) -> Any:  # noqa: N802
        """Look for work until there is some, or for a while."""
        end, pauses = time.monotonic() + LOOKS_SECONDS, _pauses(*LOOK_AGAIN)
        while True:
            response = super().PullMessages(request)
            if response.messages_list or time.monotonic() > end:
                return response
            time.sleep(next(pauses))

    def GetRun(self, request: Any) -> Any:  # noqa: N802
        """Ask about a run; its app's name and version become part of a path, so one that leads elsewhere gets no bundle."""
        response = super().GetRun(request)
        run = response.run
        if not (_APP.fullmatch(run.fab_id) and _VERSION.fullmatch(run.fab_version)):
            log.error("refused a run of app %.200r, version %.200r: no app is called that", run.fab_id, run.fab_version)
            run.fab_hash = ""
        return response

    def GetFab(self, request: Any) -> Any:  # noqa: N802
        """Fetch a bundle, and vouch for it if the hospital has approved it; what others say about it does not count.

        It must be the one that the run names: under that digest Flower looks for what it loads, and may find an earlier bundle.
        """
        response = super().GetFab(request)
        response.fab.verifications.clear()
        content = bytes(response.fab.content)
        digest = bundle_digest(content)
        if not digest == request.hash_str == response.fab.hash_str:
            log.error("refused app bundle %s: the run is one of bundle %.100r", digest, request.hash_str)
        elif is_approved(self.kit.folder, content):
            response.fab.verifications.update(_vouched(content, self.vouch))
        else:
            log.error(
                "refused app bundle %s: it is not approved here; `fedseg site approve` shows and approves one", digest
            )
        return response


def run_supernode(kit: Kit, socket: Path, *, home: Path, port: int = 0) -> None:
    """Run a gate until SIGTERM.

    Args:
        kit: the site's.
        socket: of the site service.
        home: for Flower's own files.
        port: on the loopback device, for the processes that the SuperNode starts; 0: any.

    Raises:
        ConfigError: Flower is of another release.
    """
    check_flower()
    os.environ["FLWR_HOME"] = str(home)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.2")
    GuardedFleetClient.kit, GuardedFleetClient.last_node = kit, home / "node-id"
    GuardedFleetClient.vouch = ed25519.Ed25519PrivateKey.generate()
    vars(fleet_http_connection)["FleetHttpClient"] = GuardedFleetClient
    vars(start_client_internal)["_push_messages"] = push_every_answer
    entities = home / "trusted-entity.yaml"
    public = GuardedFleetClient.vouch.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in home.glob("app-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    entities.write_text(json.dumps({ENTITY: public.decode()}))
    from flwr.supernode.cli.flower_supernode import flower_supernode

    logs.adopt("flwr")
    if logs.is_json():
        uvicorn.config.LOGGING_CONFIG["loggers"] = {}  # or it would have handlers of its own
    port = port or free_port()
    executor = start_executor(f"127.0.0.1:{port}")
    try:
        with _as_openssh(kit.key) as key:
            sys.argv = _arguments(kit, key, entities, socket, port)
            flower_supernode()
    finally:
        with suppress(ProcessLookupError):
            os.kill(executor, signal.SIGTERM)


def _arguments(kit: Kit, key: Path, entities: Path, socket: Path, port: int) -> list[str]:
    return [
        "flower-supernode",
        "--superlink", kit.config.coordinator,
        "--root-certificates", str(kit.ca),
        "--auth-supernode-private-key", str(key),
        "--trusted-entities", str(entities),
        "--node-config", f"socket={json.dumps(str(socket.absolute()))}",
        "--isolation", "process",  # the processes are ours: fedseg.site.clientapps
        "--host", "127.0.0.1",
        "--port", str(port),
    ]  # fmt: skip


def push_every_answer(state: NodeState, object_store: ObjectStore, send: Any, push_object: Any) -> None:
    """Send answers until the message that came last has been answered.

    Flower's loop takes one message and then sends whatever answer lies there. An answer that was left over, from a run that ended
    while the coordinator was down, then goes out in place of the right one, and from then on every answer waits until the next
    message comes: the site is late for ever. Messages before the last one are of such runs, and nobody waits for them any more.
    """
    assert isinstance(state, InMemoryNodeState)
    asked = [key for key, (is_answer, _) in _messages(state).items() if not is_answer]
    state.delete_messages(message_ids=asked[:-1])
    while True:
        state.get_messages_legacy(run_ids=[])  # takes none, but answers for ClientApps that have died
        kept = _messages(state)
        if (True, False) in kept.values():
            _flowers_push(state, object_store, send, push_object)
        elif not asked or asked[-1] not in kept:
            return
        else:
            time.sleep(ANSWER_SECONDS)


def _messages(state: InMemoryNodeState) -> dict[str, tuple[bool, bool]]:
    """What lies at the node, in the order in which it came: whether it is an answer, and whether somebody has taken it."""
    with state.lock_msg_store:
        return {
            key: (entry.message.metadata.reply_to_message_id != "", entry.is_retrieved)
            for key, entry in state.msg_store.items()
        }


def check_flower() -> None:
    """See whether Flower still has what this module holds on to.

    Raises:
        ConfigError: it has not.
    """
    wanted = {
        "FleetHttpClient": getattr(fleet_http_connection, "FleetHttpClient", None),
        "http_request_response": getattr(start_client_internal, "http_request_response", None),
        "_verify_fab": getattr(start_client_internal, "_verify_fab", None),
        "_push_messages": getattr(start_client_internal, "_push_messages", None),
    }
    missing = [name for name, found in wanted.items() if found is None]
    source = inspect.getsource(fleet_http_connection) + inspect.getsource(start_client_internal)
    if missing or "FleetHttpClient.from_server_address(" not in source or "valid_license" not in source:
        from flwr.supercore.version import package_version

        raise ConfigError(
            f"flwr {package_version} keeps its bundle check elsewhere ({', '.join(missing) or 'another call'}); "
            "a gate without that check is not started. Install flwr>=1.41,<1.42"
        )


def tls_context(kit: Kit) -> ssl.SSLContext:
    """TLS 1.3, the study's authority, the site's certificate.

    Raises:
        KitError: key and certificate do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cafile=kit.ca)
    try:
        context.load_cert_chain(kit.certificate, kit.key)
    except ssl.SSLError as error:
        raise KitError(f"{kit.key}: does not belong to {kit.certificate.name}: {error.reason}") from error
    return context


def _pauses(shortest: float, longest: float) -> Iterator[float]:
    pause = shortest
    while True:
        yield pause
        pause = min(1.5 * pause, longest)


def _reason(response: httpx.Response) -> str:
    """What a refusal means, as far as one can tell from here."""
    if response.status_code == httpx.codes.FORBIDDEN:
        return "the fence refuses its key; was the certificate renewed or revoked? Ask the coordinator"
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return "its signed time does not count; is this machine's clock right (within five minutes)?"
    known = FlowerError.from_json(response.text)
    if known is not None and known.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        return "its key is not registered (yet), or another process is connected with it; it is tried again"
    return f"status {response.status_code}"


def _tell(text: str) -> None:
    """Log something, but the same thing only once a minute."""
    now = time.monotonic()
    if now - _told.get(text, -60.0) >= 60.0:
        _told[text] = now
        log.warning(text)


def _vouched(content: bytes, key: ed25519.Ed25519PrivateKey) -> dict[str, str]:
    """What Flower's check looks for: a signature over the bundle's digest and a time, and the mark of a server that checks."""
    from hashlib import sha256

    from flwr.supercore.primitives.asymmetric_ed25519 import create_message_to_sign

    now = int(time.time())
    signature = base64.urlsafe_b64encode(key.sign(create_message_to_sign(sha256(content).digest(), now))).decode()
    return {"valid_license": "fedseg", ENTITY: json.dumps({"signed_at": now, "signature": signature})}


@contextmanager
def _as_openssh(path: Path) -> Iterator[Path]:
    """The site's key as Flower reads it, in a file without a name."""
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    with tempfile.TemporaryFile() as file:
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
            )
        )
        file.flush()
        file.seek(0)
        yield Path(f"/dev/fd/{file.fileno()}")


def free_port() -> int:
    """A port of the loopback device that nobody listens on just now."""
    with sockets.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
