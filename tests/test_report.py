"""The report on a run: of a simulation, of half a one, and of a study of which only sums are known."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from reportlab.pdfbase.pdfmetrics import stringWidth

from fedseg.case_rows import CaseRow, read_scores
from fedseg.coordinator.state import reader
from fedseg.errors import StoreError
from fedseg.federated.store import RunStore
from fedseg.report.card import Exported, write_exported_card
from fedseg.report.document import Bullets, Code, Facts, Paragraph, Report, Section, Table
from fedseg.report.drawing import drawing_of
from fedseg.report.evidence import Difference, difference, in_short, interval, unknown
from fedseg.report.figures import COLOURS
from fedseg.report.html import to_html
from fedseg.report.pdf import WIDTH, _widths, to_pdf
from fedseg.report.provenance import software_of
from fedseg.report.round_charts import round_charts
from fedseg.report.svg import to_svg
from fedseg.report.write import write_report
from fedseg.words import counted
from tests.coordinator.browser import Browser, chromium
from tests.federated.toys import run_toy, toy_experiment
from tests.test_heterogeneous import finished, folder  # noqa: F401 - fixtures
from tests.test_simulation import fedseg

PICTURES = Path(__file__).parents[1] / "docs" / "images"


def rows(run, site, dice):
    """One structure of three persons, the second with two cases."""
    cases = [("1", "p"), ("2", "q"), ("3", "q"), ("4", "r")]
    row = CaseRow(run, site, "", "", "liver", 0.0, 1.0, 1.0, 1.0, 1.0)
    return [
        replace(row, case=case, person=person, dice=value) for (case, person), value in zip(cases, dice, strict=True)
    ]


# --------------------------------------------------------------------------------------------------------------- numbers
def test_differences_are_of_the_same_persons_and_in_points():
    scores = rows("fed", "A", [0.8, 0.7, 0.9, 0.6]) + rows("local-A", "A", [0.7, 0.6, 0.8, 0.5])
    found = difference(scores, "fed", "local", ["A"])
    assert found.points == pytest.approx(10)
    assert (found.low, found.high) == (pytest.approx(10), pytest.approx(10))
    assert found.sure
    assert str(found) == "+10.0 points (95 % interval +10.0 to +10.0)"
    assert difference(scores, "fed", "pooled", ["A"]) is None


def test_a_difference_around_zero_is_not_sure():
    assert not Difference(1.0, -0.5, 2.0).sure
    assert Difference(-1.0, -2.0, -0.5).sure


def test_an_interval_is_of_persons_not_of_cases():
    scores = rows("fed", "A", [0.8, 0.7, 0.9, 0.6]) + rows("local-A", "A", [0.5] * 4)
    low, high = interval(scores, "fed", "A")
    assert (low, high) == (pytest.approx(0.6), pytest.approx(0.8))  # r, and p, three times each: 1 of 27 draws each
    assert interval(scores, "local", "A") == (0.5, 0.5)
    assert interval(scores[:1], "fed", "A") is None
    assert interval(scores, "fed", "B") is None


RESULT = {
    "name": "made-up",
    "seed": 0,
    "rounds": 3,
    "test": "shared persons that no site has",
    "sites": {"A": {}, "B": {}},
    "headline": {"fed": {"R": 0.9, "U": 4.0, "U_pooled": -1.0}},
    "traffic": {"fed": {"megabytes_up": 20.0}},
    "hospitals": {"B": {"scanner": "old"}},
    "final": {
        "fed": {
            "dice_mean": 0.7, "dice_ci95": [0.6, 0.8], "worst_site": "B", "dice_worst_site": 0.6, "failure_rate": 0.25,
            "unseen": {"X": 0.66},
        },
        "pooled": {"dice_mean": 0.8, "sites": {"A": 0.8, "B": 0.75}},
        "local": {"sites": {"A": 0.6, "B": 0.7}},
    },
}  # fmt: skip


def made_up():
    scores = []
    for site, fed, alone in (("A", 0.8, 0.6), ("B", 0.6, 0.7)):
        scores += rows("fed", site, [fed, fed + 0.01, fed, fed - 0.01]) + rows(f"local-{site}", site, [alone] * 4)
        scores += rows("pooled", site, [0.8] * 4)
    return scores


def test_the_summary_says_who_gains_who_loses_and_what_the_unseen_get():
    text = " ".join(in_short(RESULT, made_up()))
    assert "2 hospitals trained one network together (fed). On 3 persons that no hospital had for training" in text
    assert "keeps 90.0 % of that" in text
    assert "more than chance explains" in text
    assert "A gains and B loses" in text
    assert "serves B (old) worst: Dice 0.600, where the pooled network reaches 0.750" in text
    assert "25.0 % of the cases have a structure with a Dice below 0.5" in text
    assert (
        "took no part (X) it reaches 0.660, 4.0 points below the mean of those that did, and 1.0 points above the pooled"
        in text
    )
    assert "each hospital sent 10 MB of weight differences in 3 rounds" in text


def test_the_summary_says_which_of_several_methods_serves_the_worst_hospital_best():
    better = {"dice_worst_site": 0.65, "worst_site": "A"}
    several = RESULT | {"headline": RESULT["headline"] | {"other": {"R": 0.95}}}
    several["final"] = RESULT["final"] | {"other": better}
    scores = made_up() + rows("other", "A", [0.9] * 4) + rows("other", "B", [0.9] * 4)
    text = " ".join(in_short(several, scores))
    assert (
        "Of 2 methods, other serves its worst hospital best: 0.650 at A, with 95.0 % of pooled in the mean. Over all "
        "hospitals it has +20.0 points" in text
    )
    several["final"] = RESULT["final"] | {"other": better | {"dice_worst_site": 0.5}}
    assert "Of 2 methods, it serves its worst hospital best." in " ".join(in_short(several, scores))
    assert "methods" not in " ".join(in_short(RESULT, made_up()))


def test_what_is_not_known_is_said():
    text = " ".join(unknown(RESULT | {"final": {"fed": {}}}, made_up()))
    assert "Only 3 test persons: the intervals are wide" in text
    assert "nobody knows how much federation costs" in text
    assert "nobody knows who gains by joining" in text
    assert "no medical device" in text


def test_one_of_a_thing_is_told_as_one():
    assert [counted(n, "case") for n in (0, 1, 2)] == ["0 cases", "1 case", "2 cases"]
    assert counted(1, "request was", "requests were") == "1 request was"
    assert counted(2, "request was", "requests were") == "2 requests were"


def test_a_study_of_one_hospital_and_one_round_is_told_as_one(tmp_path):
    run_toy(toy_experiment(rounds=1), tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "store.sqlite")) as database, database:
        database.execute("DELETE FROM updates WHERE site != 'A'")
        database.execute("UPDATE updates SET status = 'late', reason = 'deadline'")
        database.execute("UPDATE runs SET resumed = 1")
    page = write_report(tmp_path, pdf=False)[0].read_text()
    assert "1 hospital trains" in page
    assert "Finished: 1 of 1 round, " in page
    assert "1 request was not answered" in page
    assert "resumed 1 time." in page


# ------------------------------------------------------------------------------------------------------------- documents
EVIL = "<script>alert('é — ±')</script>"


def evil_report():
    blocks = [
        Paragraph(EVIL),
        Bullets([EVIL]),
        Facts([(EVIL, EVIL)]),
        Code(EVIL),
        Table(EVIL, [EVIL, EVIL], [[EVIL, "1"]]),
    ]
    return Report(EVIL, EVIL, [Section(EVIL, blocks)])


def test_names_from_files_are_text_and_nothing_else():
    page = to_html(evil_report())
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 10
    assert to_pdf(evil_report()).startswith(b"%PDF-")


def test_the_same_report_gives_the_same_bytes():
    assert to_html(evil_report()) == to_html(evil_report())
    assert to_pdf(evil_report()) == to_pdf(evil_report())


def drawn(colour):
    figure = Figure(figsize=(2, 1))
    axis = figure.subplots()
    axis.plot([0, 1, 2], [0, 5, 0], color=colour)
    axis.set(ylim=(0, 1), xlabel="<round>")
    return drawing_of(figure)


def test_a_chart_is_lines_and_words_in_the_colours_of_the_page():
    page = to_svg(drawn(COLOURS[0]), 'a "chart"')
    assert 'aria-label="a &quot;chart&quot;"' in page
    assert 'stroke="var(--series-1)"' in page
    assert ">&lt;round&gt;</text>" in page
    assert 'fill="#ffffff"' not in page  # it has no ground of its own
    assert "style=" not in page  # which the page's policy forbids
    assert "url(" not in page


def test_lines_end_where_the_axes_end():
    lines = [mark for mark in drawn("#123456").marks if getattr(mark, "stroke", None) == "#123456"]
    heights = [y for line in lines for _, points in line.steps for y in points[1::2]]
    assert 0 < max(heights) <= 72
    assert len(lines[0].steps) == 4  # up and down, without the peak that lies above them


def test_columns_of_a_page_are_as_wide_as_their_numbers():
    to_pdf(Report("t", "s", []))  # which knows the fonts
    rows = [["a hospital with a name of many words that may be broken", "+0.1 [-0.2, +0.4]", "1"] * 2]
    table = Table("", ["hospital", "difference", "n"] * 2, rows)
    widths = _widths(table, 8)
    assert sum(widths) == pytest.approx(WIDTH)
    for n in (1, 4):
        assert widths[n] >= stringWidth(rows[0][n], "Sans", 8)


# ------------------------------------------------------------------------------------------------------------ of real runs
@pytest.fixture(scope="module")
def written(finished):  # noqa: F811
    told = fedseg("report", finished)
    assert "report.html" in told.stdout
    return finished


def test_a_simulation_gets_a_file_that_holds_everything(written):
    page = (written / "report.html").read_text()
    assert len(page) < 3_000_000
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert str(written.parent) not in page
    for heading in ("In short", "Who does how well", "Methods compared", "Rounds", "Study card", "What is not known"):
        assert f">{heading}</h2>" in page
    assert "T2-like contrast" in page
    assert "takes no part" in page
    dice = json.loads((written / "result.json").read_text())["final"]["fedavg"]["dice_mean"]
    assert f"a mean Dice of {dice:.3f}" in page
    assert (written / "report.pdf").read_bytes().startswith(b"%PDF-")


def test_every_hospitals_dice_has_an_interval(written):
    page, scores = (written / "report.html").read_text(), read_scores(written / "scores.csv")
    sites = json.loads((written / "result.json").read_text())["final"]["fedavg"]["sites"]
    for site, dice in sites.items():
        low, high = interval(scores, "fedavg", site)
        assert f'<td class="number">{dice:.3f} [{low:.3f}, {high:.3f}]</td>' in page
    assert "2000 draws of a hospital&#x27;s test persons" in page


def test_without_scores_of_cases_there_are_no_intervals(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    (tmp_path / "run" / "scores.csv").unlink()
    page = write_report(tmp_path / "run", pdf=False)[0].read_text()
    assert "2000 draws" not in page
    cases = json.loads((written / "result.json").read_text())["final"]["fedavg"]["cases"]
    assert f"On {cases} cases that no hospital had for training" in page


def test_another_method_may_speak_for_the_federation(written, tmp_path):
    fedseg("report", written, "--no-pdf", "--method", "fedavg-personal", "-o", tmp_path / "own.html")
    dice = json.loads((written / "result.json").read_text())["final"]["fedavg-personal"]["dice_mean"]
    told = "3 hospitals trained one network together, and each went on alone from it (fedavg-personal)."
    page = (tmp_path / "own.html").read_text()
    assert told in page
    assert f"a mean Dice of {dice:.3f}" in page
    refused = fedseg("report", written, "--method", "fedsgd", expect=2).stderr
    assert "--method fedsgd: there is no such method; there are fedavg, fedavg-personal" in refused


def test_what_the_scenario_expects_is_held_against_what_came_out(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    result = json.loads((written / "result.json").read_text())
    share = 100 * result["headline"]["fedavg"]["R"]
    result["expected"] = {
        "fedavg": {"R": {"value": share + 1, "tolerance": 1.5}, "dice": {"value": 2.0, "tolerance": 0.5}}
    }
    (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    page = write_report(tmp_path / "run", pdf=False)[0].read_text()
    assert f'{share + 1:.1f} ± 1.5</td><td class="number">{share:.1f}</td><td class="number">as expected' in page
    assert "2.000 ± 0.500</td>" in page
    assert "differs" in page
    assert "expects" not in (written / "report.html").read_text()


def test_a_card_lies_beside_the_networks(written):
    card = (written / "models" / "MODEL_CARD.md").read_text()
    for path in (written / "models").rglob("*.safetensors"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in card
    assert "- B: T2-like contrast\n" in card
    assert "- X: low field, takes no part" in card
    assert "Not a medical device" in card


def test_an_exported_network_takes_its_card_along(written, tmp_path):
    exported = tmp_path / "net.pt2"
    told = fedseg("export", written / "models" / "fedavg.safetensors", exported)
    assert "MODEL_CARD.md" in told.stdout
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert f"| net.pt2 | {hashlib.sha256(exported.read_bytes()).hexdigest()} |" in card
    assert "| made of models/fedavg.safetensors |" in card
    assert "models/pooled" not in card
    assert "- B: T2-like contrast\n" in card
    assert "hospitals trained one network together" in card
    assert str(tmp_path) not in card
    assert str(written) not in card


def test_a_model_file_by_itself_gets_a_card_that_says_what_it_does_not_know(written, tmp_path):
    alone, graph = tmp_path / "alone.safetensors", tmp_path / "net.onnx"
    shutil.copy(written / "models" / "fedavg.safetensors", alone)
    graph.write_bytes(b"a graph")
    card = write_exported_card(Exported(graph, alone))
    text = card.read_text()
    for said in ("# Model card: differ", "- Segments liver, spleen, kidneys in MR volumes", "- Trained with: not recorded",
                 "it holds no scores", "| made of alone.safetensors |", "Not a medical device"):  # fmt: skip
        assert said in text
    write_exported_card(Exported(graph, alone))  # its own card it may write anew
    card.write_text("# Our network\n")
    assert write_exported_card(Exported(graph, alone)) is None
    assert card.read_text() == "# Our network\n"


def test_the_report_of_a_study_knows_sums_only(tmp_path):
    run_toy(toy_experiment(rounds=3), tmp_path)
    paths = write_report(tmp_path, tmp_path / "told.html")
    assert [path.name for path in paths] == ["told.html", "told.pdf"]
    page = paths[0].read_text()
    assert "3 hospitals train unet together. Finished: 3 of 3 rounds, and the final weights are scored." in page
    assert page.count("<svg") == 1 + 3 * 3  # Dice, loss and cosine of three hospitals
    assert "<img" not in page
    for site in "ABC":
        assert f'<th scope="row">{site}</th>' in page


# --------------------------------------------------------------------------------------------------------- over the rounds
def test_charts_over_rounds_show_what_the_store_has(finished):  # noqa: F811
    dice, loss, cosine = round_charts(finished, {"fedavg": COLOURS[0]}, ["A", "B", "C"], alone=True)
    assert [name for _, name in dice.legend] == ["fedavg", "alone"]
    assert cosine.legend == ()  # of fedavg only: who trains alone agrees with himself
    with reader(finished) as store:
        value = store(
            "SELECT value FROM metrics WHERE run = 'fedavg' AND site = 'B' AND name = 'dice' AND server_round = 3"
        )
        training = store("SELECT training FROM updates WHERE run = 'local-C' AND server_round = 1")
    assert f"{value[0]['value']:.2f} in round 3" in dice.alts[1]
    assert dice.alts[1].startswith("B: fedavg ")
    assert f"alone {json.loads(training[0]['training'])['loss']:.2f} in round 1" in loss.alts[2]


def test_charts_of_many_hospitals_show_those_that_are_served_worst(tmp_path):
    store = RunStore(tmp_path, "fed")
    store.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "store.sqlite")) as database, database:
        database.execute("INSERT INTO runs VALUES ('fed', 'n', '{}', '', 0, 1, 0, NULL)")
        for n in range(20):
            database.execute("INSERT INTO metrics VALUES ('fed', 1, ?, 'dice', ?)", (f"site-{n:02d}", 0.9 - 0.01 * n))
    (dice,) = round_charts(tmp_path, {"fed": COLOURS[0]}, [f"site-{n:02d}" for n in range(20)])
    assert [alt.split(":")[0] for alt in dice.alts] == [f"site-{n:02d}" for n in range(8, 20)]
    assert "The 12 of 20 hospitals with the lowest Dice" in dice.caption


def test_a_report_names_the_libraries_of_the_run_not_those_of_the_moment(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    with contextlib.closing(sqlite3.connect(tmp_path / "run" / "store.sqlite")) as database, database:
        database.execute("UPDATE runs SET software = ?", (json.dumps({"fedseg": "0.0.1", "torch": "1.2.3"}),))
        insert = "INSERT INTO events (run, time, kind, server_round, detail) VALUES ('fedavg', 0, 'resumed', 2, ?)"
        database.execute(insert, ("torch 1.2.3 -> 1.2.4",))
    told = "fedseg 0.0.1, torch 1.2.3; later in fedavg: torch 1.2.3 -> 1.2.4"
    assert software_of(tmp_path / "run") == told
    page = write_report(tmp_path / "run", pdf=False)[0].read_text()
    assert told.replace(">", "&gt;") in page
    assert torch.__version__ not in page
    assert f"- Trained with: {told}" in (tmp_path / "run" / "models" / "MODEL_CARD.md").read_text()


def test_what_an_older_run_did_not_record_is_said_to_be_unknown(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    with contextlib.closing(sqlite3.connect(tmp_path / "run" / "store.sqlite")) as database, database:
        database.execute("ALTER TABLE runs DROP COLUMN software")
    assert software_of(tmp_path / "run") == "not recorded"


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(StoreError, match="no run store"):
        write_report(tmp_path)


@pytest.mark.skipif(chromium() is None, reason="chromium (Debian's package) is not installed")
def test_a_browser_shows_it_without_asking_anybody(written, tmp_path):
    browser = Browser(tmp_path)
    try:
        browser.open(f"file://{written / 'report.html'}")
        assert browser.ask("document.querySelectorAll('section').length") >= 7
        assert browser.ask("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert browser.ask(
            "[...document.querySelectorAll('img, svg[role=img]')].every(one => one.alt || one.ariaLabel)"
        )
        for width in (1280, 390):
            browser.resize(width, 900, phone=width < 800)
            assert browser.ask("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        if shown := os.environ.get("FEDSEG_PICTURES"):  # 1, or the result directory that the picture is to be of
            if shown != "1":
                write_report(Path(shown), tmp_path / "shown.html", pdf=False)
                browser.open(f"file://{tmp_path / 'shown.html'}")
            browser.resize(1180, 900)
            browser.picture(tmp_path / "report.png")
            with Image.open(tmp_path / "report.png") as whole:
                top = whole.convert("RGB").crop((0, 0, whole.width, min(1400, whole.height)))
                top.quantize(128).save(PICTURES / "report.png", optimize=True)
        assert all(address.startswith(("file:", "data:")) for address in browser.requests)
        assert browser.complaints == []
    finally:
        browser.close()
