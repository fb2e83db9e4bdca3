import http.client
import json
import math
import os
import re
import sqlite3
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedseg.coordinator.exporter import serve
from fedseg.federated.local import InProcessFleet
from fedseg.federated.messages import SiteFailure
from tests.coordinator.browser import Browser, chromium
from tests.federated.toys import ask_toy, changed_fleet, run_toy, toy_experiment, toy_weights

IMAGES = Path(__file__).parents[2] / "docs" / "images"
SITES = ("Danube", "Ebro", "Loire", "Tagus", "Vistula")
PAGE = (files("fedseg.coordinator") / "page.html").read_text()
needs_chromium = pytest.mark.skipif(chromium() is None, reason="chromium (Debian: chromium) is not installed")


def like_a_study(site, instructions, answer):
    """Numbers as they come from training; some answers that a coordinator wants to know of."""
    number, place = instructions.server_round, SITES.index(site)
    if site == "Tagus" and number in (4, 9):
        return SiteFailure(site, number, "abstained", "too-few-cases")
    if site == "Ebro" and number == 6:
        return replace(answer, delta={name: np.full_like(array, np.nan) for name, array in answer.delta.items()})
    dice = 0.25 + 0.6 * (1 - math.exp(-number / (3 + place))) - 0.03 * place + 0.02 * math.sin(3 * number + place)
    return replace(
        answer,
        delta={name: 0.1 * array for name, array in toy_weights(place).items()} if answer.delta else {},
        num_cases=(212, 77, 98, 61, 140)[place],
        sums={"cases": 2.0, "failures": 0.0, "dice/liver/sum": 2 * dice, "dice/liver/count": 2.0}
        if answer.sums
        else {},
        training={"loss": 1.1 * math.exp(-number / 5) + 0.1 + 0.02 * place},
        quarantined={"missing-label": place} if place else {},
        manifest=("a" if number < 8 or place else "b") * 64,
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    output = tmp_path_factory.mktemp("hospital-network")
    run_toy(toy_experiment(rounds=12, min_sites=2), output, fleet=changed_fleet(like_a_study, sites=SITES))
    return output


@contextmanager
def served(directory, port=0):
    server, thread = serve(directory, port=port)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.fixture(scope="module")
def port(study):
    with served(study) as number:
        yield number


def fetch(port, path, method="GET"):
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def status(directory, query=""):
    with served(directory) as port:
        return json.loads(fetch(port, f"/status.json{query}")[2])


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Chromium, which takes seconds to start."""
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def browser(program):
    """A new tab."""
    program.renew()
    return program


class Gate:
    """Sites that answer a round only when they are let."""

    def __init__(self, output, rounds=3):
        self._rounds = {number: threading.Event() for number in range(1, rounds + 2)}
        fleet = InProcessFleet(SITES, self._ask)
        experiment = toy_experiment(rounds=rounds, min_sites=2)
        self._thread = threading.Thread(target=run_toy, args=(experiment, output), kwargs={"fleet": fleet})
        self._thread.start()

    def _ask(self, site, instructions):
        if site == SITES[1]:  # one has answered, the others have not
            assert self._rounds[instructions.server_round].wait(120)
        return like_a_study(site, instructions, ask_toy(site, instructions))

    def let(self, server_round):
        self._rounds[server_round].set()

    def end(self):
        for event in self._rounds.values():
            event.set()
        self._thread.join(60)


def test_status_says_what_a_run_has_come_to(study):
    found = status(study)
    assert (found["study"], found["state"], found["round"], found["of"]) == ("toy", "finished", 12, 12)
    assert (found["waiting"], found["expected_end"]) == (None, None)
    sites = {site["name"]: site for site in found["sites"]}
    assert list(sites) == list(SITES)
    assert (sites["Vistula"]["cases"], sites["Vistula"]["quarantined"]) == (140, 4)
    assert sites["Tagus"]["round"] == 12
    last = [curve[-1][1] for curve in (site["dice_curve"] for site in found["sites"])]
    assert found["curves"]["dice"][-1][1] == pytest.approx(sum(last) / len(last))
    assert found["curves"]["dice_worst"][-1][1] == min(last)
    events = {(event["kind"], event["site"]): event for event in found["events"]}
    assert set(events) == {("abstained", "Tagus"), ("refused", "Ebro"), ("data-changed", "Danube")}
    tagus = events["abstained", "Tagus"]
    assert (tagus["times"], tagus["first"], tagus["round"], tagus["detail"]) == (2, 4, 9, "too-few-cases")


def test_status_holds_no_path_and_no_reason_that_is_a_sentence(tmp_path):
    def talkative(site, instructions, answer):
        return SiteFailure(site, 1, "failed", "/data/patient 7.nii.gz") if site == "A" else answer

    run_toy(toy_experiment(rounds=1, min_sites=1), tmp_path, fleet=changed_fleet(talkative))
    text = json.dumps(status(tmp_path))
    assert "patient" not in text
    assert str(tmp_path) not in text


def test_a_loss_that_is_no_number_leaves_a_gap_in_the_curve(tmp_path):
    def with_loss(site, instructions, answer):
        return replace(answer, training={"loss": 0.5})

    run_toy(toy_experiment(rounds=3), tmp_path, fleet=changed_fleet(with_loss))
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as database:
        database.execute("UPDATE updates SET training = '{\"loss\": NaN}' WHERE server_round = 2")
        database.commit()
    assert status(tmp_path)["curves"]["loss"] == [[1, 0.5], [3, 0.5]]


def test_a_running_round_says_who_is_missing_and_when_the_end_is_expected(tmp_path):
    gate = Gate(tmp_path)
    try:
        gate.let(1)
        while (
            (found := status(tmp_path))["round"] < 1
            or found["waiting"] is None
            or (waiting := found["waiting"])["round"] < 2
            or len(waiting["sites"]) == 5
        ):
            time.sleep(0.01)
        assert found["state"] == "running"
        assert (waiting["round"], waiting["closing"], waiting["asked"]) == (2, False, 5)
        assert waiting["sites"] == list(SITES[1:])
        assert [site["state"] for site in found["sites"]] == ["answered", "asked", "asked", "asked", "asked"]
        assert found["expected_end"] > found["time"]
    finally:
        gate.end()
    assert status(tmp_path)["state"] == "finished"


def test_a_folder_in_which_nothing_has_begun_is_shown_as_that(tmp_path):
    found = status(tmp_path)
    assert (found["state"], found["sites"], found["runs"]) == ("not begun", [], [])


def test_a_state_folder_adds_who_is_connected_and_hides_the_supervisors_trouble(tmp_path):
    run_toy(toy_experiment(rounds=1), tmp_path / "run")
    supervisor = {"study": "Liver", "restarts": {"superlink": 2}, "problem": "/srv/state: is full"}
    (tmp_path / "status.json").write_text(json.dumps(supervisor))
    (tmp_path / "sites.json").write_text(json.dumps({"7": {"name": "D", "started": 0.0}}))
    for folder in (tmp_path, tmp_path / "run"):
        found = status(folder)
        assert (found["study"], found["restarts"], found["trouble"]) == ("Liver", 2, True)
        assert {site["name"]: site["state"] for site in found["sites"]}["D"] == "not connected"
        assert "/srv" not in json.dumps(found)


def test_the_page_is_served_with_a_policy_that_lets_it_run_its_own_script_only(port):
    code, headers, body = fetch(port, "/")
    assert (code, body.decode()) == (200, PAGE)
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/status.json", "/metrics", "/favicon.ico", "/other"])
def test_head_is_answered_like_get_without_a_body(port, path):
    head, get = fetch(port, path, "HEAD"), fetch(port, path)
    assert head[0] == get[0]
    assert head[2] == b""
    assert head[1]["Content-Type"] == get[1]["Content-Type"]


def test_nothing_can_be_sent_to_the_page_and_nothing_else_is_there(port):
    assert fetch(port, "/", "POST")[0] == 405
    assert fetch(port, "/../../etc/passwd")[0] == 404
    assert fetch(port, "/status.json?run=" + "x" * 2000)[0] == 200


def test_the_page_asks_nobody_else():
    assert not re.findall(r"(?:src|href)\s*=|@import|url\(", PAGE)
    assert set(re.findall(r"https?://[^\"'\s]+", PAGE)) == {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_have_the_contrast_that_wcag_asks_for(scheme):
    sets = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", PAGE, re.DOTALL)]
    colours = sets[0] if scheme == "light" else sets[0] | sets[1]
    assert sets[0].keys() == sets[1].keys()
    for ground in ("ground", "card"):
        for name in ("text", "muted", "accent", "second", "third", "good", "warn", "bad"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    assert contrast(colours["accent"], colours["grid"]) >= 3  # the bar on what is left of it


def contrast(one, other):
    """Ratio of relative luminances, as WCAG 2 defines it."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


TEXT = "document.body.innerText"


@needs_chromium
def test_the_page_shows_rounds_and_sites_without_complaint(browser, port):
    browser.open(f"http://127.0.0.1:{port}/")
    assert browser.until("document.querySelectorAll('#rows tr').length") == len(SITES)
    assert browser.ask("document.title") == "toy: 12 of 12"
    text = browser.ask(TEXT)
    for words in (
        "Finished",
        "Round 12 of 12",
        *SITES,
        "Round 9: Tagus abstained (too-few-cases); 2 times since round 4",
    ):
        assert words in text
    assert "Round 6: the update of Ebro was refused (non-finite)" in text
    cosines = browser.ask("[...document.querySelectorAll('#rows [data-name=Cosine]')].map((cell) => cell.textContent)")
    assert cosines == [
        f"{site['cosine']:.2f}".replace("-", "−") for site in json.loads(fetch(port, "/status.json")[2])["sites"]
    ]
    assert browser.ask("document.querySelectorAll('#dice polyline').length") == 2
    assert browser.ask("document.querySelectorAll('#numbers tr').length") == 12
    assert browser.ask("document.querySelector('#dice svg').getAttribute('aria-label')").startswith("Dice by round.")
    assert browser.complaints == []
    assert {address.split("/")[2] for address in browser.requests} == {f"127.0.0.1:{port}"}


@needs_chromium
def test_the_page_follows_a_run_and_says_when_nobody_answers(browser, tmp_path):
    gate = Gate(tmp_path / "run")
    try:
        with served(tmp_path / "run") as port:
            browser.open(f"http://127.0.0.1:{port}/")
            browser.until(f"{TEXT}.includes('Ebro, Loire, Tagus, Vistula')")
            assert "Round 1, asked at" in browser.ask(TEXT)
            assert "1 of 5 have answered" in browser.ask(TEXT)
            gate.let(1)
            browser.until(f"{TEXT}.includes('Round 1 of 3')")
            assert browser.until("document.getElementById('news').textContent") == "Round 1 of 3 is finished"
            assert browser.complaints == []
        browser.until(f"{TEXT}.includes('Not reachable since')")
        assert "Round 1 of 3" in browser.ask(TEXT)  # what was known stays
        gate.let(2)
        with served(tmp_path / "run", port):
            browser.until(f"{TEXT}.includes('Round 2 of 3')")
            assert "Live, updated" in browser.ask(TEXT)
    finally:
        gate.end()


@needs_chromium
@pytest.mark.parametrize("width", [320, 390, 768, 1100])
def test_nothing_has_to_be_scrolled_sideways(browser, port, width):
    browser.resize(width, 800, phone=width < 500)
    browser.open(f"http://127.0.0.1:{port}/")
    browser.until("document.querySelectorAll('#rows tr').length")
    assert browser.ask("document.documentElement.scrollWidth") == width
    assert browser.ask("document.querySelector('#dice svg').getBoundingClientRect().right") <= width


@needs_chromium
def test_the_numbers_are_reached_with_the_keyboard(browser, port):
    browser.open(f"http://127.0.0.1:{port}/")
    browser.until("document.querySelectorAll('#rows tr').length")
    for key, code in (("Tab", 9), ("Enter", 13)):
        for kind in ("keyDown", "keyUp"):
            browser.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=code,
                text="\r" if code == 13 else "",
            )
    assert browser.until("document.querySelector('details').open")


