"""Certificates and keys on disk, as kits and the authority keep them. Errors name the file and what mends it."""

import hashlib
import shlex
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedseg.errors import KitError

ASK = "unpack the kit again, or ask the coordinator for a new one"


def load_certificate(path: Path) -> x509.Certificate:
    """Read a PEM certificate.

    Raises:
        KitError: it is missing or is none.
    """
    try:
        return x509.load_pem_x509_certificate(read(path))
    except ValueError as error:
        raise KitError(f"{path}: is not a certificate in PEM; {ASK}") from error


def certificate_days_left(path: Path, now: datetime) -> float:
    """Days until a certificate expires; negative afterwards.

    Args:
        path: a PEM certificate.
        now: an aware time.

    Raises:
        KitError: it is not a readable certificate.
    """
    return (load_certificate(path).not_valid_after_utc - now).total_seconds() / 86400


def load_signing_key(path: Path) -> ed25519.Ed25519PublicKey:
    """Read `signing.pub`.

    Raises:
        KitError: it is not an Ed25519 key in PEM.
    """
    try:
        key = serialization.load_pem_public_key(read(path))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise KitError(f"{path}: is not an Ed25519 public key in PEM; {ASK}")
    return key


def fingerprint(key: ed25519.Ed25519PublicKey) -> str:
    """`SHA256:` and the hash of the DER public key, in groups that can be read aloud."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digits = hashlib.sha256(der).hexdigest()
    return "SHA256:" + "-".join(digits[start : start + 4] for start in range(0, len(digits), 4))


def check_key(path: Path, certificate: Path) -> None:
    """See that a private key is closed to others and belongs to its certificate.

    Raises:
        KitError: names what is wrong and the command that mends it.
    """
    content = read(path, f"put the private key of {certificate.name} there, in PEM, and `chmod 600` it")
    check_closed(path)
    quoted = shlex.quote(str(path))
    if b"BEGIN OPENSSH PRIVATE KEY" in content:
        raise KitError(f"{path}: is in the format of OpenSSH, not PKCS#8; run: ssh-keygen -p -m PKCS8 -f {quoted}")
    try:
        key = serialization.load_pem_private_key(content, None)
    except TypeError:
        raise KitError(f"{path}: has a passphrase; run: openssl pkey -in {quoted} -out open.key") from None
    except (ValueError, UnsupportedAlgorithm):
        raise KitError(f"{path}: is not a private key in PEM; {ASK}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != _public_key(certificate):
        raise KitError(f"{path}: is not the key of {certificate.name}; put the key there for which it was issued")


def check_closed(path: Path) -> None:
    """See that only its owner can read a private key.

    Raises:
        KitError: names the command that mends it.
    """
    status = path.stat()
    # a secret that the system mounts belongs to root, and its group is that of the service
    forbidden = 0o077 if status.st_uid != 0 else 0o037
    if status.st_mode & forbidden:
        mode, command = f"{status.st_mode & 0o777:o}", f"chmod 600 {shlex.quote(str(path))}"
        raise KitError(f"{path}: others can read this private key (mode {mode}); run: {command}")


def read(path: Path, remedy: str = ASK) -> bytes:
    """Read a file of a kit.

    Raises:
        KitError: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise KitError(f"{path}: is missing; {remedy}") from None
    except OSError as error:
        raise KitError(f"{path}: cannot be read: {error.strerror}") from error


def _public_key(certificate: Path) -> object:
    try:
        return load_certificate(certificate).public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise KitError(f"{certificate}: has a key of an unknown kind; {ASK}") from None
