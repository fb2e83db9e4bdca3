"""From a study file to a kit for every machine; run again to add, renew and revoke."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedseg.app_bundle import app_bundle, bundled_files
from fedseg.coordinator import texts
from fedseg.coordinator.authority import (
    CLOCK_SKEW,
    Authority,
    Validity,
    certificate_pem,
    create_authority,
    describe,
    key_pem,
    load_authority,
    new_key,
    public_pem,
)
from fedseg.coordinator.authority import FILES as AUTHORITY_FILES
from fedseg.coordinator.conflicts import Wishes, refuse_conflicts
from fedseg.coordinator.contents import Contents
from fedseg.coordinator.folders import (
    Content,
    locked,
    recover,
    refresh_kit,
    refresh_zip,
    remove_parts,
    write_folder,
    write_kit,
    write_zip,
)
from fedseg.coordinator.ledger import Ledger, LedgerSite, document, load_ledger, save_ledger
from fedseg.coordinator.study import COORDINATOR, Study, StudySite, load_study
from fedseg.credentials import load_certificate
from fedseg.errors import ConfigError, KitError
from fedseg.federated.checkpoint import write_durably
from fedseg.kit import IssuedCertificate

AUTHORITY = "authority"
WARN_DAYS = 30
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Provisioned:
    """What a run did."""

    folder: Path
    written: tuple[str, ...]
    """Names of the kits that were written; `coordinator` is the server's."""
    ledger: Ledger
    warnings: tuple[str, ...]
    fingerprint: str
    """Of the signing key."""


def provision(
    study_file: Path,
    folder: Path,
    *,
    now: datetime,
    app: Path | None = None,
    renew: Sequence[str] = (),
    revoke: Sequence[str] = (),
    update: bool = False,
) -> Provisioned:
    """Make the kits that are missing, and those that are asked for anew. Other kits keep every byte.

    Args:
        study_file: the study.
        folder: where kits and authority are.
        now: an aware time: certificates start five minutes earlier.
        app: app bundle; absent: the one of earlier kits, else the one of this installation.
        renew: sites, or `coordinator`, that get a new certificate and kit.
        revoke: sites that may not connect any more.
        update: write all kits anew with the certificates that they have: for a changed experiment, bundle or address.

    Raises:
        ConfigError: the study or what it refers to is wrong, or it no longer fits the kits.
        KitError: authority or kits are damaged, or cannot be written.
    """
    try:
        return _provision(study_file, folder, app, Wishes(renew, revoke, update), now)
    except OSError as error:
        place = error.filename or folder
        raise KitError(f"{place}: {error.strerror}; mend that, then give the same command again") from error


def _provision(study_file: Path, folder: Path, app: Path | None, wishes: Wishes, now: datetime) -> Provisioned:
    study = load_study(study_file)
    with locked(folder):
        for name in (AUTHORITY, COORDINATOR):
            recover(folder / name)
        remove_parts(folder / AUTHORITY, AUTHORITY_FILES)
        bundle = _app_bundle(folder, app, wishes.update)
        authority, ledger = _open_or_create(folder, study, bundle, now)
        for name in {*(site.name for site in study.config.sites), *(site.name for site in ledger.sites)}:
            recover(folder / "sites" / name)
        contents = Contents(study, authority, bundle)
        warnings = refuse_conflicts(folder, contents, ledger, wishes)
        office = _Office(folder, contents, ledger, now)
        office.adopt()
        office.revoke(wishes.revoke)
        office.make_coordinator(wishes)
        for site in study.config.sites:
            office.make_site(site, wishes)
        office.finish()
    if authority.not_after < now + timedelta(days=study.config.valid_days):
        warnings.append(f"no certificate lasts longer than the authority, which ends on {authority.not_after:%Y-%m-%d}")
    warnings += expiry_warnings(office.ledger, authority.not_after, now)
    return Provisioned(folder, tuple(office.written), office.ledger, tuple(warnings), contents.fingerprint)


def standing(folder: Path, now: datetime) -> tuple[Ledger, list[str]]:
    """Who has which certificate, and what expires soon. Nothing is written.

    Raises:
        KitError: there is no authority in the folder, or it is damaged.
    """
    authority = load_authority(folder / AUTHORITY)
    ledger = load_ledger(folder / AUTHORITY / "roster.json")
    return ledger, expiry_warnings(ledger, authority.not_after, now)


