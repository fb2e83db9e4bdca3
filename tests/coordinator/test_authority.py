"""Certificates as OpenSSL sees them: a real handshake on the loopback device, with its strict checks on."""

import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedseg.coordinator.authority import certificate_pem, create_authority, key_pem, new_key
from fedseg.coordinator.study import CoordinatorConfig
from fedseg.credentials import load_certificate
from tests.coordinator.studies import NOW


def server_context(study, crl=False):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(study.coordinator / "ca.crt")
    context.load_cert_chain(study.coordinator / "server.crt", study.coordinator / "server.key")
    if crl:
        context.load_verify_locations(study.coordinator / "crl.pem")
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def client_context(study, name):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(study.site("Aare") / "ca.crt")
    if name is not None:
        context.load_cert_chain(study.site(name) / "site.crt", study.site(name) / "site.key")
    return context


def shake_hands(server, client, name="localhost"):
    """Who the server says that the client is."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peers, errors = [], []

        def accept():
            connection, _ = listener.accept()
            with connection:
                try:
                    with server.wrap_socket(connection, server_side=True) as tls:
                        peers.append(dict(part[0] for part in tls.getpeercert()["subject"])["commonName"])
                        tls.sendall(b"welcome")
                except OSError as error:
                    errors.append(error)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), 10) as connection,
                client.wrap_socket(connection, server_hostname=name) as tls,
            ):
                assert tls.version() == "TLSv1.3"
                tls.recv(7)  # TLS 1.3 tells a client late that it was refused
        finally:
            thread.join()
        if errors:
            raise errors[0]
        return peers[0]


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", "fl-backup.example.org"])
def test_server_and_site_know_each_other_by_their_certificates(study, name):
    study.provision()
    assert shake_hands(server_context(study), client_context(study, "Elbe"), name) == "Elbe"


def test_the_loopback_certificate_is_for_this_machine_only(study):
    study.provision()
    server = server_context(study)
    server.load_cert_chain(study.coordinator / "loopback.crt", study.coordinator / "loopback.key")
    assert shake_hands(server, client_context(study, "Elbe"), "127.0.0.1") == "Elbe"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, client_context(study, "Elbe"), "fl-backup.example.org")


def test_nobody_gets_in_without_a_certificate_or_with_a_servers(study):
    study.provision()
    with pytest.raises(ssl.SSLError):
        shake_hands(server_context(study), client_context(study, None))
    disguised = client_context(study, None)
    disguised.load_cert_chain(study.coordinator / "server.crt", study.coordinator / "server.key")
    with pytest.raises(ssl.SSLError):
        shake_hands(server_context(study), disguised)


def test_a_site_cannot_pose_as_the_server(study):
    study.provision()
    server = server_context(study)
    server.load_cert_chain(study.site("Elbe") / "site.crt", study.site("Elbe") / "site.key")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, client_context(study, "Aare"), "Elbe")


def test_a_revoked_or_replaced_certificate_is_refused_and_the_others_are_not(study):
    study.provision("Aare", "Elbe", "Loire")
    for name in ("Aare", "Elbe", "Loire"):
        assert shake_hands(server_context(study, crl=True), client_context(study, name)) == name
    stolen = client_context(study, "Elbe")
    study.provision(revoke=["Aare"], renew=["Elbe"])
    for refused in (client_context(study, "Aare"), stolen):
        with pytest.raises(ssl.SSLError):
            shake_hands(server_context(study, crl=True), refused)
    for name in ("Elbe", "Loire"):
        assert shake_hands(server_context(study, crl=True), client_context(study, name)) == name


def test_the_revocation_list_is_signed_counted_and_lasts_as_long_as_the_authority(study):
    study.provision()
    authority = load_certificate(study.kits / "authority" / "ca.crt")
    numbers = []
    for options in ({}, {"revoke": ["Aare"]}, {"renew": ["Elbe"]}, {}):
        study.provision(**options)
        crl = x509.load_pem_x509_crl((study.coordinator / "crl.pem").read_bytes())
        assert crl.is_signature_valid(authority.public_key())
        assert crl.next_update_utc == authority.not_valid_after_utc
        numbers.append((crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number, len(crl)))
    assert numbers == [(0, 0), (1, 1), (2, 2), (2, 2)]


def test_certificates_say_what_they_are_for(study):
    study.provision("Elbe", {"name": "Aare", "institution": "Spital Aare"})
    site, server = load_certificate(study.site("Aare") / "site.crt"), load_certificate(study.coordinator / "server.crt")
    usages = [
        list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        for certificate in (site, server)
    ]
    assert usages == [[ExtendedKeyUsageOID.CLIENT_AUTH], [ExtendedKeyUsageOID.SERVER_AUTH]]
    assert site.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "Aare"
    assert site.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value == "Spital Aare"
    assert isinstance(site.public_key().curve, ec.SECP384R1)
    assert site.not_valid_before_utc == NOW - timedelta(minutes=5)
    assert site.not_valid_after_utc == NOW + timedelta(days=365)


def test_no_certificate_outlives_its_authority():
    authority = create_authority("liver", CoordinatorConfig(host="localhost"), 365, NOW)
    late = NOW + timedelta(days=3600)
    validity = (late, late + timedelta(days=365))
    certificate = authority.issue_site(new_key().public_key(), "liver", "Aare", None, validity)
    assert certificate.not_valid_after_utc == authority.not_after
    assert authority.not_after >= NOW + timedelta(days=2 * 365)


def test_a_certificate_of_another_authority_is_not_taken_for_ones_own(tmp_path):
    now = datetime.now(UTC)
    ours, theirs = (create_authority("liver", CoordinatorConfig(host="localhost"), 1, now) for _ in range(2))
    certificate = theirs.issue_site(new_key().public_key(), "liver", "Aare", None, (now, now + timedelta(days=1)))
    assert theirs.issued(certificate)
    assert not ours.issued(certificate)
    assert b"BEGIN PRIVATE KEY" in key_pem(ours.key)
    assert certificate_pem(certificate).startswith(b"-----BEGIN CERTIFICATE-----")
