"""Somebody who talks to the fence with whatever certificate, key, time and path."""

import base64
import http.client
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node

from fedseg.coordinator.authority import create_authority, load_authority
from fedseg.coordinator.study import CoordinatorConfig

CLOSED = "closed"
"""The connection was refused or closed without an answer."""
HEARTBEAT = "/v1/fleet/send-node-heartbeat"


@dataclass(frozen=True)
class Credentials:
    """A certificate chain for TLS and a key for Flower's signatures."""

    certificate: Path | None
    key: Path | None

    def headers(self, when: datetime | None = None) -> dict[str, str]:
        """What Flower's SuperNode sends with each request."""
        assert self.key is not None
        key = serialization.load_pem_private_key(self.key.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        moment = (when or datetime.now(UTC)).isoformat()
        signature = key.sign(moment.encode(), ec.ECDSA(hashes.SHA256()))
        return {
            "flwr-public-key": base64.b64encode(public).decode(),
            "flwr-timestamp": moment,
            "flwr-signature": base64.b64encode(signature).decode(),
            "flwr-package-name": "flwr",
            "flwr-package-version": "1.41.0",
            "flwr-component-name": "SuperNode",
            "content-type": "application/protobuf",
            "accept": "application/protobuf",
        }


@dataclass(frozen=True)
class Outsider:
    """Sends requests to a fence on this machine.

    Args:
        port: of the fence.
        authority: the study's CA certificate.
        folder: for credentials that are made up.
    """

    port: int
    authority: Path
    folder: Path

    def ask(
        self,
        path: str,
        credentials: Credentials | None = None,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        *,
        tls: ssl.TLSVersion | None = ssl.TLSVersion.TLSv1_3,
        method: str = "POST",
    ) -> int | str:
        """Status of the answer, or `CLOSED`."""
        if tls is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        else:
            context = ssl.create_default_context(cafile=self.authority)
            context.minimum_version = context.maximum_version = tls
            if credentials is not None and credentials.certificate is not None:
                context.load_cert_chain(credentials.certificate, credentials.key)
            connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=10, context=context)
        try:
            connection.request(method, path, body, headers or {})
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return CLOSED
        finally:
            connection.close()

    def with_certificate(self, authority: Path | None, name: str, days: float) -> Credentials:
        """A new key with a certificate for a site's name, of the study's authority or of one that is made up.

        Args:
            authority: folder of the study's authority, if somebody has got hold of it.
            name: of a site.
            days: until it expires; negative: it has expired.
        """
        now = datetime.now(UTC)
        config = CoordinatorConfig(host="127.0.0.1")
        issuer = load_authority(authority) if authority else create_authority("tiny", config, 365, now)
        key = ec.generate_private_key(ec.SECP384R1())
        validity = (now - timedelta(days=30), now + timedelta(days=days))
        certificate = issuer.issue_site(key.public_key(), "tiny", name, None, validity)
        stem = self.folder / f"{name}-{days}-{authority is None}"
        stem.with_suffix(".crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        stem.with_suffix(".key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return Credentials(stem.with_suffix(".crt"), stem.with_suffix(".key"))


def heartbeat(node_id: int) -> bytes:
    """A node's sign of life: of all calls the one that changes nothing."""
    return SendNodeHeartbeatRequest(node=Node(node_id=node_id), heartbeat_interval=30).SerializeToString()
