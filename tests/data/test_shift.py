"""Simulated scanners: what an image looks like elsewhere, always the same for the same case."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from fedseg.data.shift.catalogue import EFFECTS, SEVERITIES, STAGES
from fedseg.data.shift.profiles import (
    SHIPPED,
    Annotator,
    ScannerProfile,
    Shift,
    load_profile,
    pick_profiles,
    shipped_profiles,
    single_effect,
)
from fedseg.data.shift.scanner import happening, see_through
from fedseg.errors import ConfigError
from fedseg.sections import load_section, validate_section
from fedseg.site.config import load_site

SHAPE = (28, 36, 32)
IMAGING = [name for name, effect in EFFECTS.items() if effect.stage != "geometry"]


def tissue(modality="mr", seed=0):
    """A body of smooth tissue: MR in arbitrary units, or CT in HU."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 2.5)
    field = (field - field.min()) / np.ptp(field)
    return (field * 700 + 30 if modality == "mr" else field * 600 - 250).astype(np.float32)[None]


def image_for(name):
    return tissue(EFFECTS[name].modalities[0])


def ball(radius=7.0):
    """Bright, with a soft edge, exactly in the middle."""
    mesh = np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in SHAPE], indexing="ij")
    distance = np.sqrt(sum(m**2 for m in mesh))
    return (100 + 400 / (1 + np.exp(2 * (distance - radius))))[None].astype(np.float32)


def place_of(image):
    weight = image[0] - image.min()
    return np.array(ndimage.center_of_mass(weight))


@pytest.mark.parametrize("name", IMAGING)
def test_every_effect_keeps_the_grid_and_gets_worse_with_its_severity(name):
    clean = image_for(name)
    distances = []
    for severity in SEVERITIES:
        seen = see_through(clean, single_effect(name, severity), 0, "case")
        assert (seen.shape, seen.dtype) == (clean.shape, np.float32)
        assert np.isfinite(seen).all()
        distances.append(float(np.sqrt(np.square(seen - clean).mean())))
    assert distances[0] > 0
    assert distances == sorted(distances)


