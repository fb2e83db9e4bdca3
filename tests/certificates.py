"""Certificates of a study's own authority, in files."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedseg.coordinator.authority import certificate_pem, create_authority, key_pem, new_key
from fedseg.coordinator.study import CoordinatorConfig


class Issuer:
    """An authority that writes certificates and keys into a folder, as `NAME.crt` and `NAME.key`; its own is `ca.crt`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, now = folder, datetime.now(UTC)
        self.validity = (now - timedelta(minutes=5), now + timedelta(days=2))
        self.authority = create_authority("study", CoordinatorConfig(host="127.0.0.1"), 30, now)
        self.ca = folder / "ca.crt"
        self.ca.write_bytes(certificate_pem(self.authority.certificate))

    def server(self, name: str = "server") -> None:
        """A certificate for 127.0.0.1 and localhost."""
        key = new_key()
        self._write(
            name, key, self.authority.issue_server(key.public_key(), ("127.0.0.1", "localhost"), None, self.validity)
        )

    def site(self, name: str) -> None:
        """A certificate for a client, whose alternative name is urn:fedseg:study:NAME."""
        key = new_key()
        self._write(name, key, self.authority.issue_site(key.public_key(), "study", name, None, self.validity))

    def _write(self, name, key, certificate) -> None:
        aside = self.folder / f".{name}.part"
        aside.touch(0o600)
        aside.write_bytes(key_pem(key))
        aside.replace(self.folder / f"{name}.key")
        (self.folder / f"{name}.crt").write_bytes(certificate_pem(certificate))
