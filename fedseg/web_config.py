"""Who may look at an endpoint: the web configuration file of Prometheus' exporters, read and checked.

Format: https://github.com/prometheus/exporter-toolkit/blob/master/docs/web-configuration.md. What is supported of it means the
same here, defaults included, so `promtool check web-config` checks our files, too; `bearer_tokens` is the one addition.
"""

import json
import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, model_validator

from fedseg.credentials import check_closed
from fedseg.errors import ConfigError, KitError
from fedseg.sections import Section, validate_section

Header = Literal[
    "Content-Security-Policy",
    "X-Frame-Options",
    "X-Content-Type-Options",
    "X-XSS-Protection",
    "Strict-Transport-Security",
]

SECRETS = {
    "basic_auth_users": (
        re.compile(r"\$2[aby]\$(0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{53}"),
        "is no bcrypt hash of a password; `fedseg server web-password` makes one",
    ),
    "bearer_tokens": (
        re.compile(r"[0-9a-f]{64}"),
        "is no SHA-256 of a token in hexadecimal digits; `fedseg server web-token` makes both",
    ),
}
"""What their values look like, and what is said of others, which may be passwords and are not shown."""


class TlsConfig(Section):
    """`tls_server_config`: paths are relative to the file that names them."""

    cert_file: str
    """PEM: the certificate, and those between it and its authority."""
    key_file: str
    """PEM, without a passphrase, closed to others."""
    client_auth_type: Literal["NoClientCert", "RequireAndVerifyClientCert"] = "NoClientCert"
    """The other policies of Go's TLS ask for certificates without verifying them, or do not insist."""
    client_ca_file: str | None = None
    """PEM: the authorities of clients' certificates."""
    client_allowed_sans: tuple[str, ...] = ()
    """Subject alternative names of which a client's certificate needs one; none: every client of those authorities."""
    min_version: Literal["TLS12", "TLS13"] = "TLS12"
    max_version: Literal["TLS12", "TLS13"] = "TLS13"

    @model_validator(mode="after")
    def _clients_have_an_authority(self) -> Self:
        if (self.client_auth_type == "NoClientCert") != (self.client_ca_file is None):
            raise ValueError("client_ca_file and client_auth_type: RequireAndVerifyClientCert belong together")
        if self.client_allowed_sans and self.client_ca_file is None:
            raise ValueError("client_allowed_sans: needs client_auth_type: RequireAndVerifyClientCert")
        if self.min_version > self.max_version:
            raise ValueError(f"min_version: must not be above max_version {self.max_version}")
        return self


class HttpConfig(Section):
    """`http_server_config`."""

    http2: bool = True
    """Allowed; this server speaks HTTP/1 all the same."""
    headers: Mapping[Header, str] = Field(default_factory=dict)
    """Sent with every answer, instead of those that the answer would have."""


class WebConfig(Section):
    """A web configuration file."""

    tls_server_config: TlsConfig | None = None
    """Absent: plain HTTP."""
    http_server_config: HttpConfig = HttpConfig()
    basic_auth_users: Mapping[str, str] = Field(default_factory=dict)
    """bcrypt hashes of passwords by user name."""
    bearer_tokens: Mapping[str, str] = Field(default_factory=dict)
    """SHA-256 of tokens, by a name for whoever reads the file. A fast hash is enough for what was drawn at random."""

    @property
    def asks_for_credentials(self) -> bool:
        """Whether requests need a password or a token."""
        return bool(self.basic_auth_users or self.bearer_tokens)

    @property
    def asks(self) -> bool:
        """Whether anybody is asked who he is."""
        tls = self.tls_server_config
        return self.asks_for_credentials or (tls is not None and tls.client_ca_file is not None)


def load_web_config(path: Path) -> WebConfig:
    """Read a web configuration file.

    Raises:
        ConfigError: it is missing, is no YAML, or does not validate: names file and key.
    """
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
        document = json.dumps(found)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {error}") from error
    for section, (secret, otherwise) in SECRETS.items():
        values = found.get(section) if isinstance(found, dict) else None
        for name, value in values.items() if isinstance(values, dict) else ():
            if not (isinstance(value, str) and secret.fullmatch(value)):
                raise ConfigError(f"{path}: {section}.{name}: {otherwise}")
    return validate_section(WebConfig, document, source=str(path))


def files_of(path: Path, config: WebConfig) -> tuple[Path, ...]:
    """The file itself and what it names."""
    tls = config.tls_server_config
    named = (tls.cert_file, tls.key_file, tls.client_ca_file) if tls else ()
    return (path, *(path.parent / name for name in named if name is not None))


def tls_context(path: Path, tls: TlsConfig) -> ssl.SSLContext:
    """The server's side of TLS.

    Args:
        path: the web configuration file.
        tls: its section.

    Raises:
        ConfigError: a file is missing, unreadable, open to others, or does not fit the others.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    versions = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
    context.minimum_version, context.maximum_version = versions[tls.min_version], versions[tls.max_version]
    certificate, key = path.parent / tls.cert_file, path.parent / tls.key_file
    with _naming(path, "key_file", key):
        check_closed(key)
    with _naming(path, "cert_file and key_file", certificate):
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    if tls.client_ca_file is not None:
        authority = path.parent / tls.client_ca_file
        with _naming(path, "client_ca_file", authority):
            context.load_verify_locations(authority)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class _Loader(yaml.SafeLoader):
    """Refuses keys that stand twice: of two passwords of one user, the one would be forgotten silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key}: stands there twice{node.start_mark}")
        return super().construct_mapping(node, deep)


@contextmanager
def _naming(path: Path, key: str, file: Path) -> Iterator[None]:
    """Have errors name the configuration file, the key, and the file that it stands for."""
    try:
        yield
    except KitError as error:
        raise ConfigError(f"{path}: tls_server_config.{key}: {error}") from None
    except (OSError, ValueError) as error:  # what OpenSSL does not like is an OSError
        raise ConfigError(f"{path}: tls_server_config.{key}: {file}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"is not what TLS needs: {(error.reason or 'no PEM').lower().replace('_', ' ')}"
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase; take it off with: openssl pkey -in KEY -out OPEN_KEY")
