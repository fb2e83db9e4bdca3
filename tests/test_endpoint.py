import http.client
import socket
import ssl
import threading
import time
from base64 import b64encode
from contextlib import closing, contextmanager, suppress
from hashlib import sha256

import bcrypt
import pytest

from fedseg import endpoint
from fedseg.endpoint import listen
from fedseg.errors import ConfigError
from fedseg.web_auth import Credentials
from fedseg.web_config import WebConfig
from tests.certificates import Issuer

TOKEN = "drawn-at-random"
SECRET = "$2b$04$v3sCgjtlc4A0O/8Xvas2EuWaad1QzDzNAlqUOL4T8teHdKFKZaDPS"
"""bcrypt of `secret`, at the lowest cost."""
PASSWORDS = f"basic_auth_users:\n  anna: {SECRET}\n"
TOKENS = f"bearer_tokens:\n  prometheus: {sha256(TOKEN.encode()).hexdigest()}\n"
TLS = "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n"
CLIENTS = "  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: ca.crt\n"


def hello(environ, start):
    start("200 OK", [("Content-Type", "text/plain"), ("X-Frame-Options", "sameorigin")])
    return [b"hello"]


@contextmanager
def served(config=None, host="127.0.0.1", app=hello):
    server, thread = listen(app, host, 0, config)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.fixture(scope="module")
def issuer(tmp_path_factory):
    found = Issuer(tmp_path_factory.mktemp("certificates"))
    found.server()
    for name in ("danube", "ebro"):
        found.site(name)
    return found


@pytest.fixture
def write(issuer):
    def write(text):
        path = issuer.folder / "web.yml"
        path.write_text(text)
        return path

    return write


def basic(user, password):
    return "Basic " + b64encode(f"{user}:{password}".encode()).decode()


def get(server, tls=None, path="/", **headers):
    """Status, headers and text; TLS as a context of the client."""
    address = ("localhost", server.server_port)
    kind = http.client.HTTPConnection if tls is None else http.client.HTTPSConnection
    with closing(kind(*address, timeout=20, **({} if tls is None else {"context": tls}))) as connection:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()


def wait_until(fulfilled):
    end = time.monotonic() + 30
    while not fulfilled():
        assert time.monotonic() < end
        time.sleep(0.01)


def read(connection):
    """Until it is closed."""
    found = b""
    with suppress(ConnectionError):
        while piece := connection.recv(1000):
            found += piece
    return found


def client(issuer, name=None, newest=None):
    context = ssl.create_default_context(cafile=issuer.ca)
    if name is not None:
        context.load_cert_chain(issuer.folder / f"{name}.crt", issuer.folder / f"{name}.key")
    if newest is not None:
        context.maximum_version = newest
    return context


@pytest.mark.parametrize("host", ["localhost", "localhost:9464", "127.0.0.1:9464", "[::1]:19464", "LOCALHOST"])
def test_without_a_configuration_this_machine_is_answered_under_any_of_its_names(host):
    with served() as server:
        assert get(server, Host=host)[::2] == (200, "hello")


@pytest.mark.parametrize("host", ["rebound.example", "rebound.example:9464", "localhost.example", "localhost:1,evil"])
def test_another_site_s_page_cannot_read_a_loopback_endpoint_by_a_name_of_its_own(host):
    with served() as server:
        status, _, text = get(server, Host=host)
    assert status == 421
    assert "localhost" in text


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
@pytest.mark.parametrize("text", [None, "", PASSWORDS, TLS])
def test_beyond_the_loopback_device_it_wants_tls_and_to_know_who_asks(write, host, text):
    with pytest.raises(ConfigError, match="tls_server_config and basic_auth_users, bearer_tokens or a client_ca_file"):
        listen(hello, host, 0, None if text is None else write(text))


@pytest.mark.parametrize("text", [TLS + PASSWORDS, TLS + TOKENS, TLS + CLIENTS])
def test_beyond_the_loopback_device_it_serves_those_whom_it_knows(issuer, write, text):
    with served(write(text), host="0.0.0.0") as server:
        assert server.url == f"https://0.0.0.0:{server.server_port}/"
        known = {PASSWORDS: basic("anna", "secret"), TOKENS: f"Bearer {TOKEN}"}.get(text.removeprefix(TLS), "")
        assert get(server, client(issuer, "danube"), Authorization=known)[::2] == (200, "hello")