def expiry_warnings(ledger: Ledger, authority_not_after: datetime, now: datetime) -> list[str]:
    """A sentence for everything in use that expires soon, or has."""
    due: list[tuple[str, datetime, str]] = [
        (site.name, site.not_after, f"--renew {site.name}") for site in ledger.sites if site.revoked is None
    ]
    if ledger.server is not None:
        due.append(("the coordinator's server", ledger.server.not_after, "--renew coordinator"))
    due.append(("the authority itself", authority_not_after, "a new folder, with new kits for everybody"))
    warnings = []
    for who, not_after, remedy in due:
        days = days_left(not_after, now)
        if days < WARN_DAYS:
            when = "has expired" if days < 0 else f"expires in {days:.0f} days"
            warnings.append(f"the certificate of {who} {when}, on {not_after:%Y-%m-%d}; use {remedy}")
    return warnings


def days_left(not_after: datetime, now: datetime) -> float:
    """Days until a time; negative afterwards."""
    return (not_after - now).total_seconds() / 86400


@dataclass
class _Office:
    """One run: the ledger is saved after each kit, so that a killed run can be repeated."""

    folder: Path
    contents: Contents
    ledger: Ledger
    now: datetime
    written: list[str] = field(default_factory=list)

    def adopt(self) -> None:
        """Enter kits into the ledger that a killed run had finished but not entered."""
        coordinator = self.folder / COORDINATOR
        server, loopback = (self._unrecorded(coordinator / name) for name in ("server.crt", "loopback.crt"))
        if server is not None and loopback is not None:
            write_zip(coordinator)
            self._enter_server(server, loopback)
        for site in self.contents.study.config.sites:
            certificate = self._unrecorded(self._kit_of(site.name) / "site.crt")
            if certificate is not None:
                write_zip(self._kit_of(site.name))
                self._enter_site(site, certificate)

    def revoke(self, names: Collection[str]) -> None:
        """Admit sites no more."""
        for name in names:
            site = self.ledger.site(name)
            if site is not None and site.revoked is None:
                self._save(self.ledger.with_site(site.model_copy(update={"revoked": self.now})))

    def make_coordinator(self, wishes: Wishes) -> None:
        """Write the server's kit if it is missing, or asked for."""
        folder, renew = self.folder / COORDINATOR, COORDINATOR in wishes.renew
        if self.ledger.server is not None and not (renew or wishes.update):
            return
        if self.ledger.server is None or renew:
            _refuse_strangers(folder, self.ledger.server)
            authority, coordinator = self.contents.authority, self.contents.study.config.coordinator
            key, loopback_key = new_key(), new_key()
            organisation, validity = coordinator.organisation, self._validity()
            server = authority.issue_server(key.public_key(), coordinator.all_names, organisation, validity)
            loopback = authority.issue_server(loopback_key.public_key(), LOOPBACK_NAMES, organisation, validity)
            private = {"server.key": key_pem(key), "loopback.key": key_pem(loopback_key)}
        else:
            server, loopback = load_certificate(folder / "server.crt"), load_certificate(folder / "loopback.crt")
            private = _keys_in(folder, "server.key", "loopback.key")
        files = self._coordinator_files(server, loopback)
        write_kit(folder, self.contents.config(None), files, private, {}, self.contents.authority, self.now)
        self._enter_server(server, loopback)

    def make_site(self, site: StudySite, wishes: Wishes) -> None:
        """Write a site's kit if it is missing, or asked for."""
        known, folder, contents = self.ledger.site(site.name), self._kit_of(site.name), self.contents
        private: dict[str, bytes] = {}
        if known is None or site.name in wishes.renew:
            _refuse_strangers(folder, known)
            key: ec.EllipticCurvePublicKey | None = contents.study.public_keys.get(site.name)
            if key is None:
                made = new_key()
                key, private = made.public_key(), {"site.key": key_pem(made)}
            certificate = contents.authority.issue_site(
                key, contents.study.config.name, site.name, site.institution, self._validity()
            )
        elif wishes.update and known.revoked is None:
            certificate = load_certificate(folder / "site.crt")
            private = _keys_in(folder, "site.key")
        else:
            return
        files, loose = contents.of_site(site, certificate), {"site.toml": texts.site_toml(site.name)}
        write_kit(folder, contents.config(site.name), files, private, loose, contents.authority, self.now)
        self._enter_site(site, certificate)

    def finish(self) -> None:
        """Bring the ledger, the revocation list and the server's kit up to date."""
        coordinator = self.contents.study.config.coordinator
        facts = {
            "address": coordinator.address,
            "names": coordinator.all_names,
            "experiment_sha256": self.contents.experiment_sha256,
            "app_sha256": self.contents.app_sha256,
        }
        if self.ledger != self.ledger.model_copy(update=facts):
            self._save(self.ledger.model_copy(update=facts))
        self._refresh_revocations()
        folder = self.folder / COORDINATOR
        files = self._coordinator_files(*(load_certificate(folder / name) for name in ("server.crt", "loopback.crt")))
        if refresh_kit(folder, self.contents.config(None), files, self.contents.authority, self.now):
            self._note(COORDINATOR)
        for kit in (folder, *(self._kit_of(site.name) for site in self.ledger.sites)):
            refresh_zip(kit)

    def _refresh_revocations(self) -> None:
        path, revoked = self.folder / AUTHORITY / "crl.pem", self.ledger.revoked()
        listed = {f"{entry.serial_number:x}" for entry in x509.load_pem_x509_crl(path.read_bytes())}
        if listed != {certificate.serial for certificate in revoked}:
            self._save(self.ledger.model_copy(update={"crl_number": self.ledger.crl_number + 1}))
            crl = self.contents.authority.revocation_list(revoked, self.ledger.crl_number, self.now)
            write_durably(path, crl)

    def _coordinator_files(self, server: x509.Certificate, loopback: x509.Certificate) -> dict[str, Content]:
        crl = (self.folder / AUTHORITY / "crl.pem").read_bytes()
        return self.contents.of_coordinator(self.ledger, server, loopback, crl, self.now)

    def _validity(self) -> Validity:
        return self.now - CLOCK_SKEW, self.now + timedelta(days=self.contents.study.config.valid_days)

    def _kit_of(self, site: str) -> Path:
        return self.folder / "sites" / site

    def _unrecorded(self, path: Path) -> x509.Certificate | None:
        if not path.is_file():
            return None
        certificate = load_certificate(path)
        known = {issued.serial for issued in self.ledger.certificates()}
        new = f"{certificate.serial_number:x}" not in known and self.contents.authority.issued(certificate)
        return certificate if new else None

    def _enter_server(self, server: x509.Certificate, loopback: x509.Certificate) -> None:
        if _is_new(self.ledger.server, server):
            self._save(self.ledger.with_server(describe(server), describe(loopback), self.now))
        self._note(COORDINATOR)

    def _enter_site(self, site: StudySite, certificate: x509.Certificate) -> None:
        known, issued = self.ledger.site(site.name), describe(certificate)
        if known is None:
            entered = LedgerSite(name=site.name, key_source=site.key_source, **dict(issued))
        else:
            entered = known.renewed(issued, self.now) if _is_new(known, certificate) else known
        about = {"institution": site.institution, "contact": site.contact, "key_source": site.key_source}
        self._save(self.ledger.with_site(entered.model_copy(update=about)))
        self._note(site.name)

    def _note(self, name: str) -> None:
        if name not in self.written:
            self.written.append(name)

    def _save(self, ledger: Ledger) -> None:
        self.ledger = ledger
        save_ledger(self.folder / AUTHORITY / "roster.json", ledger)