@pytest.mark.parametrize("name", IMAGING)
def test_a_case_looks_the_same_every_time(name):
    first, second = (see_through(image_for(name), single_effect(name, 3), 7, "case") for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("name", ["noise", "motion", "spike", "bias-field", "dose", "metal"])
def test_cases_and_sites_differ(name):
    clean, profile = image_for(name), single_effect(name, 3)
    seen = [see_through(clean, profile, seed, case) for seed, case in ((0, "a"), (0, "b"), (1, "a"))]
    assert not np.allclose(seen[0], seen[1])
    assert not np.allclose(seen[0], seen[2])


def test_the_shading_of_a_site_is_nearly_the_same_in_all_its_cases():
    flat, profile = np.full((1, *SHAPE), 100, dtype=np.float32), single_effect("bias-field", strength=0.3)
    fields = [np.log(see_through(flat, profile, seed, case)).ravel() for seed, case in ((0, "a"), (0, "b"), (1, "a"))]
    assert np.corrcoef(fields[0], fields[1])[0, 1] > 0.8
    assert abs(np.corrcoef(fields[0], fields[2])[0, 1]) < 0.7


def test_a_case_looks_the_same_in_another_process():
    code = """
import hashlib
import numpy as np
from fedseg.data.shift.profiles import load_profile
from fedseg.data.shift.scanner import see_through
image = np.random.default_rng(0).normal(300, 50, (1, 20, 24, 22)).astype(np.float32)
print(hashlib.sha256(see_through(image, load_profile("fast-motion"), 3, "case 7").tobytes()).hexdigest())
"""
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    image = np.random.default_rng(0).normal(300, 50, (1, 20, 24, 22)).astype(np.float32)
    here = see_through(image, load_profile("fast-motion"), 3, "case 7").tobytes()
    assert other.stdout.strip() == hashlib.sha256(here).hexdigest()


def test_physics_decides_the_order_and_not_the_file():
    effects = [{"name": name, "severity": 2} for name in ("grey-levels", "noise", "bias-field", "gamma-dark", "blur")]
    profiles = [
        validate_section(ScannerProfile, json.dumps({"name": "p", "modality": "mr", "effects": order}), source="test")
        for order in (effects, effects[::-1])
    ]
    one, other = (see_through(tissue(), profile, 0, "case") for profile in profiles)
    assert np.array_equal(one, other)
    assert len(np.unique(one)) <= 16  # stored last
    stages = [EFFECTS[effect.name].stage for effect, *_ in happening(profiles[0], 0, "case", geometric=False)]
    assert stages == sorted(stages, key=STAGES.index)


@pytest.mark.parametrize("name", [n for n in IMAGING if "mr" in EFFECTS[n].modalities])
def test_the_units_of_a_magnetic_resonance_image_do_not_matter(name):
    seen = see_through(tissue(), single_effect(name, 3), 0, "case")
    huge = see_through(tissue() * np.float32(1000), single_effect(name, 3), 0, "case")
    assert np.allclose(huge / 1000, seen, rtol=1e-3, atol=2)


@pytest.mark.parametrize("name", ["thick-slices", "low-resolution", "blur", "gibbs", "ghosting", "sharp-kernel"])
@pytest.mark.parametrize("severity", [1, 3])
def test_what_lowers_the_resolution_does_not_move_the_image_against_its_label(name, severity):
    seen = see_through(ball(), single_effect(name, severity), 0, "case")
    assert place_of(seen) == pytest.approx(place_of(ball()), abs=0.05)


def test_a_patient_who_moves_is_in_place_while_the_middle_of_k_space_is_read():
    for case in "abc":
        assert place_of(see_through(ball(), single_effect("motion", 3), 0, case)) == pytest.approx(
            place_of(ball()), abs=0.3
        )


def test_a_masked_surrounding_stays_empty_and_a_dark_voxel_does_not():
    image = tissue()
    image[:, :8] = 0
    image[0, 20, 20, 20] = 0
    seen = see_through(image, single_effect("noise", 5), 0, "case")
    assert (seen[:, :8] == 0).all()
    assert (seen[:, 8:] != 0).all()


def test_air_stays_dark_when_the_contrast_is_reversed_and_tissue_changes_places():
    image = np.pad(tissue()[0, :, :, :20], ((0, 0), (0, 0), (0, 12)), constant_values=2)[None]
    seen = see_through(image, single_effect("contrast-reversal", strength=1.0), 0, "case")
    assert seen[..., 24:].max() < 0.1 * np.quantile(image, 0.995)
    inside = (slice(None), slice(None), slice(None), slice(0, 18))
    assert np.corrcoef(image[inside].ravel(), seen[inside].ravel())[0, 1] < -0.99


def test_noise_has_the_promised_deviation():
    flat = np.full((1, *SHAPE), 100, dtype=np.float32)
    steady = {"name": "p", "modality": "ct", "jitter": 0.0, "effects": [{"name": "dose", "strength": 20.0}]}
    profile = validate_section(ScannerProfile, json.dumps(steady), source="test")
    assert see_through(flat, profile, 0, "case").std() == pytest.approx(20, rel=0.01)


def test_strengths_differ_a_little_from_case_to_case_around_the_site_s_own():
    profile = single_effect("bias-field", strength=0.2)
    strengths = [happening(profile, 0, f"case {n}", geometric=False)[0][1] for n in range(200)]
    assert 0.18 <= min(strengths) < 0.185
    assert 0.215 < max(strengths) <= 0.22


def test_an_effect_happens_in_the_promised_share_of_cases():
    document = {"name": "p", "modality": "mr", "effects": [{"name": "spike", "severity": 1, "probability": 0.3}]}
    profile = validate_section(ScannerProfile, json.dumps(document), source="test")
    share = np.mean([len(happening(profile, 0, f"case {n}", geometric=False)) for n in range(1000)])
    assert share == pytest.approx(0.3, abs=0.05)


def test_every_profile_loads_and_changes_an_image():
    profiles = shipped_profiles()
    kinds = [profile.modality for profile in profiles.values()]
    assert kinds.count("mr") >= 8
    assert kinds.count("ct") >= 4
    for name, profile in profiles.items():
        assert (SHIPPED / f"{name}.toml").read_text().startswith("# ")
        clean = tissue(profile.modality)
        seen = [see_through(clean, profile, 0, f"case {n}") for n in range(3)]
        assert all(np.isfinite(one).all() for one in seen)
        assert any(not np.allclose(one, clean) for one in seen)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"effects": [{"name": "nois", "severity": 1}]}, "did you mean 'noise'"),
        ({"effects": [{"name": "noise"}]}, "either severity"),
        ({"effects": [{"name": "noise", "severity": 1, "strength": 0.1}]}, "either severity"),
        ({"effects": [{"name": "noise", "severity": 6}]}, "less than or equal to 5"),
        ({"effects": [{"name": "noise", "strength": -1.0}]}, "strength must be 0 to 5"),
        ({"effects": [{"name": "dose", "severity": 1}]}, "is for ct, the profile for mr"),
        ({"effects": [{"name": "noise", "severity": 1, "sevrity": 2}]}, "did you mean 'severity'"),
        ({"effects": [{"name": "noise", "severity": 1}, {"name": "noise", "severity": 2}]}, "there once"),
    ],
)
def test_a_wrong_profile_is_refused_with_what_would_be_right(document, message):
    with pytest.raises(ConfigError, match=message):
        validate_section(ScannerProfile, json.dumps({"name": "p", "modality": "mr"} | document), source="p.toml")


