"""Which label-free rule finds images whose contrast is reversed, and how often the drift alarm sounds, by effect and severity.

One half of the persons is the federation, the other half is seen through every simulated effect. Prints two Markdown tables.

    python simulations/input_drift.py /path/to/Task04_Hippocampus
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from fedseg.config import DataConfig
from fedseg.data.cohort import PersonRule, read_cohort
from fedseg.data.features import describe, layout
from fedseg.data.preprocess import normalise
from fedseg.data.shift.cases import shifted
from fedseg.data.shift.catalogue import EFFECTS, SEVERITIES
from fedseg.data.shift.profiles import ScannerProfile, Shift, shipped_profiles, single_effect
from fedseg.data.volume import LabelMap, Volume, read_image, read_label
from fedseg.drift import drift_of, site_drift
from fedseg.federated.fingerprint import CaseFeatures, Fingerprint, fingerprint_of

Image = NDArray[np.float32]
BINS = np.linspace(-4, 4, 41)
SITE, DRAWS = 15, 60
"""Cases of a site, and how many sites are drawn."""


def main(folder: Path) -> None:
    """Measure and print."""
    cohort = read_cohort(folder, PersonRule.parse("pairs"))
    generator = np.random.default_rng(0)
    persons = sorted(cohort.persons())
    inside = set(generator.permutation(persons)[: len(persons) // 2])
    read = [(c.name, c.person in inside, read_image(c.images, "RAS"), read_label(c.label, "RAS")) for c in cohort.cases]
    reference = [prepared(volume) for _, known, volume, _ in read if known]
    others = [(name, volume, label) for name, known, volume, label in read if not known]
    federation = fingerprint_of(describe(case) for case in reference)
    rules = polarity_rules([case.image[0] for case in reference], federation)
    print(f"{len(reference)} cases are the federation, {len(others)} are seen through other scanners.\n")
    names = [name for name, effect in EFFECTS.items() if "mr" in effect.modalities and name != "orientation"]
    seen = {"none": [seen_through(others, None)]}
    seen |= {name: [seen_through(others, single_effect(name, level)) for level in SEVERITIES] for name in names}
    seen |= {f"*{name}*": [seen_through(others, p)] for name, p in shipped_profiles().items() if p.modality == "mr"}
    print(f"| effect | {' | '.join(rules)} |\n| --- |{' ---: |' * len(rules)}")
    for name, levels in seen.items():
        wrong = -1 if name in ("contrast-reversal", "*t2-like*") else 1  # what the strongest level truly is
        shares = [np.mean([wrong * rule(case.image[0]) > 0 for case in levels[-1]]) for rule in rules.values()]
        print(f"| {name} | {' | '.join(f'{100 * share:.0f}' for share in shares)} |", flush=True)
    print("\n| effect | image, severity 1 to 5 | site | words |\n| --- | --- | --- | --- |")
    for name, levels in seen.items():
        features = [[describe(case) for case in cases] for cases in levels]
        images = [np.mean([drift_of(one, federation).alarm for one in cases]) for cases in features]
        sites = [alarms_of_sites(cases, federation) for cases in features]
        words = Counter(word for one in features[-1] for word in drift_of(one, federation).words[:2])
        told = "; ".join(f"{word} ({count})" for word, count in words.most_common(2))
        print(f"| {name} | {percents(images)} | {percents(sites)} | {told} |", flush=True)


def prepared(volume: Volume) -> SimpleNamespace:
    """The parts of a `PreparedCase` that count here."""
    return SimpleNamespace(image=normalise(volume.array, DataConfig()), spacing=volume.spacing)


def seen_through(cases: list[tuple[str, Volume, LabelMap]], scanner: ScannerProfile | None) -> list[SimpleNamespace]:
    """Every case at one of six hospitals with that scanner."""
    found = []
    for number, (name, volume, label) in enumerate(cases):
        shift = Shift(scanner=scanner, seed=number % 6)
        found.append(prepared(volume if scanner is None else shifted(volume, label, shift, name)[0]))
    return found


def polarity_rules(images: list[Image], federation: Fingerprint) -> dict[str, Callable[[Image], float]]:
    """Rules that are positive for images as they are, and negative for reversed ones."""
    share = np.mean([histogram(image) for image in images], axis=0) + 1e-4
    ratio = np.log(share / share[::-1])
    skewed = np.sign(np.mean([skewness(image) for image in images]))
    return {
        "skewness": lambda image: float(skewed * skewness(image)),
        "histogram, earth mover": lambda image: earth_mover(image, share[::-1]) - earth_mover(image, share),
        "histogram, likelihood": lambda image: float(histogram(image) @ ratio),
        "layout": lambda image: federation.agreement(layout(image))[0],
    }


def histogram(image: Image) -> NDArray[np.float64]:
    """Shares of voxels."""
    return np.histogram(np.clip(image, -4, 4), BINS)[0] / image.size


def earth_mover(image: Image, share: NDArray[np.float64]) -> float:
    """Distance between two histograms."""
    return float(np.abs(np.cumsum(histogram(image)) - np.cumsum(share)).sum())


def skewness(image: Image) -> float:
    """Third moment of a z-scored image."""
    return float(np.mean(np.asarray(image, dtype=np.float64) ** 3))


def alarms_of_sites(features: list[CaseFeatures], federation: Fingerprint) -> float:
    """Share of sites, drawn at random, with an alarm."""
    draws = (np.random.default_rng(seed).choice(len(features), SITE, replace=False) for seed in range(DRAWS))
    return float(np.mean([site_drift([features[i] for i in draw], federation).alarm for draw in draws]))


def percents(shares: list[float]) -> str:
    """For a table."""
    return " / ".join(f"{100 * share:.0f}" for share in shares)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