def test_a_password_or_a_token_lets_in_and_nothing_else_does(issuer, write):
    with served(write(TLS + PASSWORDS + TOKENS)) as server:
        tls = client(issuer)
        for right in (basic("anna", "secret"), f"Bearer {TOKEN}", basic("anna", "secret")):
            assert get(server, tls, Authorization=right)[0] == 200
        wrong = [basic("anna", "Secret"), basic("otto", "secret"), basic("anna", ""), basic("anna", "se\0cret")]
        for header in (*wrong, "Basic ###", "Basic " + b64encode(b"anna").decode(), "Bearer ", "Bearer secret", "anna"):
            status, headers, text = get(server, tls, Authorization=header)
            assert (status, headers["WWW-Authenticate"]) == (401, 'Basic realm="fedseg", charset="UTF-8"'), header
            assert "hello" not in text
        assert get(server, tls)[0] == 401


def test_one_password_is_hashed_once_and_a_wrong_one_every_time(monkeypatch):
    calls = []
    check = bcrypt.checkpw
    monkeypatch.setattr(bcrypt, "checkpw", lambda *arguments: calls.append(1) or check(*arguments))
    credentials = Credentials(WebConfig(basic_auth_users={"anna": SECRET}))
    assert all(credentials.accept(basic("anna", "secret")) for _ in range(5))
    assert len(calls) == 1
    assert not any(credentials.accept(basic(name, "wrong")) for name in ("anna", "otto", "anna", "otto"))
    assert len(calls) == 5  # an unknown user, too, takes the time of a hash


def test_tls_1_2_is_refused_where_1_3_is_asked_for(issuer, write):
    old = client(issuer, newest=ssl.TLSVersion.TLSv1_2)
    with served(write(TLS + "  min_version: TLS13\n")) as server:
        assert get(server, client(issuer))[0] == 200
        with pytest.raises(ssl.SSLError):
            get(server, old)
    with served(write(TLS)) as server:  # as in Prometheus
        assert get(server, old)[0] == 200


def test_a_client_needs_a_certificate_of_the_authority_and_of_a_name_that_is_wanted(issuer, write, tmp_path):
    stranger = Issuer(tmp_path)
    stranger.site("danube")
    outsider = client(issuer)
    outsider.load_cert_chain(stranger.folder / "danube.crt", stranger.folder / "danube.key")
    with served(write(TLS + CLIENTS)) as server:
        assert get(server, client(issuer, "danube"))[0] == get(server, client(issuer, "ebro"))[0] == 200
        for refused in (client(issuer), outsider, client(issuer, "server")):  # a server's is not for clients
            with pytest.raises((ssl.SSLError, OSError)):
                get(server, refused)
    with served(write(TLS + CLIENTS + "  client_allowed_sans: ['urn:fedseg:study:ebro']\n")) as server:
        assert get(server, client(issuer, "ebro"))[0] == 200
        with pytest.raises((OSError, http.client.HTTPException)):
            get(server, client(issuer, "danube"))


def test_a_renewed_certificate_and_a_new_password_hold_without_a_restart(issuer, write):
    def certificate():
        plain = socket.create_connection(("127.0.0.1", server.server_port), 10)
        with client(issuer).wrap_socket(plain, server_hostname="localhost") as connection:
            return connection.getpeercert(binary_form=True)

    with served(write(TLS + PASSWORDS)) as server:
        before = certificate()
        assert certificate() == before
        issuer.server()
        assert certificate() != before
        assert get(server, client(issuer), Authorization=basic("anna", "secret"))[0] == 200
        write(TLS + PASSWORDS.replace("anna", "berta"))
        assert get(server, client(issuer), Authorization=basic("anna", "secret"))[0] == 401
        assert get(server, client(issuer), Authorization=basic("berta", "secret"))[0] == 200


def test_a_file_that_becomes_wrong_changes_nothing(issuer, write, caplog):
    with served(write(TLS + PASSWORDS), host="0.0.0.0") as server:
        for text in ("basic_auth_users: [", TLS, PASSWORDS, ""):  # nobody is let in because a file was emptied
            write(text)
            assert get(server, client(issuer))[0] == 401
            assert get(server, client(issuer), Authorization=basic("anna", "secret"))[0] == 200
    assert "what was there before holds" in caplog.text


def test_headers_of_the_configuration_replace_those_of_the_app(write):
    with served(write("http_server_config:\n  headers:\n    X-Frame-Options: deny\n")) as server:
        assert get(server)[1].get_all("X-Frame-Options") == ["deny"]


