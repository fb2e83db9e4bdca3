"""A kit: the signed folder with which one machine, a hospital's or the coordinator's, joins a study.

`fedseg provision` writes kits. Whoever received one opens it with `load_kit`, which checks the manifest's signature, the
hash of every file in the manifest, and that the private keys belong to the certificates and are closed to others.

The signature binds the files to `signing.pub`, which lies in the same folder: it proves nothing before a person has
compared `Kit.fingerprint` with the coordinator by telephone.
"""

import base64
import binascii
import hashlib
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from pydantic import AwareDatetime, Field, field_validator, model_validator

from fedseg.credentials import ASK, check_key, fingerprint, load_certificate, load_signing_key, read
from fedseg.credentials import certificate_days_left as certificate_days_left
from fedseg.errors import ConfigError, KitError
from fedseg.names import Name
from fedseg.sections import Section, load_section, validate_section

S = TypeVar("S", bound=Section)

FORMAT: Literal[1] = 1
Role = Literal["site", "coordinator"]

SHARED_FILES = ("kit.toml", "ca.crt", "signing.pub", "experiment.toml", "app.fab", "README.md")
FILES: Mapping[Role, tuple[str, ...]] = {
    "site": (*SHARED_FILES, "site.crt"),
    "coordinator": (*SHARED_FILES, "server.crt", "loopback.crt", "crl.pem", "sites.json", "nginx.conf"),
}
"""Files that every manifest lists; at the coordinator also pretrained weights, if there are any."""
KEYS: Mapping[Role, Mapping[str, str]] = {
    "site": {"site.key": "site.crt"},
    "coordinator": {"server.key": "server.crt", "loopback.key": "loopback.crt"},
}
"""Private keys and their certificates. No manifest lists keys: a hospital may bring its own."""


class KitConfig(Section):
    """`kit.toml`: whose kit this is."""

    format: Literal[1]
    """Version of the layout."""
    study: Name
    """Name of the study."""
    role: Role
    """`site` for a hospital, `coordinator` for the server."""
    site: Name | None = None
    """The hospital's name in the federation."""
    coordinator: str
    """Where sites connect to, as `host:port`; an IPv6 address stands in brackets."""
    superlink_port: Annotated[int, Field(gt=0, lt=65536)] | None = None
    """At the coordinator: port of the SuperLink on the loopback device, to which the fence passes requests on."""

    @field_validator("coordinator")
    @classmethod
    def _coordinator_is_an_address(cls, address: str) -> str:
        split_address(address)
        return address

    @model_validator(mode="after")
    def _sites_have_names(self) -> Self:
        if (self.role == "site") != (self.site is not None):
            raise ValueError("site: is the name of the hospital for role 'site', and left out for 'coordinator'")
        return self

    @property
    def host(self) -> str:
        """Host of the coordinator, without brackets."""
        return split_address(self.coordinator)[0]

    @property
    def port(self) -> int:
        """Port of the coordinator."""
        return split_address(self.coordinator)[1]


class FileEntry(Section):
    """One file in a manifest."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class Manifest(Section):
    """`manifest.json`: every file of a kit that its receiver does not edit."""

    format: Literal[1]
    study: Name
    role: Role
    site: Name | None
    created: AwareDatetime
    files: dict[str, FileEntry]


class IssuedCertificate(Section):
    """A certificate of the study's authority."""

    public_key: str
    """Base64 of the DER SubjectPublicKeyInfo."""
    certificate_sha1: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    """Of the DER certificate: what nginx calls the client's fingerprint."""
    serial: Annotated[str, Field(pattern=r"^[0-9a-f]{1,40}$")]
    """Hexadecimal, lower case."""
    not_after: AwareDatetime
    """When it expires."""
    revoked: AwareDatetime | None = None
    """Since when it does not count any more."""

    @field_validator("public_key")
    @classmethod
    def _public_key_can_be_read(cls, text: str) -> str:
        try:
            serialization.load_der_public_key(base64.b64decode(text, validate=True))
        except (ValueError, binascii.Error, UnsupportedAlgorithm) as error:
            raise ValueError("must be the base64 of a DER SubjectPublicKeyInfo") from error
        return text


class _Named(Section):
    name: Name
    institution: str | None = None


class RosterSite(IssuedCertificate, _Named):
    """A site that may connect, or may no longer."""


class Roster(Section):
    """`sites.json`: the sites of a study, as the running coordinator knows them."""

    format: Literal[1]
    sites: tuple[RosterSite, ...] = ()

    @field_validator("sites")
    @classmethod
    def _sites_are_distinct(cls, sites: tuple[RosterSite, ...]) -> tuple[RosterSite, ...]:
        names = [site.name.casefold() for site in sites]
        if len(set(names)) != len(names):
            raise ValueError("two sites have one name")
        return sites

    def admitted(self, now: datetime) -> tuple[RosterSite, ...]:
        """The sites that may connect: neither revoked nor expired."""
        return tuple(site for site in self.sites if site.revoked is None and site.not_after > now)


