"""The study file: who takes part in a study, and where its server is."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field, field_validator, model_validator

from fedseg.config import Experiment
from fedseg.coordinator.fence import SUPERLINK_PORT
from fedseg.errors import ConfigError
from fedseg.names import Name
from fedseg.sections import PositiveInt, Section, load_section

Line = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]
"""A text in one line; it may become a part of a certificate's name."""
FileName = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")]
"""A path relative to the study file."""
KeySource = Literal["made here", "public key", "CSR"]

COORDINATOR = "coordinator"
LONGEST_REASON = 200
"""Characters of what a library says of a broken key; it may repeat all of it."""
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DNS_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")


class CoordinatorConfig(Section):
    """The server that sites connect to."""

    host: str
    """DNS name or IP address."""
    port: Annotated[int, Field(gt=0, lt=65536)] = 443
    """Port that the outside sees."""
    names: tuple[str, ...] = ()
    """Further DNS names and IP addresses under which it may be reached."""
    organisation: Line | None = None
    """Stands in the certificates of the authority and of the server."""
    listen: str = "0.0.0.0"
    """Address of the network device on which the fence listens; `::` for all of IPv6."""
    superlink_port: Annotated[int, Field(gt=0, lt=65536)] = SUPERLINK_PORT
    """Port of the SuperLink on the loopback device."""

    @field_validator("listen")
    @classmethod
    def _listen_is_an_address(cls, address: str) -> str:
        try:
            return str(ipaddress.ip_address(address))
        except ValueError:
            raise ValueError("must be the IP address of a network device here; 0.0.0.0 is all of them") from None

    @field_validator("host")
    @classmethod
    def _host_can_be_certified(cls, host: str) -> str:
        return _checked_host(host)

    @field_validator("names")
    @classmethod
    def _names_can_be_certified(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_checked_host(name) for name in names)

    @property
    def address(self) -> str:
        """`host:port`, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def all_names(self) -> tuple[str, ...]:
        """`host` and `names`, each once."""
        return tuple(dict.fromkeys((self.host, *self.names)))


class StudySite(Section):
    """A hospital that takes part."""

    name: Name
    """Its name in the federation, as in its site file."""
    institution: Line | None = None
    """Its full name."""
    contact: Line | None = None
    """Whom to call there."""
    public_key: FileName | None = None
    """File with the hospital's own public key, relative to the study file; absent: a key is made for it."""
    csr: FileName | None = None
    """File with its certificate request (PKCS#10). Only its key is used, and only if it signed the request."""

    @model_validator(mode="after")
    def _name_and_key_are_clear(self) -> Self:
        if self.name.casefold() == COORDINATOR or self.name.casefold().endswith(".zip"):
            raise ValueError(f"name: a site cannot be called {self.name!r}; choose another name")
        if self.public_key is not None and self.csr is not None:
            raise ValueError("public_key: is already in the request; give either public_key or csr")
        return self

    @property
    def key_source(self) -> KeySource:
        """Where its private key was made."""
        return "CSR" if self.csr is not None else "public key" if self.public_key is not None else "made here"


class StudyConfig(Section):
    """What `fedseg provision` reads."""

    name: Name
    """Name of the study; letters, digits, `.`, `_`, `-`."""
    experiment: FileName
    """Experiment file, relative to the study file."""
    valid_days: Annotated[PositiveInt, Field(le=3650)] = 365
    """Days for which certificates of the server and of sites are valid."""
    coordinator: CoordinatorConfig
    sites: tuple[StudySite, ...] = ()

    @field_validator("sites")
    @classmethod
    def _sites_are_distinct(cls, sites: tuple[StudySite, ...]) -> tuple[StudySite, ...]:
        seen: dict[str, str] = {}
        for site in sites:
            if site.name.casefold() in seen:
                raise ValueError(
                    f"{seen[site.name.casefold()]!r} and {site.name!r} are one name; each site needs its own"
                )
            seen[site.name.casefold()] = site.name
        return sites


