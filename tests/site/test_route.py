import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate

import pytest

from fedseg.kit import load_kit
from fedseg.site import route
from fedseg.site.check import ROUTE
from fedseg.site.finding import Known, run_check
from fedseg.site.supernode import free_port
from tests.site.ready import ReadySite

NGINX = shutil.which("nginx")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


@pytest.fixture
def site(tmp_path):
    return ReadySite(tmp_path / "study", port=free_port(), data=False)


def look(site, folder=None):
    """The findings on the way to the coordinator."""
    folder = folder or site.kit
    known = Known(folder, site.file, kit=load_kit(folder))
    return {name: run_check(name, check, known) for name, check in ROUTE}


def port_of(site):
    return load_kit(site.kit).config.port


@contextmanager
def fence(site, superlink=None):
    """The real fence, with the configuration of the coordinator's kit."""
    folder = site.study.folder / "fence"
    shutil.copytree(site.study.coordinator, folder, dirs_exist_ok=True)
    text = (folder / "nginx.conf").read_text()
    text = re.sub(r"server 127\.0\.0\.1:\d+;", f"server 127.0.0.1:{superlink or free_port()};", text)
    (folder / "nginx.conf").write_text(text)
    process = subprocess.Popen(
        [NGINX, "-c", str(folder / "nginx.conf"), "-p", str(folder)], stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_for(port_of(site))
        yield
    finally:
        process.terminate()
        process.wait(timeout=20)


@contextmanager
def server(port, context, *, answer=b""):
    """Answers each connection with the same bytes."""
    listening = socket.create_server(("127.0.0.1", port))

    def serve():
        while True:
            try:
                plain, _ = listening.accept()
            except OSError:
                return
            plain.settimeout(10)
            try:
                with context.wrap_socket(plain, server_side=True) if context else plain as secured:
                    if answer:
                        secured.recv(65536)
                        secured.sendall(answer)
            except OSError:
                pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def wait_for(port):
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("nobody listens")


def context_of(kit, *, name="server"):
    """TLS as the coordinator would speak it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(kit / f"{name}.crt", kit / f"{name}.key")
    return context


def reply(status=401, seconds=0.0):
    date = formatdate(time.time() + seconds, usegmt=True)
    return f"HTTP/1.1 {status} X\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n".encode()


@needs_nginx
def test_a_fence_with_a_server_behind_it_is_all_that_it_takes(site):
    behind = free_port()
    with server(behind, context_of(site.study.coordinator, name="loopback"), answer=reply()), fence(site, behind):
        found = look(site)
    assert {finding.state for finding in found.values()} == {"ok"}, found
    assert found["server"].found == "the coordinator's server answers"
    assert found["clock"].found == "both clocks agree"


@needs_nginx
def test_a_fence_without_its_server_is_worth_waiting_for(site):
    with fence(site):
        found = look(site)
    assert [found[name].state for name in ("name", "connection", "server", "clock")] == ["ok", "ok", "attention", "ok"]
    assert "is not running" in found["server"].found


@needs_nginx
def test_a_revoked_site_is_told_that_its_certificate_was_refused(site):
    before = site.study.folder / "before"
    shutil.copytree(site.kit, before)
    site.study.provision(revoke=("Aare",))
    with fence(site):
        found = look(site, before)
    assert found["connection"].state == "not ready"
    assert "refused this site's certificate" in found["connection"].found
    assert "revoked" in found["connection"].remedy


@needs_nginx
def test_a_site_whose_key_the_fence_does_not_know_is_told_so(site):
    file = site.study.coordinator / "nginx.conf"
    file.write_text(re.sub(r'\n +"[0-9a-f]{40} [^"]+" Aare;', "", file.read_text()))
    with fence(site):
        found = look(site)
    assert found["connection"].state == "ok"
    assert "does not know this site's key" in found["server"].found


def test_a_name_that_nobody_knows_is_told_of(tmp_path):
    site = ReadySite(tmp_path, data=False, host='"coordinator.invalid"')
    found = look(site)
    assert found["name"].state == "not ready"
    assert "coordinator.invalid" in found["name"].found
    assert found["connection"].state == "not ready"
    assert found["clock"].state == "attention"


def test_a_port_where_nobody_listens_is_told_of(site):
    found = look(site)["connection"]
    assert f"localhost:{port_of(site)} refused the connection" in found.found


def test_a_firewall_that_swallows_everything_is_told_of(site, monkeypatch):
    monkeypatch.setattr(route, "SECONDS", 0.3)
    with socket.socket() as full:  # its queue is full, so that further connections hang
        full.bind(("127.0.0.1", port_of(site)))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port_of(site)))
        found = look(site)["connection"]
        for one in waiting:
            one.close()
    assert "did not answer within" in found.found
    assert "HTTPS_PROXY" in found.remedy


def test_another_authority_is_named(site, tmp_path):
    other = ReadySite(tmp_path / "other", port=port_of(site), data=False)
    with server(port_of(site), context_of(other.study.coordinator), answer=reply()):
        found = look(site)["connection"]
    assert found.state == "not ready"
    assert "not of this study's authority" in found.found
    assert "CN=" in found.found


def test_another_site_cannot_pass_as_the_coordinator(site):
    with server(port_of(site), context_of(site.study.site("Elbe"), name="site"), answer=reply()):
        found = look(site)["connection"]
    assert found.state == "not ready"
    assert "the server's certificate is not accepted" in found.found


def test_a_server_without_tls_is_told_of(site):
    with server(port_of(site), None, answer=b"HTTP/1.1 400 Bad Request\r\n\r\n"):
        found = look(site)["connection"]
    assert "no TLS 1.3 there" in found.found


def test_a_server_with_an_older_tls_is_told_of(site):
    context = context_of(site.study.coordinator)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with server(port_of(site), context, answer=reply()):
        found = look(site)["connection"]
    assert "no TLS 1.3 there" in found.found


def test_a_server_that_hangs_up_in_the_handshake_is_told_of(site):
    with server(port_of(site), None):
        found = look(site)["connection"]
    assert found.state == "not ready"
    assert "cut during the handshake" in found.found


def test_a_refusal_that_comes_with_the_answer_is_told_as_one(site, tmp_path):
    other = ReadySite(tmp_path / "other", port=port_of(site), data=False)
    context = context_of(site.study.coordinator)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(other.study.coordinator / "ca.crt")
    with server(port_of(site), context, answer=reply()):
        found = look(site)["connection"]
    assert "refused this site's certificate" in found.found


@pytest.mark.parametrize(
    ("seconds", "state", "words"),
    [
        (0, "ok", "agree"),
        (-20, "not ready", "20 s ahead of the coordinator; its requests would be refused"),
        (30, "attention", "30 s behind"),
        (600, "not ready", "600 s behind"),
    ],
)
def test_clocks_that_differ_are_told_of(site, seconds, state, words):
    with server(port_of(site), context_of(site.study.coordinator), answer=reply(seconds=seconds)):
        found = look(site)["clock"]
    assert found.state == state
    assert words in found.found.replace("19 s", "20 s").replace("29 s", "30 s").replace("31 s", "30 s").replace(
        "599", "600"
    )


def test_a_server_certificate_near_its_end_needs_attention(tmp_path):
    site = ReadySite(tmp_path, port=free_port(), days=-360, data=False)
    with server(port_of(site), context_of(site.study.coordinator), answer=reply()):
        found = look(site)["connection"]
    assert (found.state, "expires in" in found.found) == ("attention", True)


def test_an_expired_server_certificate_is_told_of(tmp_path):
    site = ReadySite(tmp_path, port=free_port(), days=-366, data=False)
    with server(port_of(site), context_of(site.study.coordinator), answer=reply()):
        found = look(site)["connection"]
    assert "certificate has expired" in found.found


@contextmanager
def proxy(port, answer):
    """Takes one CONNECT after the other and passes bytes on."""
    listening = socket.create_server(("127.0.0.1", port))
    asked = []

    def pipe(source, sink):
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def serve():
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            asked.append(client.recv(65536))
            client.sendall(answer)
            if b" 200 " in answer:
                target = asked[-1].split()[1].decode().rpartition(":")
                server = socket.create_connection((target[0], int(target[2])))
                threading.Thread(target=pipe, args=(client, server), daemon=True).start()
                pipe(server, client)
            client.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def test_a_proxy_is_gone_through(site, monkeypatch):
    through = free_port()
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:se%20cret@127.0.0.1:{through}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with (
        proxy(through, b"HTTP/1.1 200 Connected\r\n\r\n") as asked,
        server(port_of(site), context_of(site.study.coordinator), answer=reply()),
    ):
        found = look(site)
    assert found["connection"].state == "ok", found
    assert "it is the proxy" in found["name"].found
    assert asked[0].startswith(f"CONNECT localhost:{port_of(site)}".encode())
    assert b"Basic bWU6c2UgY3JldA==" in asked[0]
    assert "cret" not in str(found)


def test_a_proxy_that_says_no_is_quoted(site, monkeypatch):
    through = free_port()
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{through}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with proxy(through, b"HTTP/1.1 407 Authentication Required\r\n\r\n"):
        found = look(site)["connection"]
    assert f"the proxy 127.0.0.1:{through} cannot be reached" in found.found
    assert "407" in found.found