@dataclass(frozen=True)
class Kit:
    """A kit that has been checked."""

    folder: Path
    config: KitConfig
    fingerprint: str
    """`SHA256:...` of `signing.pub`, to compare by telephone."""

    @property
    def ca(self) -> Path:
        """Certificate of the study's authority."""
        return self.folder / "ca.crt"

    @property
    def certificate(self) -> Path:
        """The certificate that this machine shows to others."""
        return self.folder / ("site.crt" if self.config.role == "site" else "server.crt")

    @property
    def key(self) -> Path:
        """Private key of `certificate`."""
        return self.certificate.with_suffix(".key")

    @property
    def experiment(self) -> Path:
        """What is to be trained."""
        return self.folder / "experiment.toml"

    @property
    def app(self) -> Path:
        """The app bundle."""
        return self.folder / "app.fab"

    @property
    def signing_key(self) -> Path:
        """Public key under which the coordinator signs kits."""
        return self.folder / "signing.pub"

    @property
    def roster(self) -> Path:
        """The sites of the study; only the coordinator has it."""
        return self.folder / "sites.json"


def load_kit(folder: Path, *, with_keys: bool = True) -> Kit:
    """Open a kit and check all of it. Files that the manifest does not list are left alone.

    Args:
        folder: the unpacked kit.
        with_keys: also check the private keys; a program that needs none may run where they are not.

    Raises:
        KitError: a file is missing, changed or open to others; names it and what to do.
        ConfigError: the manifest or `kit.toml` is signed, but wrong.
    """
    signing_key = load_signing_key(folder / "signing.pub")
    manifest = _signed_manifest(folder, signing_key)
    for name, entry in manifest.files.items():
        _check_listed(folder, name, entry, manifest.role)
    lacking = [name for name in FILES[manifest.role] if name not in manifest.files]
    if lacking:
        raise KitError(f"{folder / 'manifest.json'}: does not list {', '.join(lacking)}; {ASK}")
    config = load_section(KitConfig, folder / "kit.toml")
    if (config.study, config.role, config.site) != (manifest.study, manifest.role, manifest.site):
        raise KitError(f"{folder / 'kit.toml'}: is of another kit than manifest.json; {ASK}")
    _check_certificates(folder, config)
    if with_keys:
        for key, certificate in KEYS[config.role].items():
            check_key(folder / key, folder / certificate)
    return Kit(folder, config, fingerprint(signing_key))


def load_roster(path: Path) -> Roster:
    """Read `sites.json`.

    Raises:
        ConfigError: it is not a roster.
        KitError: it is missing or cannot be read.
    """
    return parse_document(Roster, read(path), path)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`, of an IPv6 address without its brackets."""
    host, _, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or (":" in bare) != (bare != host) or not port.isascii() or not port.isdecimal():
        raise ValueError("must be host:port, such as fl.example.org:443 or [2001:db8::1]:443")
    if bare != host:
        try:
            ipaddress.IPv6Address(bare)
        except ValueError:
            raise ValueError("must have an IPv6 address in the brackets, such as [2001:db8::1]:443") from None
    if len(port) > 5 or not 0 < int(port) < 65536:
        raise ValueError("must have a port from 1 to 65535")
    return bare, int(port)


def parse_document(kind: type[S], content: bytes, path: Path) -> S:
    """Validate JSON that was read from a file."""
    try:
        return validate_section(kind, content.decode(), source=str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error}") from error


def _signed_manifest(folder: Path, signing_key: ed25519.Ed25519PublicKey) -> Manifest:
    content, signature = read(folder / "manifest.json"), read(folder / "manifest.sig")
    try:
        try:
            signing_key.verify(base64.b64decode(signature.strip(), validate=True), content)
        except binascii.Error:
            raise InvalidSignature from None
    except InvalidSignature:
        raise KitError(
            f"{folder / 'manifest.json'}: was not signed with the key in signing.pub, or manifest.sig is damaged; {ASK}"
        ) from None
    return parse_document(Manifest, content, folder / "manifest.json")


def _check_listed(folder: Path, name: str, entry: FileEntry, role: Role) -> None:
    path = PurePosixPath(name)
    weights = (
        role == "coordinator" and path.suffix == ".safetensors" and not path.is_absolute() and ".." not in path.parts
    )
    if name not in FILES[role] and not weights:
        raise KitError(f"{folder / 'manifest.json'}: lists {name!r}, which no kit of a {role} has; {ASK}")
    try:
        with (folder / path).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise KitError(f"{folder / path}: is missing; {ASK}") from None
    except (OSError, ValueError) as error:
        raise KitError(f"{str(folder / path)!r}: cannot be read: {error}; {ASK}") from error
    if sha256 != entry.sha256:
        raise KitError(f"{folder / path}: is not the file that the coordinator signed; {ASK}")


def _check_certificates(folder: Path, config: KitConfig) -> None:
    authority = load_certificate(folder / "ca.crt")
    for name in KEYS[config.role].values():
        certificate = load_certificate(folder / name)
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            raise KitError(f"{folder / name}: was not issued by ca.crt; {ASK}") from None
    names = [str(name.value) for name in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
    if config.role == "site" and names != [config.site]:
        raise KitError(f"{folder / 'site.crt'}: names {', '.join(names) or 'nobody'}, kit.toml {config.site}; {ASK}")
