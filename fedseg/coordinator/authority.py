"""A study's own certificate authority, and the key that signs kits. Stays with the coordinator's office."""

import base64
import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedseg.coordinator.study import CoordinatorConfig
from fedseg.credentials import check_closed, check_key, load_certificate, load_signing_key, read
from fedseg.errors import KitError
from fedseg.kit import IssuedCertificate

Validity = tuple[datetime, datetime]

CLOCK_SKEW = timedelta(minutes=5)
AUTHORITY_DAYS = 3650
FILES = ("ca.key", "ca.crt", "signing.key", "signing.pub", "roster.json", "crl.pem")


@dataclass(frozen=True)
class Authority:
    """Keys that can admit machines to the study."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    signing_key: ed25519.Ed25519PrivateKey

    @property
    def not_after(self) -> datetime:
        """When everything that it issued has expired."""
        return self.certificate.not_valid_after_utc

    def sign(self, document: bytes) -> bytes:
        """Base64 of the Ed25519 signature, in a line."""
        return base64.b64encode(self.signing_key.sign(document)) + b"\n"

    def issue_server(
        self, key: ec.EllipticCurvePublicKey, names: Iterable[str], organisation: str | None, validity: Validity
    ) -> x509.Certificate:
        """A certificate for a server that is reached under the given DNS names and IP addresses."""
        names = tuple(names)
        subject = _name(names[0][:64], organisation)
        alternatives = [_general_name(name) for name in names]
        return self._issue(key, subject, alternatives, ExtendedKeyUsageOID.SERVER_AUTH, validity)

    def issue_site(
        self, key: ec.EllipticCurvePublicKey, study: str, name: str, institution: str | None, validity: Validity
    ) -> x509.Certificate:
        """A certificate with which a hospital logs in; its common name is the site's name."""
        alternatives: list[x509.GeneralName] = [x509.UniformResourceIdentifier(f"urn:fedseg:{study}:{name}")]
        return self._issue(key, _name(name, institution), alternatives, ExtendedKeyUsageOID.CLIENT_AUTH, validity)

    def revocation_list(self, revoked: Iterable[IssuedCertificate], number: int, now: datetime) -> bytes:
        """A PEM CRL that holds as long as the authority does."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - CLOCK_SKEW)
            .next_update(self.not_after)
            .add_extension(_authority_identifier(self.certificate), critical=False)
            .add_extension(x509.CRLNumber(number), critical=False)
        )
        for certificate in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(int(certificate.serial, 16))
            builder = builder.add_revoked_certificate(entry.revocation_date(certificate.revoked or now).build())
        return builder.sign(self.key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)

    def issued(self, certificate: x509.Certificate) -> bool:
        """Whether a certificate is one of this authority."""
        try:
            certificate.verify_directly_issued_by(self.certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def _issue(
        self,
        key: ec.EllipticCurvePublicKey,
        subject: x509.Name,
        alternatives: list[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        validity: Validity,
    ) -> x509.Certificate:
        not_before, not_after = validity
        return (
            _certificate(subject, self.certificate.subject, key, not_before, min(not_after, self.not_after))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(_authority_identifier(self.certificate), critical=False)
            .sign(self.key, hashes.SHA384())
        )


def create_authority(study: str, coordinator: CoordinatorConfig, valid_days: int, now: datetime) -> Authority:
    """Make new keys and a self-signed certificate, in memory."""
    key = new_key()
    subject = _name(f"{study[:45]} study authority", coordinator.organisation)
    not_after = now + timedelta(days=max(AUTHORITY_DAYS, 2 * valid_days))
    certificate = (
        _certificate(subject, subject, key.public_key(), now - CLOCK_SKEW, not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    return Authority(certificate, key, ed25519.Ed25519PrivateKey.generate())


def load_authority(folder: Path) -> Authority:
    """Read an authority from its folder.

    Raises:
        KitError: the folder is incomplete or damaged; it is never repaired by making new keys.
    """
    lacking = [name for name in FILES if not (folder / name).is_file()]
    if lacking:
        raise KitError(
            f"{folder}: {', '.join(lacking)} missing; bring the folder back from a backup. Without it, start the study "
            "again in another folder, with new kits for everybody"
        )
    check_key(folder / "ca.key", folder / "ca.crt")
    check_closed(folder / "signing.key")
    key = serialization.load_pem_private_key(read(folder / "ca.key"), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    try:
        signing_key = serialization.load_pem_private_key(read(folder / "signing.key"), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        signing_key = None
    public = load_signing_key(folder / "signing.pub")
    if not isinstance(signing_key, ed25519.Ed25519PrivateKey) or signing_key.public_key() != public:
        raise KitError(f"{folder / 'signing.key'}: is not the key of signing.pub; bring the folder back from a backup")
    return Authority(load_certificate(folder / "ca.crt"), key, signing_key)


def new_key() -> ec.EllipticCurvePrivateKey:
    """A new EC P-384 key."""
    return ec.generate_private_key(ec.SECP384R1())


def key_pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    """A private key as PKCS#8 in PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_pem(key: ed25519.Ed25519PublicKey) -> bytes:
    """A public key in PEM."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """A certificate in PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def public_key_text(key: ec.EllipticCurvePublicKey) -> str:
    """Base64 of the DER SubjectPublicKeyInfo."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(der).decode()


def describe(certificate: x509.Certificate) -> IssuedCertificate:
    """What a roster keeps of a certificate."""
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return IssuedCertificate(
        public_key=public_key_text(key),
        certificate_sha1=hashlib.sha1(certificate.public_bytes(serialization.Encoding.DER)).hexdigest(),
        serial=f"{certificate.serial_number:x}",
        not_after=certificate.not_valid_after_utc,
    )


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, not_before: datetime, not_after: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _authority_identifier(certificate: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str, organisation: str | None) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    if organisation is not None:
        parts.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation))
    return x509.Name(parts)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