@needs_chromium
def test_names_are_shown_as_text_whatever_they_are(browser, tmp_path):
    name = "<img src=x onerror=document.title=1>"
    run_toy(toy_experiment(rounds=1, min_sites=1), tmp_path / "run", fleet=InProcessFleet((name,), ask_toy))
    with served(tmp_path / "run") as port:
        browser.open(f"http://127.0.0.1:{port}/")
        assert browser.until("document.querySelector('#rows th')?.textContent") == name
    assert browser.ask("document.querySelectorAll('img').length") == 0


@needs_chromium
def test_another_run_of_a_simulation_can_be_chosen(browser, tmp_path):
    from fedseg.federated.driver import run_federation
    from fedseg.federated.store import RunStore
    from tests.federated.toys import toy_state

    for run, rounds in (("federated", 1), ("pooled", 2)):
        experiment = toy_experiment(rounds=rounds, min_sites=1)
        with closing(RunStore(tmp_path / "run", run)) as store:
            run_federation(
                experiment, InProcessFleet(SITES, ask_toy), store, lambda experiment=experiment: toy_state(experiment)
            )
    with served(tmp_path / "run") as port:
        browser.open(f"http://127.0.0.1:{port}/")
        browser.until(f"{TEXT}.includes('Round 1 of 1')")
        browser.ask("at('run').value = 'pooled'; at('run').dispatchEvent(new Event('change'))")
        browser.until(f"{TEXT}.includes('Round 2 of 2')")


@needs_chromium
@pytest.mark.skipif("FEDSEG_PICTURES" not in os.environ, reason="FEDSEG_PICTURES=1 makes docs/images/watch-*.png anew")
def test_the_pictures_in_the_documentation_can_be_made(browser, tmp_path):
    gate = Gate(tmp_path / "run", rounds=20)
    try:
        for number in range(1, 12):
            gate.let(number)
        with served(tmp_path / "run") as port:
            for name, width, scheme in (("desktop", 1000, "light"), ("phone", 320, "dark")):
                browser.resize(width, 900, phone=width < 500)
                browser.prefer(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
                browser.open(f"http://127.0.0.1:{port}/")
                browser.until(f"{TEXT}.includes('Round 11 of 20') && {TEXT}.includes('1 of 5 have answered')")
                path = IMAGES / f"watch-{name}.png"
                browser.picture(path)
                picture = Image.open(path).convert("RGB")
                picture.crop((0, 0, width, min(picture.height, 1500))).quantize(128).save(path, optimize=True)
    finally:
        gate.end()