@dataclass(frozen=True)
class Study:
    """A study file with what it refers to."""

    config: StudyConfig
    experiment: bytes
    """The experiment file as it stands; it is valid."""
    pretrained: tuple[str, Path] | None
    """The experiment's pretrained weights: the name in the experiment, and the file."""
    public_keys: dict[str, ec.EllipticCurvePublicKey]
    """Keys that hospitals made themselves, by site."""


def load_study(path: Path) -> Study:
    """Read a study file, its experiment and the hospitals' keys.

    Raises:
        ConfigError: one of the files is missing or wrong.
    """
    config = load_section(StudyConfig, path)
    experiment = path.parent / config.experiment
    pretrained = load_section(Experiment, experiment).model.pretrained
    weights = None if pretrained is None else (pretrained, _weights_beside(experiment, pretrained))
    keys: dict[str, ec.EllipticCurvePublicKey] = {}
    for site in config.sites:
        if site.public_key is not None:
            keys[site.name] = read_public_key(path.parent / site.public_key)
        if site.csr is not None:
            keys[site.name] = read_request(path.parent / site.csr)
    owners: dict[bytes, str] = {}
    for name, key in keys.items():
        point = key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
        if owners.setdefault(point, name) != name:
            raise ConfigError(f"{path}: {owners[point]} and {name} have one key; each hospital needs a key of its own")
    return Study(config, experiment.read_bytes(), weights, keys)


def read_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """Read a hospital's public key, PEM or OpenSSH.

    Raises:
        ConfigError: it is missing, is none, or is of another kind than EC P-384 or P-256.
    """
    content = _read(path)
    if b"PRIVATE KEY" in content:
        raise ConfigError(
            f"{path}: is a private key, which must never leave its hospital. Ask for a new one, and for its public half: "
            "openssl pkey -in site.key -pubout"
        )
    load = serialization.load_ssh_public_key if content.startswith(b"ecdsa-") else serialization.load_pem_public_key
    try:
        return _checked_key(load(content), path)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path}: is not a public key of EC P-384 or P-256 in PEM or OpenSSH format: {str(error)[:LONGEST_REASON]}"
        ) from error


def read_request(path: Path) -> ec.EllipticCurvePublicKey:
    """Read the key of a certificate request, PEM or DER; nothing else in the request is used.

    Raises:
        ConfigError: it is missing, is none, was not signed with its own key, or that is not EC P-384 or P-256.
    """
    content = _read(path)
    load = x509.load_pem_x509_csr if content.lstrip().startswith(b"-----") else x509.load_der_x509_csr
    try:
        request = load(content)
        key, signed = request.public_key(), request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise ConfigError(f"{path}: is not a certificate request (PKCS#10): {error}") from error
    if not signed:
        raise ConfigError(f"{path}: was not signed with the key that it is for; ask the hospital to make it again")
    return _checked_key(key, path)


def _checked_key(key: object, path: Path) -> ec.EllipticCurvePublicKey:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        kind = type(key).__name__.removeprefix("_").removesuffix("PublicKey")
        raise ConfigError(f"{path}: must be a key of EC P-384 (secp384r1) or P-256, is one of {kind}")
    if not isinstance(key.curve, ec.SECP384R1 | ec.SECP256R1):
        raise ConfigError(f"{path}: must be a key of EC P-384 (secp384r1) or P-256, is on {key.curve.name}")
    return key


def _weights_beside(experiment: Path, name: str) -> Path:
    """Pretrained weights travel in the coordinator's kit under the same name."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or relative.suffix != ".safetensors":
        raise ConfigError(
            f"{experiment}: model.pretrained: must be a .safetensors file in the experiment's folder, so that it can be "
            f"packed into the coordinator's kit, got {name!r}"
        )
    path = experiment.parent / relative
    if not path.is_file():
        raise ConfigError(f"{experiment}: model.pretrained: {path}: no such file")
    return path


def _checked_host(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    numeric = host.replace(".", "").isdecimal()
    if len(host) > 253 or numeric or not _DNS_NAME.fullmatch(host):
        raise ValueError("must be a DNS name such as fl.example.org (xn--... if it is not ASCII), or an IP address")
    return host.lower()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
