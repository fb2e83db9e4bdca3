"""Checks of the way to the coordinator: name, connection, TLS in both directions, its server, the clocks.

The connection is made as the gate makes it: TLS 1.3, the study's authority, the site's certificate, through the proxy of
`HTTPS_PROXY` if there is one. What is sent is one empty, unsigned request.
"""

import base64
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import BadStatusLine, HTTPConnection, RemoteDisconnected
from typing import NoReturn
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedseg.credentials import load_certificate
from fedseg.errors import SiteUnreachable
from fedseg.kit import Kit
from fedseg.site.finding import Finding, Known, attention, need, not_ready, ok

SECONDS = 10.0
"""How long the coordinator may take for each step."""
DAYS = 14
"""A server certificate that expires sooner needs attention."""
PATH = "/v1/fleet/pull-messages"
CLOCKS = (5.0, 60.0)
"""Seconds between the clocks: a site that is further ahead than the first is refused; one that is further behind needs attention,
and is not ready beyond the second."""
_OTHER_AUTHORITY = {18, 19, 20, 21}
"""OpenSSL's numbers for a certificate whose issuer is not known."""


@dataclass(frozen=True)
class Answer:
    """What the coordinator's fence answered."""

    status: int
    date: str | None
    moment: float
    """Seconds since 1970, by this machine's clock, half-way between question and answer."""


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy that stands between."""

    host: str
    port: int
    authorization: str | None = None

    @classmethod
    def of(cls, host: str) -> "Proxy | None":
        """The one that the environment names for a host."""
        proxies = getproxies()
        url = proxies.get("https") or proxies.get("all")
        if not url or proxy_bypass(host):
            return None
        parts = urlsplit(url if "://" in url else f"http://{url}")
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None
        return cls(parts.hostname or "", parts.port or 80, base64.b64encode(login.encode()).decode() if login else None)


def check_name(known: Known) -> Finding:
    """Whether the coordinator's name has an address."""
    config = need(known.kit, "the kit").config
    proxy = Proxy.of(config.host)
    host, port = (proxy.host, proxy.port) if proxy else (config.host, config.port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        whose = "the proxy's name" if proxy else "the coordinator's name"
        return not_ready(
            f"{host}: {whose} is not known here: {error.strerror or error}",
            "let the network's administrators add it to the DNS, or write it into /etc/hosts",
        )
    addresses = ", ".join(dict.fromkeys(str(entry[4][0]) for entry in found))
    return ok(f"{host} is {addresses}" + (f"; it is the proxy on the way to {config.host}" if proxy else ""))


def check_connection(known: Known) -> Finding:
    """TCP, then TLS, then one request: a refused certificate shows only in the answer."""
    from fedseg.site.supernode import tls_context

    kit = need(known.kit, "the kit")
    try:
        with _connected(kit) as plain, _secured(plain, tls_context(kit), kit) as secured:
            days = (ssl.cert_time_to_seconds(str((secured.getpeercert() or {})["notAfter"])) - time.time()) / 86400
            known.answer = _ask(kit, secured)
    except SiteUnreachable as error:
        found, _, remedy = str(error).partition("; ")
        return not_ready(found, remedy)
    found = f"{kit.config.coordinator}: TLS 1.3, both certificates are accepted"
    if days < DAYS:
        return attention(f"{found}; the server's expires in {days:.0f} days", "tell the coordinator")
    return ok(found)


def check_server(known: Known) -> Finding:
    """What stands behind the fence."""
    status = need(known.answer, "the connection").status
    if status == 403:
        return not_ready(
            "the coordinator's fence does not know this site's key with this certificate",
            "use the newest kit; the coordinator may have to start the fence anew",
        )
    if status in (502, 503, 504):
        return attention(
            "the coordinator's fence is there, its server is not running", "nothing: the gate waits for it"
        )
    if status == 429:
        return attention("the coordinator's fence has had too many requests", "try again in a minute")
    if status == 404 or status < 400 or status >= 500:
        return attention(f"the coordinator's server answered in an unexpected way ({status})", "ask the coordinator")
    return ok("the coordinator's server answers")


def check_clock(known: Known) -> Finding:
    """The server refuses what was signed in its future or long ago."""
    answer = need(known.answer, "the connection")
    if answer.date is None:
        return attention("the coordinator's answer has no date", "compare this machine's clock with another one")
    ahead = answer.moment - parsedate_to_datetime(answer.date).timestamp() - 0.5  # dates are cut to whole seconds
    found = f"this machine is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator"
    remedy = "synchronise the clock: timedatectl set-ntp true"
    if ahead > CLOCKS[0]:
        return not_ready(f"{found}; its requests would be refused", remedy)
    if -ahead > CLOCKS[0]:
        return (attention if -ahead <= CLOCKS[1] else not_ready)(found, remedy)
    return ok("both clocks agree")


@contextmanager
def _connected(kit: Kit) -> Iterator[socket.socket]:
    """A TCP connection, perhaps through a proxy."""
    host, port = kit.config.host, kit.config.port
    proxy = Proxy.of(host)
    where = f"the proxy {proxy.host}:{proxy.port}" if proxy else f"{host}:{port}"
    connection = HTTPConnection(proxy.host if proxy else host, proxy.port if proxy else port, timeout=SECONDS)
    if proxy is not None:
        headers = {"Proxy-Authorization": f"Basic {proxy.authorization}"} if proxy.authorization else {}
        connection.set_tunnel(host, port, headers)
    try:
        try:
            connection.connect()
        except ConnectionRefusedError:
            _unreachable(
                f"{where} refused the connection", "is the coordinator's server running, and is this the port?"
            )
        except TimeoutError:
            _unreachable(
                f"{where} did not answer within {SECONDS:.0f} s",
                f"a firewall must let connections out to {host}, port {port}; if there is a proxy, name it in HTTPS_PROXY",
            )
        except (OSError, BadStatusLine) as error:
            _unreachable(f"{where} cannot be reached: {error}", "ask the network's administrators")
        yield connection.sock
    finally:
        connection.close()


@contextmanager
def _secured(plain: socket.socket, context: ssl.SSLContext, kit: Kit) -> Iterator[ssl.SSLSocket]:
    host = kit.config.host
    try:
        secured = context.wrap_socket(plain, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _OTHER_AUTHORITY:
            _unreachable(
                f"{host} shows a certificate of {_shown_issuer(kit)}, not of this study's authority",
                "something on the way opens TLS, which must be switched off for this host; or the kit is of another study",
            )
        remedy = "tell the coordinator; if its certificate is fine, this machine's clock is wrong"
        _unreachable(f"{host}: the server's certificate is not accepted: {error.verify_message}", remedy)
    except ssl.SSLEOFError:
        _unreachable(f"{host}: the connection was cut during the handshake", "ask the network's administrators")
    except ssl.SSLError as error:
        reason = (error.reason or "").lower().replace("_", " ")
        _unreachable(
            f"{host}: no TLS 1.3 there: {reason}", "ask the coordinator for host and port, or your proxy's keepers"
        )
    except OSError as error:
        _unreachable(
            f"{host}: the connection was cut during the handshake: {error}", "ask the network's administrators"
        )
    with secured:
        yield secured


def _ask(kit: Kit, secured: ssl.SSLSocket) -> Answer:
    """One empty request; the fence looks at certificate and key, and the server refuses it for want of a signature."""
    connection = HTTPConnection(kit.config.host, kit.config.port)
    connection.sock = secured
    begun = time.time()
    try:
        connection.request("POST", PATH, b"", {"flwr-public-key": _public_key(kit)})
        response = connection.getresponse()
        return Answer(response.status, response.getheader("Date"), (begun + time.time()) / 2)
    except TimeoutError:
        _unreachable("the coordinator did not answer the request", "try again; then ask the coordinator")
    except (RemoteDisconnected, OSError) as error:
        reason = error.reason if isinstance(error, ssl.SSLError) else None  # a fence of nginx gives none: it hangs up
        why = f": {reason.lower().replace('_', ' ')}" if reason else ""
        _unreachable(
            f"the coordinator refused this site's certificate{why}",
            "it is revoked, expired, or replaced by a newer one: ask the coordinator",
        )
    except BadStatusLine as error:
        _unreachable(f"the coordinator's answer is not HTTP: {error}", "ask the coordinator for host and port")


def _public_key(kit: Kit) -> str:
    """As Flower sends it."""
    key = load_certificate(kit.certificate).public_key()
    return base64.b64encode(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).decode()


def _shown_issuer(kit: Kit) -> str:
    """Who issued the certificate that is shown in place of the coordinator's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with _connected(kit) as plain, context.wrap_socket(plain, server_hostname=kit.config.host) as secured:
            shown = x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")
    except (OSError, ValueError, SiteUnreachable):
        return "somebody"
    return shown.issuer.rfc4514_string() or "somebody"


def _unreachable(found: str, remedy: str) -> NoReturn:
    raise SiteUnreachable(f"{found}; {remedy}")
