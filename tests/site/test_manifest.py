import hashlib
import json
import multiprocessing
import os
import stat
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseg.data.cohort import Case, Cohort
from fedseg.errors import ConfigError, DataError, ManifestError
from fedseg.site.manifest import (
    changes,
    load,
    load_signature,
    make_manifest,
    save,
    sign,
    verify_signature,
)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fedseg.site.manifest"])


def cohort(root, count=4):
    """Cases of two channels and a label, two of each person."""
    cases = []
    for number in range(count):
        files = [root / f"case_{number}_{kind}.nii.gz" for kind in ("0000", "0001", "label")]
        for file in files:
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(file.name.encode())
        cases.append(Case(f"case_{number}", tuple(files[:2]), files[2], f"person {number // 2}"))
    return Cohort(root, tuple(cases))


@pytest.fixture
def place(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path


def made(place, of=None):
    return make_manifest(of or cohort(place / "data"), "Aare", place / "state")


def test_the_same_files_have_the_same_digest_in_whatever_order_they_are_listed(place):
    found = cohort(place / "data")
    assert made(place, found) == made(place, replace(found, cases=found.cases[::-1]))


def test_every_file_is_listed_by_its_content(place):
    manifest = made(place)
    files = manifest.cases[1].files
    assert [file.kind for file in files] == ["image", "image", "label"]
    assert files[1].sha256 == hashlib.sha256(b"case_1_0001.nii.gz").hexdigest()
    assert files[1].size == len("case_1_0001.nii.gz")
    assert manifest.public()[2:] == (4, 2, 0)


def change_a_byte(place, found):
    path = found.cases[2].label
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    return found


def rename_a_case(place, found):
    return replace(found, cases=(replace(found.cases[0], name="other"), *found.cases[1:]))


def swap_channels(place, found):
    return replace(found, cases=(replace(found.cases[0], images=found.cases[0].images[::-1]), *found.cases[1:]))


def regroup_persons(place, found):
    return replace(found, cases=(replace(found.cases[0], person="person 1"), *found.cases[1:]))


def remove_a_file(place, found):
    found.cases[0].images[0].unlink()
    return found


def lose_a_label(place, found):
    return replace(found, cases=(replace(found.cases[0], label=None), *found.cases[1:]))


def make_a_label_an_image(place, found):
    case = found.cases[0]
    return replace(found, cases=(replace(case, images=(*case.images, case.label), label=None), *found.cases[1:]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_a_byte, ["1 case with other files: case_2"]),
        (rename_a_case, ["1 case renamed: case_0 -> other"]),
        (swap_channels, ["1 case with other files: case_0"]),
        (regroup_persons, ["1 case of another person: case_0"]),
        (remove_a_file, ["1 case with other files: case_0", "missing files: 0, now 1"]),
        (lose_a_label, ["1 case with other files: case_0"]),
        (make_a_label_an_image, ["1 case with other files: case_0"]),
        (lambda place, _: cohort(place / "data", 6), ["2 cases added: case_4, case_5", "persons: 2, now 3"]),
        (lambda place, _: cohort(place / "data", 3), ["1 case removed: case_3"]),
    ],
)
def test_any_change_changes_the_digest_and_is_told(place, change, told):
    before = made(place)
    after = made(place, change(place, cohort(place / "data")))
    assert after.digest() != before.digest()
    assert changes(before, after) == told
    assert changes(before, before) == []


def test_a_change_of_many_cases_names_a_few_and_counts_them(place):
    few, many = made(place, cohort(place / "data", 2)), made(place, cohort(place / "data", 12))
    assert changes(few, many)[0].startswith("10 cases added: case_10, case_11, case_2, case_3, case_4 and 5 more")


