"""Passwords and tokens of an HTTP request, compared with a web configuration."""

import base64
import binascii
import hashlib
import hmac
import os
import threading

import bcrypt

from fedseg.web_config import WebConfig

LONGEST_PASSWORD = 72
"""Bytes; bcrypt ignores what comes after them."""


class Credentials:
    """What a web configuration accepts.

    bcrypt takes its time, which is its purpose; a scrape every few seconds need not pay for it each time. Credentials that were
    right are remembered as a keyed hash, whose key only this object knows. Of others, one at a time is looked at.
    """

    def __init__(self, config: WebConfig) -> None:
        self._users = {name: secret.encode() for name, secret in config.basic_auth_users.items()}
        self._slowest = max(self._users.values(), key=lambda secret: secret[4:6], default=b"")
        self._tokens = tuple(bytes.fromhex(digest) for digest in config.bearer_tokens.values())
        self._key = os.urandom(32)
        self._right: set[bytes] = set()
        self._turn = threading.Lock()

    def accept(self, authorization: str) -> bool:
        """Whether an `Authorization` header is that of a user or of a token."""
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "bearer":
            digest = hashlib.sha256(_bytes(value.strip())).digest()
            return sum(hmac.compare_digest(digest, token) for token in self._tokens) > 0
        if scheme.lower() == "basic" and self._users:
            try:
                name, colon, password = base64.b64decode(value.strip(), validate=True).partition(b":")
            except (binascii.Error, ValueError):
                return False
            return bool(colon) and self._is_user(name, password)
        return False

    @property
    def challenge(self) -> str:
        """What `WWW-Authenticate` asks for."""
        return 'Basic realm="fedseg", charset="UTF-8"' if self._users else 'Bearer realm="fedseg"'

    def _is_user(self, name: bytes, password: bytes) -> bool:
        mark = hmac.digest(self._key, len(name).to_bytes(8) + name + password, "sha256")
        if mark in self._right:
            return True
        known = self._users.get(name.decode(errors="replace"))
        with self._turn:
            right = _matches(password, known or self._slowest)  # an unknown user takes as long as a known one
        if right and known is not None:
            self._right.add(mark)
            return True
        return False


def hash_password(password: str) -> str:
    """The bcrypt hash of a password, as it stands in a web configuration file.

    Raises:
        ValueError: it is empty, or longer than bcrypt can tell apart.
    """
    if not 0 < len(password.encode()) <= LONGEST_PASSWORD:
        raise ValueError(f"a password has 1 to {LONGEST_PASSWORD} bytes, this one {len(password.encode())}")
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(12)).decode()


def _matches(password: bytes, secret: bytes) -> bool:
    try:
        return bcrypt.checkpw(password[:LONGEST_PASSWORD], secret)
    except ValueError:  # a zero byte
        return False


def _bytes(header: str) -> bytes:
    """HTTP headers are bytes, which WSGI shows as Latin-1."""
    return header.encode("latin-1", errors="replace")
