"""The ledger, `authority/roster.json`: every certificate that a study's authority ever issued, and to whom."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fedseg.coordinator.study import KeySource
from fedseg.credentials import read
from fedseg.federated.checkpoint import write_durably
from fedseg.kit import IssuedCertificate, Roster, RosterSite, parse_document
from fedseg.names import Name
from fedseg.sections import Section


class LedgerSite(RosterSite):
    """A site with what only the coordinator's office knows of it."""

    contact: str | None = None
    key_source: KeySource
    earlier: tuple[IssuedCertificate, ...] = ()
    """Certificates that were replaced; all are revoked."""

    def renewed(self, certificate: IssuedCertificate, now: datetime) -> "LedgerSite":
        """The same site with another certificate."""
        old = IssuedCertificate(**{name: getattr(self, name) for name in IssuedCertificate.model_fields})
        return self.model_copy(update={**dict(certificate), "earlier": (*self.earlier, replaced(old, now))})


class Ledger(Section):
    """What the authority has issued, and for what."""

    format: Literal[1]
    study: Name
    address: str
    """`host:port` in the kits."""
    names: tuple[str, ...]
    """DNS names and IP addresses in the server's certificate."""
    experiment_sha256: str
    """Of the experiment in the kits."""
    app_sha256: str
    """Of the app bundle in the kits."""
    crl_number: Annotated[int, Field(ge=0)] = 0
    """Of the last revocation list."""
    server: IssuedCertificate | None = None
    loopback: IssuedCertificate | None = None
    earlier: tuple[IssuedCertificate, ...] = ()
    """The server's certificates that were replaced."""
    sites: tuple[LedgerSite, ...] = ()

    @property
    def roster(self) -> Roster:
        """What the running coordinator needs to know."""
        kept = tuple(RosterSite.model_fields)
        return Roster(
            format=1, sites=tuple(RosterSite(**{name: getattr(site, name) for name in kept}) for site in self.sites)
        )

    def site(self, name: str) -> LedgerSite | None:
        """A site, however its name is capitalised."""
        return next((site for site in self.sites if site.name.casefold() == name.casefold()), None)

    def with_site(self, site: LedgerSite) -> "Ledger":
        """With a new site at the end, or a changed one in its place."""
        if self.site(site.name) is None:
            return self.model_copy(update={"sites": (*self.sites, site)})
        return self.model_copy(update={"sites": tuple(site if old.name == site.name else old for old in self.sites)})

    def with_server(self, server: IssuedCertificate, loopback: IssuedCertificate, now: datetime) -> "Ledger":
        """With other certificates of the coordinator."""
        old = [replaced(certificate, now) for certificate in (self.server, self.loopback) if certificate is not None]
        return self.model_copy(update={"server": server, "loopback": loopback, "earlier": (*self.earlier, *old)})

    def certificates(self) -> Iterator[IssuedCertificate]:
        """All, the replaced ones too."""
        yield from (certificate for certificate in (self.server, self.loopback) if certificate is not None)
        yield from self.earlier
        for site in self.sites:
            yield site
            yield from site.earlier

    def revoked(self) -> list[IssuedCertificate]:
        """All that do not count any more."""
        return [certificate for certificate in self.certificates() if certificate.revoked is not None]


def replaced(certificate: IssuedCertificate, now: datetime) -> IssuedCertificate:
    """A certificate that does not count from now on."""
    return certificate if certificate.revoked is not None else certificate.model_copy(update={"revoked": now})


def load_ledger(path: Path) -> Ledger:
    """Read a ledger.

    Raises:
        KitError: it is missing.
        ConfigError: it is damaged.
    """
    return parse_document(Ledger, read(path), path)


def save_ledger(path: Path, ledger: Ledger) -> None:
    """Write a ledger durably."""
    write_durably(path, document(ledger))


def document(section: Section) -> bytes:
    """A section as JSON that a person can read."""
    return section.model_dump_json(indent=2).encode() + b"\n"