def test_a_file_that_changed_is_read_again_even_if_size_and_time_are_as_before(place):
    found = cohort(place / "data")
    before, path = made(place, found), found.cases[0].images[0]
    status = path.stat()
    time.sleep(0.05)  # the kernel's clock for files is coarse
    path.write_bytes(b"X" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert made(place, found).digest() != before.digest()


def test_a_file_that_did_not_change_is_not_read_again(place, monkeypatch):
    before = made(place)
    monkeypatch.setattr("fedseg.data.cache.hashlib.file_digest", None)
    assert made(place) == before
    (place / "data" / "case_0_0000.nii.gz").write_bytes(b"new")
    with pytest.raises(TypeError):
        made(place)


def test_damaged_notes_of_hashes_are_made_anew(place):
    before = made(place)
    for note in (place / "state" / "file-hashes").rglob("*"):
        if note.is_file():
            note.write_bytes(b"{")
    assert made(place) == before


def test_what_cannot_be_read_is_marked_and_does_not_stop_the_others(place):
    found = cohort(place / "data")
    found.cases[0].label.unlink()
    found.cases[1].label.unlink()
    found.cases[1].label.mkdir()
    manifest = made(place, found)
    assert [case.files[2].sha256 is None for case in manifest.cases] == [True, True, False, False]
    assert manifest.public().missing == 2


def test_a_case_may_have_a_name_that_is_no_text(place):
    found = cohort(place / "data", 1)
    odd = replace(found.cases[0], name=os.fsdecode(b"case\xff"), person=os.fsdecode(b"\xff"))
    manifest = made(place, replace(found, cases=(odd,)))
    assert manifest.cases[0].name == "case\\xff"
    save(manifest, place / "manifest.json")
    assert load(place / "manifest.json") == manifest


def test_nothing_that_leaves_can_be_found_by_hashing_a_guess(place):
    manifest = made(place)
    told = json.dumps(manifest.public())
    for secret in ("case_", "person", ".nii", str(place), manifest.salt, *(case.person for case in manifest.cases)):
        assert secret not in told
    assert not [file for case in manifest.cases for file in case.files if file.sha256 in told]
    elsewhere = make_manifest(cohort(place / "data"), "Aare", place / "other-state")
    assert elsewhere.digest() != manifest.digest()
    assert {case.person for case in elsewhere.cases}.isdisjoint(case.person for case in manifest.cases)
    assert hashlib.sha256(b"person 0").hexdigest() not in manifest.model_dump_json()


def test_the_salt_is_made_once_and_only_the_owner_can_read_it(place):
    assert made(place).salt == made(place).salt
    salt = place / "state" / "data-salt"
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600
    assert sorted(file.name for file in (place / "state").iterdir()) == ["data-salt", "file-hashes"]


@pytest.mark.parametrize("damage", [b"", b"abc\n", b"g" * 64, b"\xff" * 64, b"a" * 65])
def test_a_damaged_salt_is_not_replaced_silently(place, damage):
    made(place)
    (place / "state" / "data-salt").write_bytes(damage)
    with pytest.raises(DataError, match="data-salt: "):
        made(place)


def test_processes_that_begin_at_once_agree_on_the_salt(place):
    found = cohort(place / "data")
    with CONTEXT.Pool(4) as pool:
        results = pool.starmap(make_manifest, [(found, "Aare", place / "state")] * 8, chunksize=1)
    assert len({manifest.digest() for manifest in results}) == 1


def test_a_manifest_is_kept_for_its_owner_and_read_back(place):
    manifest, path = made(place), place / "manifest.json"
    save(manifest, path, b"signature")
    assert (load(path), load_signature(path)) == (manifest, b"signature")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    save(manifest, path)
    assert load_signature(path) == b""
    with pytest.raises(ManifestError, match="no such data manifest"):
        load(place / "none.json")
    with pytest.raises(ManifestError, match="not a readable data manifest"):
        load(place)


@pytest.fixture(scope="module")
def saved():
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        manifest = made(place)
        save(manifest, place / "manifest.json", b"signature")
        yield manifest, (place / "manifest.json").read_bytes()


@given(st.data())
@settings(max_examples=300)
def test_a_damaged_file_is_a_manifest_error_or_says_the_same(saved, data):
    manifest, content = saved
    place = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= data.draw(st.integers(1, 255))
    check_damaged(manifest, bytes(changed))
    check_damaged(manifest, content[:place])


@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_error(saved, content):
    check_damaged(saved[0], content)


def test_hostile_json_is_a_manifest_error(saved):
    for content in (
        b"[" * 100_000,
        b'{"format":' + b"9" * 9000 + b"}",
        b'{"format": 1e999}',
        b'{"manifest": {"a": "\\ud800"}}',
    ):
        check_damaged(saved[0], content)


def check_damaged(manifest, content):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "manifest.json"
        path.write_bytes(content)
        with suppress(ManifestError):
            assert load(path) == manifest  # a blank or a digit of the signature may have changed


def keys(folder, key=None):
    """Files with a key: PEM and OpenSSH, private and public, and a certificate."""
    key = key or ec.generate_private_key(ec.SECP384R1())
    private, public = serialization.PrivateFormat, serialization.PublicFormat
    encoding, plain = serialization.Encoding, serialization.NoEncryption()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Aare")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(datetime.now(UTC)).not_valid_after(datetime.now(UTC) + timedelta(days=1))
    algorithm = hashes.SHA384() if isinstance(key, ec.EllipticCurvePrivateKey) else None
    content = {
        "pkcs8": key.private_bytes(encoding.PEM, private.PKCS8, plain),
        "openssh": key.private_bytes(encoding.PEM, private.OpenSSH, plain),
        "locked": key.private_bytes(encoding.PEM, private.PKCS8, serialization.BestAvailableEncryption(b"x")),
        "public.pem": key.public_key().public_bytes(encoding.PEM, public.SubjectPublicKeyInfo),
        "public.ssh": key.public_key().public_bytes(encoding.OpenSSH, public.OpenSSH),
        "certificate": builder.sign(key, algorithm).public_bytes(encoding.PEM),
    }
    folder.mkdir()
    for file, data in content.items():
        (folder / file).write_bytes(data)
    return folder


def test_a_signature_is_of_this_manifest_and_this_key(place):
    ours, theirs, manifest = keys(place / "ours"), keys(place / "theirs"), made(place)
    for private in ("pkcs8", "openssh"):
        signature = sign(manifest, ours / private)
        for public in ("public.pem", "public.ssh", "certificate"):
            verify_signature(manifest.public(), signature, ours / public)
            with pytest.raises(ManifestError, match="'Aare' was not signed with the key of"):
                verify_signature(manifest.public(), signature, theirs / public)
    for changed in (manifest.public()._replace(cases=5), manifest.public()._replace(digest="0" * 64)):
        with pytest.raises(ManifestError, match="or was changed since"):
            verify_signature(changed, signature, ours / "certificate")
    for forged in (b"", signature[:-1], bytes(len(signature))):
        with pytest.raises(ManifestError):
            verify_signature(manifest.public(), forged, ours / "certificate")


def test_other_keys_are_refused_with_what_would_be_right(place):
    ours, manifest = keys(place / "ours"), made(place)
    signature = sign(manifest, ours / "pkcs8")
    small = keys(place / "small", ec.generate_private_key(ec.SECP256R1()))
    other = keys(place / "other", ed25519.Ed25519PrivateKey.generate())
    for path in (ours / "locked", ours / "certificate", small / "pkcs8", other / "openssh"):
        with pytest.raises(ConfigError, match="must be a private EC key on P-384"):
            sign(manifest, path)
    for path in (ours / "pkcs8", small / "public.pem", other / "certificate"):
        with pytest.raises(ConfigError, match="must be a certificate or a public EC key on P-384"):
            verify_signature(manifest.public(), signature, path)
    with pytest.raises(ConfigError, match="not a readable key"):
        sign(manifest, place / "none")