def _open_or_create(folder: Path, study: Study, app: bytes, now: datetime) -> tuple[Authority, Ledger]:
    place = folder / AUTHORITY
    if place.exists():
        authority = load_authority(place)
        if authority.not_after <= now:
            raise KitError(f"{place}: has expired; start again in another folder, with new kits for everybody")
        return authority, load_ledger(place / "roster.json")
    orphans = [*folder.glob(f"{COORDINATOR}/server.crt"), *folder.glob("sites/*/site.crt")]
    if orphans:
        raise KitError(
            f"{place}: is missing, but there is {orphans[0]}; bring it back from a backup, or use another folder"
        )
    config = study.config
    authority = create_authority(config.name, config.coordinator, config.valid_days, now)
    ledger = Ledger(
        format=1,
        study=config.name,
        address=config.coordinator.address,
        names=config.coordinator.all_names,
        experiment_sha256=_sha256(study.experiment),
        app_sha256=_sha256(app),
    )
    public = {
        "ca.crt": certificate_pem(authority.certificate),
        "signing.pub": public_pem(authority.signing_key.public_key()),
        "roster.json": document(ledger),
        "crl.pem": authority.revocation_list((), 0, now),
    }
    write_folder(place, public, {"ca.key": key_pem(authority.key), "signing.key": key_pem(authority.signing_key)})
    return authority, ledger


def _app_bundle(folder: Path, app: Path | None, update: bool) -> bytes:
    packed = folder / COORDINATOR / "app.fab"
    if app is None and (update or not packed.is_file()):
        return app_bundle()
    path = app or packed
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; --app names an app bundle") from error
    bundled_files(content, str(path))
    return content


def _refuse_strangers(folder: Path, known: IssuedCertificate | None) -> None:
    if known is None and folder.exists():
        raise KitError(f"{folder}: is there already, and is no kit of this study; move it away, or use another folder")


def _keys_in(folder: Path, *names: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _is_new(known: IssuedCertificate | None, certificate: x509.Certificate) -> bool:
    return known is None or int(known.serial, 16) != certificate.serial_number


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
