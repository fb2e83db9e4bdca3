import hashlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from flwr.common.serde import fab_to_proto
from flwr.proto.fab_pb2 import GetFabRequest, GetFabResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest, GetRunResponse, Run
from flwr.supercore.fab import Fab

from fedseg import __version__
from fedseg.app_bundle import bundle_digest
from fedseg.kit import Kit, KitConfig
from fedseg.site.approval import approve
from fedseg.site.supernode import ENTITY, GuardedFleetClient

BUNDLE = b"a bundle; what is in it does not matter here"
WITHDRAWN = hashlib.sha256(b"a bundle whose approval was withdrawn").hexdigest()


class _Coordinator(BaseHTTPRequestHandler):
    """Answers with what the test has put there."""

    answers: ClassVar[dict[str, tuple[int, dict[str, str], bytes]]] = {}
    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append(f"{self.command} {self.path}")
        status, headers, body = self.answers.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/x-protobuf",
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def coordinator():
    _Coordinator.answers, _Coordinator.asked = {}, []
    server = HTTPServer(("127.0.0.1", 0), _Coordinator)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def client(tmp_path, coordinator):
    config = KitConfig(format=1, study="s", role="site", site="Aare", coordinator="localhost:443")
    GuardedFleetClient.kit, GuardedFleetClient.last_node = Kit(tmp_path, config, ""), tmp_path / "node-id"
    GuardedFleetClient.vouch = ed25519.Ed25519PrivateKey.generate()
    client = GuardedFleetClient(coordinator)
    yield client
    client.close()


def fetch(client: GuardedFleetClient, bundle: bytes, asked_for: str, called: str) -> dict[str, str]:
    """What the gate says of a bundle that the coordinator sends when it is asked for a digest."""
    fab = fab_to_proto(Fab(called, bundle, {}))
    _Coordinator.answers["/v1/fleet/get-fab"] = (200, {}, GetFabResponse(fab=fab).SerializeToString())
    request = GetFabRequest(node=Node(node_id=1), hash_str=asked_for, run_id=1)
    return dict(client.GetFab(request).fab.verifications)


def test_an_approved_bundle_is_vouched_for(client, tmp_path):
    assert fetch(client, BUNDLE, bundle_digest(BUNDLE), bundle_digest(BUNDLE)) == {}
    approve(tmp_path, BUNDLE, "app.fab", "me")
    assert ENTITY in fetch(client, BUNDLE, bundle_digest(BUNDLE), bundle_digest(BUNDLE))


@pytest.mark.parametrize("called", ["", "its own", WITHDRAWN])
def test_an_approved_bundle_does_not_cover_a_run_of_another_one(client, tmp_path, called):
    approve(tmp_path, BUNDLE, "app.fab", "me")
    called = bundle_digest(BUNDLE) if called == "its own" else called
    assert fetch(client, BUNDLE, WITHDRAWN, called) == {}


def test_a_bundle_under_another_name_is_not_vouched_for(client, tmp_path):
    approve(tmp_path, BUNDLE, "app.fab", "me")
    assert fetch(client, BUNDLE, bundle_digest(BUNDLE), WITHDRAWN) == {}


@pytest.mark.parametrize(
    ("app", "version"),
    [("/", "/../../../tmp/x"), ("a/b", "1/../x"), ("../b", "1"), ("a/b/c", "1"), ("fedseg/fedseg", ""), ("a/b", "1\n")],
)
def test_a_run_whose_app_leads_to_another_folder_gets_no_bundle(client, app, version):
    run = Run(run_id=1, fab_id=app, fab_version=version, fab_hash=bundle_digest(BUNDLE))
    _Coordinator.answers["/v1/fleet/get-run"] = (200, {}, GetRunResponse(run=run).SerializeToString())
    assert client.GetRun(GetRunRequest(run_id=1)).run.fab_hash == ""


def test_a_run_of_the_installed_app_is_left_as_it_is(client):
    run = Run(run_id=1, fab_id="fedseg/fedseg", fab_version=__version__, fab_hash=bundle_digest(BUNDLE))
    _Coordinator.answers["/v1/fleet/get-run"] = (200, {}, GetRunResponse(run=run).SerializeToString())
    assert client.GetRun(GetRunRequest(run_id=1)).run == run


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_gate_lets_the_coordinator_send_it_nowhere(client, coordinator, status):
    _Coordinator.answers["/v1/fleet/get-run"] = (status, {"Location": f"{coordinator}/pacs/delete"}, b"")
    with pytest.raises(httpx.HTTPStatusError):
        client.GetRun(GetRunRequest(run_id=1))
    assert _Coordinator.asked == ["POST /v1/fleet/get-run"]
