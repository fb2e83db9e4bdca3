import contextlib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedseg.coordinator.authority import key_pem, new_key
from fedseg.coordinator.study import load_study, read_public_key, read_request
from fedseg.credentials import load_certificate
from fedseg.errors import ConfigError, FedsegError
from fedseg.kit import load_kit
from tests.coordinator.studies import STUDY

PEM, DER, SSH = serialization.Encoding.PEM, serialization.Encoding.DER, serialization.Encoding.OpenSSH
FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def public(key, encoding=PEM):
    kind = serialization.PublicFormat.OpenSSH if encoding is SSH else serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(encoding, kind)


def request(key, name="whoever", encoding=PEM, signature=hashes.SHA384()):  # noqa: B008
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, signature).public_bytes(encoding)


@pytest.mark.parametrize("encoding", [PEM, SSH])
@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP256R1()])
def test_a_hospital_may_bring_its_public_key(study, encoding, curve):
    key = ec.generate_private_key(curve)
    (study.folder / "aare.pub").write_bytes(public(key, encoding))
    study.provision({"name": "Aare", "public_key": "aare.pub"}, "Elbe")
    assert not (study.site("Aare") / "site.key").exists()
    assert load_certificate(study.site("Aare") / "site.crt").public_key() == key.public_key()
    with pytest.raises(FedsegError, match=r"site\.key: is missing; put the private key of site\.crt there"):
        load_kit(study.site("Aare"))
    (study.site("Aare") / "site.key").write_bytes(key_pem(key))
    (study.site("Aare") / "site.key").chmod(0o600)
    assert load_kit(study.site("Aare")).config.site == "Aare"


@pytest.mark.parametrize("encoding", [PEM, DER])
def test_a_request_brings_its_key_and_nothing_else(study, encoding):
    key = new_key()
    (study.folder / "aare.csr").write_bytes(request(key, "coordinator", encoding))
    study.provision({"name": "Aare", "csr": "aare.csr"})
    certificate = load_certificate(study.site("Aare") / "site.crt")
    assert certificate.public_key() == key.public_key()
    assert certificate.subject.rfc4514_string() == "CN=Aare"
    assert not (study.site("Aare") / "site.key").exists()


def test_a_hospitals_own_key_stays_when_it_is_renewed(study):
    key = new_key()
    (study.folder / "aare.pub").write_bytes(public(key))
    site = {"name": "Aare", "public_key": "aare.pub"}
    study.provision(site)
    first = load_certificate(study.site("Aare") / "site.crt")
    study.provision(days=300, renew=["Aare"])
    second = load_certificate(study.site("Aare") / "site.crt")
    assert first.public_key() == second.public_key()
    assert first.serial_number != second.serial_number
    (study.folder / "aare.pub").write_bytes(public(new_key()))
    with pytest.raises(ConfigError, match="Aare: its key is another one than in its kit; add --renew Aare"):
        study.provision()


def test_a_hospital_that_was_revoked_does_not_come_back_with_the_same_key(study):
    (study.folder / "aare.pub").write_bytes(public(new_key()))
    site = {"name": "Aare", "public_key": "aare.pub"}
    study.provision(site)
    study.provision(revoke=["Aare"])
    with pytest.raises(ConfigError, match="Aare: was revoked with this very key"):
        study.provision(renew=["Aare"])
    (study.folder / "aare.pub").write_bytes(public(new_key()))
    assert study.provision(renew=["Aare"]).written == ("Aare", "coordinator")


def test_two_hospitals_cannot_have_one_key(study):
    (study.folder / "a.pub").write_bytes(public(key := new_key()))
    (study.folder / "b.pub").write_bytes(public(key, SSH))
    study.write({"name": "Aare", "public_key": "a.pub"}, {"name": "Elbe", "public_key": "b.pub"})
    with pytest.raises(ConfigError, match="Aare and Elbe have one key"):
        study.provision()
    study.provision({"name": "Aare", "public_key": "a.pub"})
    with pytest.raises(ConfigError, match="Loire: has the key of Aare"):
        study.provision({"name": "Loire", "public_key": "b.pub"})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (public(rsa.generate_private_key(65537, 2048)), "is one of RSA"),
        (public(ed25519.Ed25519PrivateKey.generate()), "is one of Ed25519"),
        (public(ec.generate_private_key(ec.SECP521R1())), "is on secp521r1"),
        (public(ec.generate_private_key(ec.SECP256K1())), "is on secp256k1"),
        (key_pem(new_key()), "is a private key, which must never leave its hospital"),
        (b"nothing", "is not a public key"),
        (b"ecdsa-sha2-nistp384 AAAA", "is not a public key"),
        (b"", "is not a public key"),
    ],
    ids=["rsa", "ed25519", "p521", "k1", "private", "text", "ssh", "empty"],
)
def test_other_keys_are_refused(tmp_path, content, told):
    (tmp_path / "aare.pub").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"aare\.pub: .*{told}"):
        read_public_key(tmp_path / "aare.pub")


