"""Signatures with a site's key: ECDSA with SHA-384 on the curve P-384, of which Flower's keys for sites are too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509 import load_pem_x509_certificate

from fedseg.errors import ConfigError


def sign_bytes(data: bytes, key_path: Path) -> bytes:
    """Sign something.

    Args:
        data: what to sign.
        key_path: a private key, PEM or OpenSSH, without passphrase.

    Raises:
        ConfigError: the file is missing or holds another kind of key.
    """
    key = _read(key_path, lambda pem: load_pem_private_key(pem, None), lambda ssh: load_ssh_private_key(ssh, None))
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(f"{key_path}: must be a private EC key on P-384, PEM or OpenSSH, without passphrase")
    return key.sign(data, ec.ECDSA(hashes.SHA384()))


def is_signed(data: bytes, signature: bytes, key_path: Path) -> bool:
    """Whether somebody has signed something.

    Args:
        data: what was signed.
        signature: by `sign_bytes`.
        key_path: the signer's certificate, or public key, PEM or OpenSSH.

    Raises:
        ConfigError: the file is missing or holds another kind of key.
    """
    key = _read(
        key_path, lambda pem: load_pem_x509_certificate(pem).public_key(), load_pem_public_key, load_ssh_public_key
    )
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(f"{key_path}: must be a certificate or a public EC key on P-384, PEM or OpenSSH")
    try:
        key.verify(signature, data, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def _read(path: Path, *ways: Callable[[bytes], Any]) -> Any:
    """The key in a file, by the first way in which it can be read; None: there is no such way."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: not a readable key: {error}") from error
    for read in ways:
        try:
            return read(data)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            continue
    return None
