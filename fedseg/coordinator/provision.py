"""From a study file to a kit for every machine; run again to add, renew and revoke."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedseg.coordinator import texts
from fedseg.coordinator.authority import (
    CLOCK_SKEW,
    Authority,
    certificate_pem,
    create_authority,
    describe,
    key_pem,
    load_authority,
    new_key,
    public_key_text,
    public_pem,
)
from fedseg.coordinator.bundle import app_bundle, bundled_files
from fedseg.coordinator.fence import nginx_configuration
from fedseg.coordinator.folders import Content, locked, recover, refresh_kit, write_folder, write_kit, write_zip
from fedseg.coordinator.ledger import Ledger, LedgerSite, document, load_ledger, save_ledger
from fedseg.coordinator.study import COORDINATOR, Study, StudySite, load_study
from fedseg.errors import ConfigError, KitError
from fedseg.federated.checkpoint import write_durably
from fedseg.kit import IssuedCertificate, KitConfig, fingerprint, load_certificate, split_address

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
        KitError: authority or kits are damaged.
    """
    study = load_study(study_file)
    with locked(folder):
        for place in (folder, folder / "sites", folder / "authority"):
            recover(place)
        bundle = _app_bundle(folder, app, update)
        authority, ledger = _open_or_create(folder, study, bundle, now)
        office = _Office(folder, study, authority, ledger, bundle, now)
        office.check(renew, revoke, update)
        office.adopt()
        office.revoke(revoke)
        office.make_coordinator(COORDINATOR in renew, update)
        for site in study.config.sites:
            office.make_site(site, site.name in renew, update)
        office.finish()
    return Provisioned(
        folder,
        tuple(office.written),
        office.ledger,
        (*office.warnings, *expiry_warnings(office.ledger, authority.not_after, now)),
        fingerprint(authority.signing_key.public_key()),
    )


