"""What a federation knows of its images: sums, who is reversed, what the server lets in; and a real federation."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fedseg.config import parse_experiment
from fedseg.data.features import describe, layout
from fedseg.data.phantom import PhantomConfig, ScannerConfig, write_phantoms
from fedseg.errors import ConfigError, MessageError, UpdateRefused
from fedseg.federated.driver import run_federation
from fedseg.federated.fingerprint import (
    GRID,
    LAYOUT,
    UNKNOWN,
    CaseFeatures,
    Fingerprint,
    fingerprint_of,
    joined,
    polarity,
    reversed_,
    vote,
)
from fedseg.federated.local import InProcessFleet
from fedseg.federated.messages import RoundInstructions, SiteUpdate
from fedseg.federated.networks import start_state
from fedseg.federated.screening import screen_fingerprint
from fedseg.federated.site import Site
from fedseg.federated.sites import OpenSites, PooledSite
from fedseg.federated.store import RunStore
from fedseg.model_file import load_model, save_model_file
from fedseg.site.config import SiteConfig
from tests.federated.toys import same

NAMES = ("Aare", "Elbe", "Po")
REVERSED = "Po"


def site_of(layout_, cases=3, **values):
    names = {"noise #0": 1.0} | values
    return fingerprint_of([CaseFeatures(names, tuple(layout_)) for _ in range(cases)])


PATTERN = np.random.default_rng(0).normal(size=LAYOUT)


def test_the_layout_is_the_mean_of_blocks_in_the_middle():
    image = np.zeros((20, 20, 20), np.float32)
    image[4:16, 4:16, 4:7] = 3.0  # the first of four blocks along W of the middle 60 %
    found = layout(image).reshape(GRID, GRID, GRID)
    assert np.allclose(found[..., 0], 3.0)
    assert not found[..., 1:].any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 30, 3), (17, 5, 64)])
def test_volumes_of_any_size_have_a_layout_and_a_negated_one_has_the_negated_layout(shape):
    image = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    assert np.isfinite(layout(image)).all()
    assert np.array_equal(layout(-image), -layout(image))


def test_mean_and_spread_are_those_of_the_cases():
    cases = [CaseFeatures({"noise #0": value}, tuple(PATTERN)) for value in (1.0, 2.0, 6.0)]
    found = fingerprint_of(cases)
    assert found.mean("noise #0") == 3.0
    assert found.spread("noise #0") == pytest.approx(np.std([1, 2, 6], ddof=1))
    assert fingerprint_of(reversed(cases)) == found


def test_the_minority_is_reversed_whatever_the_order_of_sites():
    sites = {"a": site_of(-PATTERN, 3), "b": site_of(PATTERN, 4), "c": site_of(PATTERN + 0.1, 4)}
    assert vote(sites) == {"a": (-1,), "b": (1,), "c": (1,)}
    assert vote(dict(reversed(sites.items()))) == vote(sites)
    assert joined(dict(reversed(sites.items())), aligned=True) == joined(sites, aligned=True)


def test_cases_and_not_sites_have_the_majority_and_of_two_equals_the_first_name():
    assert vote({"a": site_of(PATTERN, 1), "b": site_of(PATTERN, 1), "c": site_of(-PATTERN, 9)})["c"] == (1,)
    assert vote({"a": site_of(PATTERN), "b": site_of(-PATTERN)}) == {"a": (1,), "b": (-1,)}


def test_channels_are_reversed_each_by_itself():
    other = PATTERN[::-1]
    sites = {name: site_of([*PATTERN, *other]) for name in "ab"} | {"c": site_of([*PATTERN, *-other])}
    federation = joined(sites, aligned=True)
    assert vote(sites)["c"] == (1, -1)
    assert polarity([sites["c"].layout], federation) == (1, -1)


def test_the_sums_of_a_reversed_site_are_turned_into_those_of_its_negated_images(hospitals):
    cases = Site(hospitals[0]).prepare(tiny()).training.cases
    as_is = fingerprint_of(describe(case) for case in cases)
    negated = fingerprint_of(describe(replace(case, image=-case.image)) for case in cases)
    turned = reversed_(as_is, (-1,))
    assert turned.sums == pytest.approx(negated.sums, abs=1e-4)
    assert turned.squares == pytest.approx(negated.squares, abs=1e-4)
    assert turned.layout == negated.layout


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"cases": 0}, "positive"),
        ({"cases": True}, "positive"),
        ({"sums": {"noise #0": float("nan")}}, "finite"),
        ({"squares": {"noise #0": 0.0}}, "smaller than they can be"),
        ({"sums": {"other": 1.0}}, "same features"),
        ({"layout": [0.0] * 63}, "64 numbers per channel"),
        ({"layout": ["x"] * 64}, "finite"),
        ({"more": 1}, "has cases"),
    ],
)
def test_a_message_with_an_impossible_fingerprint_is_none(wrong, told):
    good = site_of(PATTERN).to_dict()
    assert Fingerprint.from_dict(good) == site_of(PATTERN)
    header = SiteUpdate("a", 1, {}, 3).header()
    with pytest.raises(MessageError, match=told):
        SiteUpdate.from_parts({**header, "fingerprint": {**good, **wrong}}, {})


def test_fingerprints_survive_both_messages():
    found = site_of(PATTERN)
    assert SiteUpdate.decode(SiteUpdate("a", 1, {}, 3, fingerprint=found).encode()).fingerprint == found
    assert RoundInstructions.decode(RoundInstructions(1, {}, "{}", fingerprint=found).encode()).fingerprint == found


def test_the_server_refuses_a_fingerprint_of_more_cases_or_channels_than_there_are():
    screen_fingerprint(SiteUpdate("a", 1, {}, 3, fingerprint=site_of(PATTERN)), 1, 1)
    screen_fingerprint(SiteUpdate("a", 1, {}, 3), 1, 1)  # a policy keeps it
    for update, channels, reason in (
        (SiteUpdate("a", 1, {}, 2, fingerprint=site_of(PATTERN)), 1, "no-cases"),
        (SiteUpdate("a", 1, {}, 3, fingerprint=site_of(PATTERN)), 2, "wrong-fingerprint"),
        (SiteUpdate("a", 2, {}, 3, fingerprint=site_of(PATTERN)), 1, "stale"),
        (
            SiteUpdate("a", 1, {}, 3, fingerprint=replace(site_of(PATTERN), sums={"noise #0": np.inf})),
            1,
            "wrong-finger",
        ),
    ):
        with pytest.raises(UpdateRefused) as refusal:
            screen_fingerprint(update, 1, channels)
        assert refusal.value.reason.startswith(reason)


def test_alignment_needs_a_fingerprint_and_mr():
    with pytest.raises(ConfigError, match=r"set data\.fingerprint = true too"):
        tiny(fingerprint=False)
    with pytest.raises(ConfigError, match="Hounsfield units are never reversed"):
        tiny(window=[-100.0, 100.0], modality="ct")


def tiny(modality="mr", **data):
    return parse_experiment(
        json.dumps(
            {
                "name": "tiny",
                "task": {"name": "phantom", "modality": modality, "labels": {"background": 0, "liver": 1}},
                "data": {"validation_fraction": 0.25, "fingerprint": True, "polarity": "aligned"} | data,
                "model": {"name": "unet", "options": {"widths": [4, 8]}},
                "training": {"patch_size": [8, 8, 8], "learning_rate": 0.01},
                "federation": {"rounds": 2},
            }
        )
    )


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hospitals")
    configs = []
    for number, name in enumerate(NAMES):
        phantoms = PhantomConfig(
            cases=4, shape=(24, 28, 28), first=10 * number, scanner=ScannerConfig(invert=name == REVERSED)
        )
        write_phantoms(folder / name, phantoms.model_copy(update={"structures": ("liver",)}))
        configs.append(SiteConfig(name=name, data=str(folder / name), cache=str(folder / "cache"), device="cpu"))
    return tuple(configs)


def run(experiment, configs, output, ask=None, **options):
    store = RunStore(output)
    try:
        fleet = InProcessFleet([config.name for config in configs], ask or OpenSites(configs)())
        return run_federation(experiment, fleet, store, lambda: start_state(experiment), **options)
    finally:
        store.close()


def test_the_reversed_hospital_is_found_and_trains_on_negated_images(hospitals, tmp_path):
    experiment = tiny()
    final = run(experiment, hospitals, tmp_path)
    assert final.fingerprint.cases == 9
    for config in hospitals:
        site = Site(config)
        as_is, aligned = (site.prepare(experiment, known).training.cases for known in (UNKNOWN, final.fingerprint))
        sign = -1 if config.name == REVERSED else 1
        assert all(np.array_equal(b.image, sign * a.image) for a, b in zip(as_is, aligned, strict=True))
        assert all(np.array_equal(b.label, a.label) for a, b in zip(as_is, aligned, strict=True))
    pooled = PooledSite([Site(config) for config in hospitals])
    assert pooled.fingerprint(experiment) == final.fingerprint
    images = [case.image for case in pooled.prepare(experiment, final.fingerprint).training.cases]
    assert min(min(final.fingerprint.agreement(layout(image[0]))) for image in images) > 0


def test_as_is_the_images_stay_while_the_fingerprint_is_known_and_goes_into_the_model_file(hospitals, tmp_path):
    experiment = tiny(polarity="as-is")
    final = run(experiment, hospitals, tmp_path)
    site = Site(hospitals[-1])
    assert site.prepare(experiment, final.fingerprint) is site.prepare(experiment)
    assert "contrast looks reversed" in site.drift(experiment, final.fingerprint).words
    save_model_file(tmp_path / "model.safetensors", experiment, final.weights, "x", fingerprint=final.fingerprint)
    assert load_model(tmp_path / "model.safetensors")[2] == final.fingerprint


def test_without_the_setting_nothing_is_asked_and_nothing_leaves(hospitals, tmp_path):
    experiment = tiny(fingerprint=False, polarity="as-is")
    ask, asked = OpenSites(hospitals)(), []

    def watched(name, instructions):
        asked.append(instructions)
        return ask(name, instructions)

    final = run(experiment, hospitals, tmp_path, watched)
    assert final.fingerprint == UNKNOWN
    assert all(one.weights and not one.fingerprint for one in asked)


def test_a_resumed_run_keeps_the_fingerprint_and_ends_with_the_same_bits(hospitals, tmp_path):
    experiment = tiny()
    undisturbed = run(experiment, hospitals, tmp_path / "a")
    ask, looked = OpenSites(hospitals)(), []

    def dies(name, instructions):
        if instructions.server_round == 2 and instructions.train:
            raise KeyboardInterrupt
        return ask(name, instructions)

    def watched(name, instructions):
        looked.extend([name] if not instructions.train and not instructions.evaluate else [])
        return ask(name, instructions)

    with pytest.raises(KeyboardInterrupt):
        run(experiment, hospitals, tmp_path / "b", dies)
    resumed = run(experiment, hospitals, tmp_path / "b", watched, resume=True)
    assert not looked
    assert resumed.fingerprint == undisturbed.fingerprint
    assert same(resumed.weights, undisturbed.weights)


def test_a_site_that_keeps_its_fingerprint_is_aligned_by_that_of_the_others(hospitals, tmp_path):
    experiment = tiny()
    ask = OpenSites(hospitals)()

    def silent(name, instructions):
        answer = ask(name, instructions)
        return replace(answer, fingerprint=UNKNOWN) if name == REVERSED else answer

    final = run(experiment, hospitals, tmp_path, silent)
    assert final.fingerprint.cases == 6
    found = Site(hospitals[-1]).prepare(experiment, final.fingerprint).training.cases
    assert np.array_equal(found[0].image, -Site(hospitals[-1]).prepare(experiment).training.cases[0].image)