def test_requests_that_are_not_signed_with_their_key_are_refused(tmp_path):
    path = tmp_path / "aare.csr"
    content = bytearray(request(new_key(), encoding=DER))
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"aare\.csr: was not signed with the key that it is for"):
        read_request(path)
    other = request(rsa.generate_private_key(65537, 2048))
    path.write_bytes(other)
    with pytest.raises(ConfigError, match=r"aare\.csr: must be a key of EC P-384"):
        read_request(path)
    path.write_bytes(public(new_key()))
    with pytest.raises(ConfigError, match=r"aare\.csr: is not a certificate request"):
        read_request(path)


@pytest.mark.parametrize(
    ("sites", "told"),
    [
        (["Aare", "aare"], "'Aare' and 'aare' are one name"),
        (["coordinator"], "a site cannot be called 'coordinator'"),
        (["Aare.zip"], "a site cannot be called"),
        (["../Aare"], r"sites\.0\.name"),
        (["A" * 65], r"sites\.0\.name"),
        ([{"name": "Aare", "institution": "two\\nlines"}], r"sites\.0\.institution"),
        ([{"name": "Aare", "public_key": "a", "csr": "b"}], "give either public_key or csr"),
        ([{"name": "Aare", "public_key": "none.pub"}], r"none\.pub: no such file"),
        ([{"name": "Aare", "key": "none.pub"}], "unknown key"),
    ],
)
def test_sites_that_cannot_be_are_refused(study, sites, told):
    study.write(*sites)
    with pytest.raises(ConfigError, match=told):
        load_study(study.file)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "-a.org",
        "a..b",
        "fl.example.org.",
        "spital.zürich",
        "10.0.0.256",
        "10.0.0",
        "a_b.org",
        "*.org",
        "x" * 64,
        "a b",
    ],
)
def test_hosts_that_no_certificate_can_name_are_refused(study, host):
    study.write(host=f'"{host}"')
    with pytest.raises(ConfigError, match=r"coordinator\.host: must be a DNS name"):
        load_study(study.file)


def test_pretrained_weights_travel_to_the_server_and_nowhere_else(study):
    experiment = study.folder / "experiment.toml"
    plain = experiment.read_text()
    (study.folder / "start.safetensors").write_bytes(b"weights")
    for outside in ("../start.safetensors", "/start.safetensors", "start.pt"):
        experiment.write_text(plain.replace('name = "unet",', f'name = "unet", pretrained = "{outside}",'))
        with pytest.raises(
            ConfigError, match=r"model\.pretrained: must be a \.safetensors file in the experiment's folder"
        ):
            study.provision()
    experiment.write_text(plain.replace('name = "unet",', 'name = "unet", pretrained = "start.safetensors",'))
    study.provision()
    assert (study.coordinator / "start.safetensors").read_bytes() == b"weights"
    assert not (study.site("Aare") / "start.safetensors").exists()
    assert load_kit(study.coordinator)


@FUZZ
@given(st.data())
def test_damaged_study_files_give_readable_errors(study, data):
    content = (STUDY + '[[sites]]\nname = "Aare"\n').encode()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, len(content)))
    study.file.write_bytes(content[:start] + data.draw(st.binary(max_size=20)) + content[end:])
    readable(load_study, study.file)


@FUZZ
@given(st.binary(), st.sampled_from([read_public_key, read_request]), st.booleans())
def test_what_is_no_key_gives_a_readable_error(tmp_path_factory, content, read, armoured):
    path = tmp_path_factory.mktemp("fuzz") / "aare"
    path.write_bytes(b"-----BEGIN PUBLIC KEY-----\n" + content if armoured else content)
    with pytest.raises(ConfigError, match="aare: "):
        read(path)


KEY = new_key()
SAMPLES = [
    (public(KEY), read_public_key),
    (public(KEY, SSH), read_public_key),
    (request(KEY), read_request),
    (request(KEY, encoding=DER), read_request),
]


@FUZZ
@given(st.data())
def test_damaged_keys_and_requests_are_read_or_refused(tmp_path_factory, data):
    content, read = data.draw(st.sampled_from(SAMPLES))
    place = data.draw(st.integers(0, len(content) - 1))
    path = tmp_path_factory.mktemp("fuzz") / "aare"
    path.write_bytes(content[:place] + data.draw(st.binary(max_size=3)) + content[place + 1 :])
    readable(read, path)


def readable(read, path):
    """Whatever is wrong, the error is one of ours."""
    with contextlib.suppress(FedsegError):
        read(path)
