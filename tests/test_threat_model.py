"""The threat model claims nothing that no file and no test stands for."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/threat-model.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))


def test_every_attack_has_a_defence_a_test_and_what_is_left():
    attacks = TEXT.split("## Attacks")[1].split("\n## ")[0]
    rows = [line for line in attacks.splitlines() if line.startswith("| ") and line.count(" | ") == 4]
    assert len(rows) > 15
    for row in rows[2:]:  # after the heading and the line below it
        *_, shown, left = (cell.strip() for cell in row.strip("|").split(" | "))
        assert "test" in shown, row
        assert left, row


@pytest.mark.parametrize(
    "name", sorted({word for text in CODE for word in re.findall(r"(?<!/)\btest_\w+(?!\w*\.py)", text)})
)
def test_every_test_that_is_named_exists(name):
    assert any(f"def {name}(" in path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize(
    "name", sorted({text.split("::")[0] for text in CODE if re.fullmatch(r"[\w/]+\.py(::\w+)?", text)})
)
def test_every_file_that_is_named_exists(name):
    places = (ROOT, ROOT / "fedseg", ROOT / "tests", ROOT / "tests/deploy")
    assert any((place / name).is_file() for place in places)