def test_an_unknown_profile_or_one_of_another_modality_is_refused():
    with pytest.raises(ConfigError, match="did you mean '3t-clean'"):
        load_profile("3t-claen")
    with pytest.raises(ConfigError, match="is for ct, the images are mr"):
        pick_profiles(["ct-metal"], "mr")


def test_a_file_of_one_s_own_stands_where_a_name_can(tmp_path):
    (tmp_path / "ours.toml").write_text('name = "ours"\nmodality = "mr"\neffects = [{ name = "blur", severity = 4 }]\n')
    (tmp_path / "site.toml").write_text(
        'name = "A"\ndata = "data"\n[shift]\nscanner = "ours.toml"\nseed = 4\n'
        '[shift.annotator]\nname = "ours"\nhabits = [{ name = "tight", severity = 2 }]\n'
    )
    shift = load_site(tmp_path / "site.toml").shift
    assert shift.scanner.effects[0].name == "blur"
    assert shift.annotator == Annotator.model_validate_json(
        '{"name": "ours", "habits": [{"name": "tight", "severity": 2}]}'
    )
    assert Shift.model_validate_json(shift.model_dump_json()) == shift  # complete in itself, wherever it is read
    (tmp_path / "site.toml").write_text('name = "A"\ndata = "data"\n[shift]\nscanner = "theirs.toml"\n')
    with pytest.raises(ConfigError, match=r"shift.scanner: .*theirs.toml: no such file"):
        load_site(tmp_path / "site.toml")


def test_a_profile_can_be_named_in_a_section_or_written_out(tmp_path):
    (tmp_path / "named.toml").write_text('scanner = "low-field"\n')
    assert load_section(Shift, tmp_path / "named.toml").scanner == load_profile("low-field")
    (tmp_path / "table.toml").write_text("[scanner]\n" + (SHIPPED / "low-field.toml").read_text())
    assert load_section(Shift, tmp_path / "table.toml").scanner == load_profile("low-field")
    (tmp_path / "table.toml").write_text(
        '[scanner]\nname = "p"\nmodality = "mr"\neffects = [{ name = "blur", severty = 1 }]\n'
    )
    with pytest.raises(ConfigError, match="did you mean 'severity'"):
        load_section(Shift, tmp_path / "table.toml")
