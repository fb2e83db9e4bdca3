"""What is in which kit."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509

from fedseg.coordinator import texts
from fedseg.coordinator.authority import Authority, certificate_pem, public_pem
from fedseg.coordinator.fence import nginx_configuration
from fedseg.coordinator.folders import Content
from fedseg.coordinator.ledger import Ledger, document
from fedseg.coordinator.study import COORDINATOR, Study, StudySite
from fedseg.credentials import fingerprint
from fedseg.kit import KitConfig, Role


@dataclass(frozen=True)
class Contents:
    """The files of kits, but for manifests and private keys."""

    study: Study
    authority: Authority
    app: bytes
    """The app bundle."""

    @property
    def app_sha256(self) -> str:
        """Of the app bundle."""
        return hashlib.sha256(self.app).hexdigest()

    @property
    def experiment_sha256(self) -> str:
        """Of the experiment's file."""
        return hashlib.sha256(self.study.experiment).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Of the signing key."""
        return fingerprint(self.authority.signing_key.public_key())

    def config(self, site: str | None) -> KitConfig:
        """`kit.toml` of a site, or of the server."""
        study = self.study.config
        role: Role = "coordinator" if site is None else "site"
        port = study.coordinator.superlink_port if site is None else None
        return KitConfig(
            format=1,
            study=study.name,
            role=role,
            site=site,
            coordinator=study.coordinator.address,
            superlink_port=port,
        )

    def of_coordinator(
        self, ledger: Ledger, server: x509.Certificate, loopback: x509.Certificate, crl: bytes, now: datetime
    ) -> dict[str, Content]:
        """The files of the server's kit."""
        config = self.config(None)
        readme = texts.coordinator_readme(
            config,
            app_sha256=self.app_sha256,
            fingerprint=self.fingerprint,
            expires=min(server.not_valid_after_utc, loopback.not_valid_after_utc),
        )
        coordinator = self.study.config.coordinator
        fence = nginx_configuration(
            Path(COORDINATOR),
            ledger.roster,
            config.host,
            config.port,
            listen=coordinator.listen,
            superlink_port=coordinator.superlink_port,
            now=now,
        )
        files: dict[str, Content] = {
            **self._of_both(config, readme),
            "server.crt": certificate_pem(server),
            "loopback.crt": certificate_pem(loopback),
            "crl.pem": crl,
            "sites.json": document(ledger.roster),
            "nginx.conf": fence.encode(),
        }
        if self.study.pretrained is not None:
            name, path = self.study.pretrained
            files[name] = path
        return files

    def of_site(self, site: StudySite, certificate: x509.Certificate) -> dict[str, Content]:
        """The files of a site's kit."""
        config = self.config(site.name)
        readme = texts.site_readme(
            config,
            institution=site.institution,
            own_key=site.name in self.study.public_keys,
            app_sha256=self.app_sha256,
            fingerprint=self.fingerprint,
            expires=certificate.not_valid_after_utc,
        )
        return {**self._of_both(config, readme), "site.crt": certificate_pem(certificate)}

    def _of_both(self, config: KitConfig, readme: bytes) -> dict[str, Content]:
        return {
            "kit.toml": texts.kit_toml(config),
            "ca.crt": certificate_pem(self.authority.certificate),
            "signing.pub": public_pem(self.authority.signing_key.public_key()),
            "experiment.toml": self.study.experiment,
            "app.fab": self.app,
            "README.md": readme,
        }
