"""What people see of a report: contrast in a browser, light and dark, and the pages of the PDF."""

import json
import re
import shutil
from pathlib import Path

import pytest
from pypdf import PdfReader

from fedseg.case_rows import read_scores
from fedseg.report.evidence import interval
from fedseg.report.write import write_report
from tests.coordinator.browser import Browser, chromium
from tests.test_heterogeneous import finished, folder  # noqa: F401 - fixtures
from tests.test_simulation import fedseg

CONTRAST = (Path(__file__).parent / "contrast.js").read_text()
A4 = (595, 842)


@pytest.fixture(scope="module")
def written(finished, tmp_path_factory):  # noqa: F811
    """A report with every section: a copy of a run that was measured for robustness, too."""
    run = tmp_path_factory.mktemp("written") / "run"
    shutil.copytree(finished, run)
    fedseg("evaluate", "--robustness", run, "--effects", "noise", "--severities", "1,5", "--workers", "1")
    write_report(run)
    return run


# -------------------------------------------------------------------------------------------------------- in a browser
@pytest.fixture
def browser(written, tmp_path):
    browser = Browser(tmp_path)
    browser.open(f"file://{written / 'report.html'}")
    yield browser
    browser.close()


@pytest.mark.skipif(chromium() is None, reason="chromium (Debian's package) is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1180, 390])
def test_all_text_stands_out_from_its_ground_as_wcag_asks(browser, scheme, width):
    browser.prefer(prefers_color_scheme=scheme)
    browser.resize(width, 900, phone=width < 800)
    found = browser.ask(CONTRAST)
    assert [one for one in found if one["ratio"] < one["wanted"]] == []
    assert sum(one["svg"] for one in found) > 100
    assert sum(not one["svg"] for one in found) > 100
    dark = {one["ground"] for one in found if not one["svg"]} <= {"rgb(26, 33, 41)", "rgb(17, 22, 28)"}
    assert dark == (scheme == "dark")


@pytest.mark.skipif(chromium() is None, reason="chromium (Debian's package) is not installed")
def test_text_that_is_too_faint_is_noticed(browser):
    browser.prefer(prefers_color_scheme="light")
    browser.resize(1180, 900)
    browser.ask("document.querySelector('.subtitle').style.color = '#8a8a8a'")
    browser.ask("document.querySelector('svg text').setAttribute('fill', '#8a8a8a')")
    found = browser.ask(CONTRAST)
    faint = [one for one in found if one["ratio"] < one["wanted"]]
    assert [one["svg"] for one in faint] == [False, True]
    assert faint[1]["ratio"] == pytest.approx(3.45, abs=0.01)  # of #8a8a8a on white
    assert "A simulation of" in faint[0]["text"]


@pytest.mark.skipif(chromium() is None, reason="chromium (Debian's package) is not installed")
def test_letters_of_charts_can_be_read_on_a_phone(browser):
    browser.resize(390, 900, phone=True)
    sizes = browser.ask(
        "[...document.querySelectorAll('svg text')].map(text => [text, text.getScreenCTM()]).map("
        "([text, { a, b }]) => parseFloat(getComputedStyle(text).fontSize) * Math.hypot(a, b))"
    )
    assert len(sizes) > 50
    assert min(sizes) >= 7.9  # pixels of CSS


# ---------------------------------------------------------------------------------------------------------- on paper
@pytest.fixture(scope="module")
def pages(written):
    return PdfReader(written / "report.pdf").pages


def lines(page):
    return [line.strip() for line in page.extract_text().splitlines() if line.strip()]


def test_every_heading_and_every_hospitals_numbers_are_in_the_pdf(written, pages):
    text = re.sub(r"\s+", " ", " ".join(page.extract_text() for page in pages))
    headings = re.findall("<h2>(.*?)</h2>", (written / "report.html").read_text())
    assert len(headings) == 9
    for heading in headings:
        assert heading in text
    scores = read_scores(written / "scores.csv")
    for method in ("fedavg", "pooled"):
        for site, dice in json.loads((written / "result.json").read_text())["final"][method]["sites"].items():
            low, high = interval(scores, method, site)
            assert f"{dice:.3f} [{low:.3f}, {high:.3f}]" in text
    for words_of_a_chart in ("differ: learning curves", "mean validation Dice", "severity (0: clean)"):
        assert words_of_a_chart in text


def test_no_page_of_the_pdf_is_empty_and_no_heading_stands_alone(written, pages):
    headings = re.findall("<h2>(.*?)</h2>", (written / "report.html").read_text())
    assert 3 <= len(pages) <= 10
    for number, page in enumerate(pages, start=1):
        assert tuple(round(float(side)) for side in page.mediabox[2:]) == A4
        found = lines(page)
        assert found.count(str(number)) >= 1
        found.remove(str(number))
        assert len(found) >= 3 or page.images
        assert found[-1] not in headings or page.images


def test_nothing_in_the_pdf_lies_outside_its_page(pages):
    for page in pages:
        places = []

        def keep(text, cm, tm, _font, _size, places=places):
            if text.strip():
                x, y = tm[4], tm[5]
                places.append((cm[0] * x + cm[2] * y + cm[4], cm[1] * x + cm[3] * y + cm[5]))

        page.extract_text(visitor_text=keep)
        assert places
        assert all(40 <= x <= A4[0] - 40 and 20 <= y <= A4[1] - 40 for x, y in places)


def test_fonts_are_in_the_pdf(pages):
    fonts = [font.get_object() for page in pages for font in page["/Resources"]["/Font"].values()]
    used = [font for font in fonts if font["/BaseFont"] != "/Helvetica"]  # which reportlab names and this does not use
    assert used
    assert all("/FontFile2" in font["/FontDescriptor"] for font in used)