def test_garbage_and_silence_on_the_port_keep_nobody_waiting(issuer, write, caplog):
    with served(write(TLS + TOKENS)) as server:
        address = ("127.0.0.1", server.server_port)
        silent = [socket.create_connection(address) for _ in range(20)]
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 5000, b"\x16\x03\x01\x02\x00\x01" + b"\xff" * 600):
            with socket.create_connection(address, 10) as connection:
                connection.sendall(garbage)
                assert b"hello" not in read(connection)
        assert get(server, client(issuer), Authorization=f"Bearer {TOKEN}")[0] == 200
        for connection in silent:
            connection.close()
    assert not caplog.records


def test_connections_end_after_their_time_and_too_many_are_closed_at_once(monkeypatch):
    monkeypatch.setattr(endpoint, "REQUEST_SECONDS", 2.0)
    monkeypatch.setattr(endpoint, "CONNECTIONS", 4)
    with served() as server:
        address = ("127.0.0.1", server.server_port)
        slow = [socket.create_connection(address, 30) for _ in range(endpoint.CONNECTIONS)]
        for connection in slow:
            connection.sendall(b"GET / HT")  # and the rest never comes
        wait_until(lambda: server._room._value == 0)
        with socket.create_connection(address, 30) as late:
            assert read(late) == b""
        for connection in slow:
            assert read(connection) == b""
            connection.close()
        wait_until(lambda: server._room._value == endpoint.CONNECTIONS)
        assert get(server)[0] == 200


def test_an_app_that_breaks_is_logged_and_the_next_request_is_answered(caplog):
    def broken(environ, start):
        if environ["PATH_INFO"] == "/broken":
            raise KeyError("x")
        return hello(environ, start)

    with served(app=broken) as server:
        assert get(server, path="/broken")[0] == 500
        assert get(server)[0] == 200
    assert [record.message for record in caplog.records] == ["a request was not answered"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tls_server_config:\n  cert_file: a\n", r"web.yml: tls_server_config.key_file: is missing"),
        (TLS + "  cipher_suites: [A]\n", r"web.yml: tls_server_config.cipher_suites: unknown key"),
        (TLS + "  client_auth_type: RequestClientCert\n", r"tls_server_config.client_auth_type: .*NoClientCert"),
        (TLS + "  client_ca_file: ca.crt\n", r"tls_server_config: client_ca_file and client_auth_type"),
        (TLS.replace("server.crt", "none.crt"), r"tls_server_config.cert_file and key_file: .*none.crt: No such file"),
        (TLS.replace("server.key", "none.key"), r"tls_server_config.key_file: .*none.key: No such file"),
        (TLS.replace("server.key", "danube.key"), r"tls_server_config.cert_file and key_file: .*key values mismatch"),
        ("rate_limit:\n  burst: 1\n", r"web.yml: rate_limit: unknown key"),
        (TOKENS + TOKENS, r"web.yml: not a readable YAML file: bearer_tokens: stands there twice"),
        ("- a\n", r"web.yml: Input should be an object"),
        ("a: [\n", r"web.yml: not a readable YAML file"),
    ],
)
def test_a_wrong_configuration_names_file_and_key(write, text, told):
    with pytest.raises(ConfigError, match=told):
        listen(hello, "127.0.0.1", 0, write(text))


@pytest.mark.parametrize("section", ["basic_auth_users", "bearer_tokens"])
@pytest.mark.parametrize("secret", ["open sesame", "12345"])
def test_a_password_in_plain_text_is_refused_and_not_shown(write, section, secret):
    with pytest.raises(ConfigError, match=f"web.yml: {section}.anna: is no .*fedseg server web-") as raised:
        listen(hello, "127.0.0.1", 0, write(f"{section}:\n  anna: {secret}\n"))
    assert secret not in str(raised.value)


def test_a_key_that_others_can_read_is_refused(issuer, write):
    key = issuer.folder / "open.key"
    key.write_bytes((issuer.folder / "server.key").read_bytes())
    key.chmod(0o644)
    with pytest.raises(ConfigError, match=r"tls_server_config.key_file: .*others can read .* chmod 600"):
        listen(hello, "127.0.0.1", 0, write(TLS.replace("server.key", "open.key")))


def test_the_threads_of_requests_end_with_them():
    with served() as server:
        for _ in range(3):
            get(server)
        wait_until(lambda: not [thread for thread in threading.enumerate() if "process_request" in thread.name])
        assert not server._open