def standing(folder: Path, now: datetime) -> tuple[Ledger, list[str]]:
    """Who has which certificate, and what expires soon. Nothing is written.

    Raises:
        KitError: there is no authority in the folder, or it is damaged.
    """
    authority = load_authority(folder / "authority")
    ledger = load_ledger(folder / "authority" / "roster.json")
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
    study: Study
    authority: Authority
    ledger: Ledger
    app: bytes
    now: datetime
    written: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def check(self, renew: Sequence[str], revoke: Sequence[str], update: bool) -> None:
        """Refuse what does not fit before anything is written."""
        config, ledger = self.study.config, self.ledger
        names = [site.name for site in config.sites]
        for name in renew:
            if name not in (*names, COORDINATOR):
                raise ConfigError(f"--renew {name}: the study file has no such site; it has {_listed(names)}")
        for name in revoke:
            known = [site.name for site in ledger.sites]
            if name not in known:
                why = (
                    "use --renew coordinator instead" if name == COORDINATOR else f"sites with a kit: {_listed(known)}"
                )
                raise ConfigError(f"--revoke {name}: no such site has a kit; {why}")
            if name in renew:
                raise ConfigError(f"--revoke {name} and --renew {name}: --renew alone revokes the old certificate")
        if ledger.study != config.name:
            raise ConfigError(
                f"name: the kits in {self.folder} are of the study {ledger.study!r}, not {config.name!r}; use another folder"
            )
        changed = [
            what
            for what, old, new in (
                ("coordinator.host and port", ledger.address, config.coordinator.address),
                ("experiment", ledger.experiment_sha256, _sha256(self.study.experiment)),
                ("the app bundle", ledger.app_sha256, _sha256(self.app)),
            )
            if old != new
        ]
        if changed and not update:
            raise ConfigError(
                f"{' and '.join(changed)} changed since the kits in {self.folder} were made; add --update to write all kits "
                "anew (they keep their certificates) and hand them out, or change it back"
            )
        if ledger.names != config.coordinator.all_names and ledger.server is not None and COORDINATOR not in renew:
            raise ConfigError(
                f"coordinator.names: the server's certificate is for {_listed(ledger.names)}, the study file says "
                f"{_listed(config.coordinator.all_names)}; add --renew coordinator, or change it back"
            )
        if ledger.server is not None and not (self.folder / COORDINATOR).is_dir() and COORDINATOR not in renew:
            raise KitError(
                f"{self.folder / COORDINATOR}: is missing; bring it back, or make new certificates with --renew coordinator"
            )
        for site in config.sites:
            self._check_site(site, site.name in renew, update)
        for known_site in ledger.sites:
            if known_site.name not in names and known_site.revoked is None and known_site.name not in revoke:
                self.warnings.append(
                    f"{known_site.name} is not in the study file, but may still connect; use --revoke {known_site.name}"
                )

    def adopt(self) -> None:
        """Enter kits into the ledger that a killed run had finished but not entered."""
        server = self._unrecorded(self.folder / COORDINATOR / "server.crt")
        loopback = self._unrecorded(self.folder / COORDINATOR / "loopback.crt")
        if server is not None and loopback is not None:
            self._enter_server(server, loopback)
        for site in self.study.config.sites:
            certificate = self._unrecorded(self._kit_of(site.name) / "site.crt")
            if certificate is not None:
                write_zip(self._kit_of(site.name))
                self._enter_site(site, certificate)

    def revoke(self, names: Sequence[str]) -> None:
        """Admit sites no more."""
        for name in names:
            site = self.ledger.site(name)
            if site is not None and site.revoked is None:
                self._save(self.ledger.with_site(site.model_copy(update={"revoked": self.now})))

    def make_coordinator(self, renew: bool, update: bool) -> None:
        """Write the server's kit if it is missing, or asked for."""
        folder = self.folder / COORDINATOR
        if self.ledger.server is not None and not (renew or update):
            return
        if self.ledger.server is None or renew:
            coordinator = self.study.config.coordinator
            key, loopback_key = new_key(), new_key()
            organisation, validity = coordinator.organisation, self._validity()
            server = self.authority.issue_server(key.public_key(), coordinator.all_names, organisation, validity)
            loopback = self.authority.issue_server(loopback_key.public_key(), LOOPBACK_NAMES, organisation, validity)
            private = {"server.key": key_pem(key), "loopback.key": key_pem(loopback_key)}
        else:
            server, loopback = load_certificate(folder / "server.crt"), load_certificate(folder / "loopback.crt")
            private = _keys_in(folder, "server.key", "loopback.key")
        ledger = self.ledger.with_server(describe(server), describe(loopback), self.now)
        files = self._coordinator_files(ledger, server, loopback)
        write_kit(folder, self._config(None), files, private, {}, self.authority, self.now)
        self._enter_server(server, loopback)

    def make_site(self, site: StudySite, renew: bool, update: bool) -> None:
        """Write a site's kit if it is missing, or asked for."""
        known = self.ledger.site(site.name)
        if known is not None and not renew:
            if known.revoked is not None:
                self.warnings.append(f"{site.name} is revoked; --renew {site.name} would admit it again")
                return
            if not update or site.name in self.written:
                return
        folder = self._kit_of(site.name)
        private: dict[str, bytes] = {}
        if known is None or renew:
            key: ec.EllipticCurvePublicKey | None = self.study.public_keys.get(site.name)
            if key is None:
                made = new_key()
                key, private = made.public_key(), {"site.key": key_pem(made)}
            study = self.study.config.name
            certificate = self.authority.issue_site(key, study, site.name, site.institution, self._validity())
        else:
            certificate = load_certificate(folder / "site.crt")
            private = _keys_in(folder, "site.key")
        files = self._site_files(site, certificate)
        loose = {"site.toml": texts.site_toml(site.name)}
        write_kit(folder, self._config(site.name), files, private, loose, self.authority, self.now)
        self._enter_site(site, certificate)

    def finish(self) -> None:
        """Bring the revocation list and the server's kit up to date."""
        config = self.study.config
        facts = {
            "address": config.coordinator.address,
            "names": config.coordinator.all_names,
            "experiment_sha256": _sha256(self.study.experiment),
            "app_sha256": _sha256(self.app),
        }
        if self.ledger != self.ledger.model_copy(update=facts):
            self._save(self.ledger.model_copy(update=facts))
        self._refresh_revocations()
        folder = self.folder / COORDINATOR
        server, loopback = load_certificate(folder / "server.crt"), load_certificate(folder / "loopback.crt")
        files = self._coordinator_files(self.ledger, server, loopback)
        changed = refresh_kit(folder, self._config(None), files, self.authority, self.now)
        if changed and COORDINATOR not in self.written:
            self.written.insert(0, COORDINATOR)

    def _check_site(self, site: StudySite, renew: bool, update: bool) -> None:
        known = self.ledger.site(site.name)
        own = self.study.public_keys.get(site.name)
        text = None if own is None else public_key_text(own)
        for other in self.ledger.sites:
            theirs = {certificate.public_key for certificate in (other, *other.earlier)}
            if text in theirs and other.name != site.name:
                raise ConfigError(f"{site.name}: has the key of {other.name}; each hospital needs a key of its own")
        if known is None:
            return
        if known.name != site.name:
            raise ConfigError(f"{site.name}: there is a kit of {known.name}; write the name as it was")
        if renew or known.revoked is not None:
            return
        if (text is not None and text != known.public_key) or (text is None) != (known.key_source == "made here"):
            raise ConfigError(f"{site.name}: its key is another one than in its kit; add --renew {site.name}")
        if site.institution != known.institution:
            self.warnings.append(f"{site.name}: its institution changed; --renew {site.name} would put it into its kit")
        if update and not (self._kit_of(site.name) / "site.crt").is_file():
            raise KitError(f"{self._kit_of(site.name)}: is missing; bring it back, or add --renew {site.name}")

    def _refresh_revocations(self) -> None:
        path = self.folder / "authority" / "crl.pem"
        revoked = self.ledger.revoked()
        listed = {entry.serial_number for entry in x509.load_pem_x509_crl(path.read_bytes())}
        if listed != {int(certificate.serial, 16) for certificate in revoked}:
            self._save(self.ledger.model_copy(update={"crl_number": self.ledger.crl_number + 1}))
            write_durably(path, self.authority.revocation_list(revoked, self.ledger.crl_number, self.now))

    def _coordinator_files(
        self, ledger: Ledger, server: x509.Certificate, loopback: x509.Certificate
    ) -> dict[str, Content]:
        expires = min(server.not_valid_after_utc, loopback.not_valid_after_utc)
        config = self._config(None)
        readme = texts.coordinator_readme(
            config, app_sha256=_sha256(self.app), fingerprint=self._fingerprint, expires=expires
        )
        files: dict[str, Content] = {
            **self._shared_files(config, readme),
            "server.crt": certificate_pem(server),
            "loopback.crt": certificate_pem(loopback),
            "crl.pem": (self.folder / "authority" / "crl.pem").read_bytes(),
            "sites.json": document(ledger.roster),
            "nginx.conf": self._nginx(ledger),
        }
        if self.study.pretrained is not None:
            name, path = self.study.pretrained
            files[name] = path
        return files

    def _site_files(self, site: StudySite, certificate: x509.Certificate) -> dict[str, Content]:
        config = self._config(site.name)
        readme = texts.site_readme(
            config,
            institution=site.institution,
            own_key=site.name in self.study.public_keys,
            app_sha256=_sha256(self.app),
            fingerprint=self._fingerprint,
            expires=certificate.not_valid_after_utc,
        )
        return {**self._shared_files(config, readme), "site.crt": certificate_pem(certificate)}

    def _shared_files(self, config: KitConfig, readme: bytes) -> dict[str, Content]:
        return {
            "kit.toml": texts.kit_toml(config),
            "ca.crt": certificate_pem(self.authority.certificate),
            "signing.pub": public_pem(self.authority.signing_key.public_key()),
            "experiment.toml": self.study.experiment,
            "app.fab": self.app,
            "README.md": readme,
        }

    def _nginx(self, ledger: Ledger) -> bytes:
        host, port = split_address(self._config(None).coordinator)
        folder = self.folder / COORDINATOR
        return nginx_configuration(folder, ledger.roster, host, port, now=self.now).encode()

    def _config(self, site: str | None) -> KitConfig:
        return KitConfig(
            format=1,
            study=self.study.config.name,
            role="coordinator" if site is None else "site",
            site=site,
            coordinator=self.study.config.coordinator.address,
        )

    @property
    def _fingerprint(self) -> str:
        return fingerprint(self.authority.signing_key.public_key())

    def _validity(self) -> tuple[datetime, datetime]:
        return self.now - CLOCK_SKEW, self.now + timedelta(days=self.study.config.valid_days)

    def _kit_of(self, site: str) -> Path:
        return self.folder / "sites" / site

    def _unrecorded(self, path: Path) -> x509.Certificate | None:
        if not path.is_file():
            return None
        certificate = load_certificate(path)
        known = {int(known.serial, 16) for known in self.ledger.certificates()}
        return certificate if certificate.serial_number not in known and self.authority.issued(certificate) else None

    def _enter_server(self, server: x509.Certificate, loopback: x509.Certificate) -> None:
        if _is_new(self.ledger.server, server):
            self._save(self.ledger.with_server(describe(server), describe(loopback), self.now))
        self.written.append(COORDINATOR)

    def _enter_site(self, site: StudySite, certificate: x509.Certificate) -> None:
        known, issued = self.ledger.site(site.name), describe(certificate)
        if known is None:
            entered = LedgerSite(name=site.name, key_source=site.key_source, **dict(issued))
        else:
            entered = known.renewed(issued, self.now) if _is_new(known, certificate) else known
        about = {"institution": site.institution, "contact": site.contact, "key_source": site.key_source}
        self._save(self.ledger.with_site(entered.model_copy(update=about)))
        self.written.append(site.name)

    def _save(self, ledger: Ledger) -> None:
        self.ledger = ledger
        save_ledger(self.folder / "authority" / "roster.json", ledger)


def _open_or_create(folder: Path, study: Study, app: bytes, now: datetime) -> tuple[Authority, Ledger]:
    place = folder / "authority"
    if place.exists():
        authority = load_authority(place)
        if authority.not_after <= now:
            raise KitError(f"{place}: has expired; start again in another folder, with new kits for everybody")
        return authority, load_ledger(place / "roster.json")
    orphans = [path for path in (folder / COORDINATOR, folder / "sites") if path.exists()]
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


def _keys_in(folder: Path, *names: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _is_new(known: IssuedCertificate | None, certificate: x509.Certificate) -> bool:
    return known is None or int(known.serial, 16) != certificate.serial_number


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
