import json
import zipfile
from datetime import UTC, datetime

import pytest

from fedseg.app_bundle import bundle_digest
from fedseg.errors import KitError
from fedseg.site.approval import FILE, approvals, approve, is_approved, read_bundle, withdraw


def bundle(folder, text="app = 1\n"):
    path = folder / "app.fab"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("client/app.py"), text)
    return read_bundle(path)


def test_nothing_is_approved_before_somebody_has(tmp_path):
    assert approvals(tmp_path) == []
    assert not is_approved(tmp_path, bundle(tmp_path))


def test_an_approval_counts_for_these_very_bytes_only(tmp_path):
    content = bundle(tmp_path)
    made = approve(tmp_path, content, "app.fab", "somebody")
    assert made.sha256 == bundle_digest(content)
    assert is_approved(tmp_path, content)
    assert not is_approved(tmp_path, content + b"\0")
    assert not is_approved(tmp_path, bundle(tmp_path, "app = 2\n"))


def test_an_approval_says_who_and_when(tmp_path):
    before = datetime.now(UTC)
    approve(tmp_path, bundle(tmp_path), "app.fab", "somebody")
    (found,) = approvals(tmp_path)
    assert (found.by, found.name) == ("somebody", "app.fab")
    assert before <= found.approved <= datetime.now(UTC)


def test_approving_twice_lists_once(tmp_path):
    content = bundle(tmp_path)
    approve(tmp_path, content, "app.fab", "first")
    approve(tmp_path, content, "app.fab", "second")
    assert [approval.by for approval in approvals(tmp_path)] == ["second"]


def test_a_withdrawal_counts_at_once_and_for_that_bundle_only(tmp_path):
    first, second = bundle(tmp_path), bundle(tmp_path, "app = 2\n")
    for content in (first, second):
        approve(tmp_path, content, "app.fab", "somebody")
    assert withdraw(tmp_path, bundle_digest(first)[:8].upper()).sha256 == bundle_digest(first)
    assert not is_approved(tmp_path, first)
    assert is_approved(tmp_path, second)


@pytest.mark.parametrize("digits", ["", "0", "zzzzzzzz"])
def test_a_withdrawal_that_names_no_bundle_is_refused(tmp_path, digits):
    content = bundle(tmp_path)
    approve(tmp_path, content, "app.fab", "somebody")
    with pytest.raises(KitError, match=f"approved are {bundle_digest(content)[:16]}"):
        withdraw(tmp_path, digits)
    assert is_approved(tmp_path, content)


@pytest.mark.parametrize("damage", ["", "{", "[1]", '[{"sha256": "ab"}]', '{"sha256": "ab"}', "null"])
def test_a_damaged_list_approves_nothing_and_is_not_written_over(tmp_path, damage):
    content = bundle(tmp_path)
    approve(tmp_path, content, "app.fab", "somebody")
    (tmp_path / FILE).write_text(damage)
    assert not is_approved(tmp_path, content)
    with pytest.raises(KitError, match="is no list of approvals; remove it"):
        approve(tmp_path, content, "app.fab", "somebody")
    assert (tmp_path / FILE).read_text() == damage


def test_an_unknown_key_in_the_list_is_refused(tmp_path):
    approve(tmp_path, bundle(tmp_path), "app.fab", "somebody")
    listed = json.loads((tmp_path / FILE).read_text())
    listed[0]["any"] = True
    (tmp_path / FILE).write_text(json.dumps(listed))
    with pytest.raises(KitError):
        approvals(tmp_path)


def test_what_is_no_bundle_cannot_be_read_as_one(tmp_path):
    with pytest.raises(KitError, match="cannot be read"):
        read_bundle(tmp_path / "app.fab")
    (tmp_path / "app.fab").write_bytes(b"no archive")
    with pytest.raises(KitError):
        read_bundle(tmp_path / "app.fab")
    with (tmp_path / "app.fab").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(KitError, match="a bundle has"):
        read_bundle(tmp_path / "app.fab")
