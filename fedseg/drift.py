"""How far images are from what a network was trained on, and in what: the drift alarm of a site and of a prediction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from fedseg.federated.fingerprint import AXES, CaseFeatures, Fingerprint

FALSE_ALARMS = 0.05
"""Share of ordinary images that are called unusual, as far as features are normally distributed; measured: docs/hospital.md."""
STRANGE = 0.2
"""Below this correlation with the federation's layout nothing lies where it usually does."""
_SITE_CONFIDENCE = 0.01
"""How seldom a site without drift is told that it has too many unusual cases."""
_LEAST_SPREAD = 0.05
"""Where all cases of a federation are alike (a spacing, say), a difference of about five per cent counts as one deviation."""
_REVERSED, _SHARPER = "contrast looks reversed", "sharper, or noisier"


@dataclass(frozen=True)
class Drift:
    """What is unusual about an image."""

    distance: float
    """Largest deviation of a feature, as a multiple of the alarm threshold; above 1 is an alarm."""
    words: tuple[str, ...]
    """What is different, the most unusual first; empty: nothing."""

    @property
    def alarm(self) -> bool:
        """Whether the image is far from what the federation has."""
        return bool(self.words)


@dataclass(frozen=True)
class SiteDrift:
    """What is unusual about the cases of a site; for the site alone."""

    cases: int
    unusual: int
    """Cases with an alarm."""
    expected: int
    """More unusual cases than this are drift."""
    words: tuple[str, ...]
    """What is different in most of the unusual cases."""

    @property
    def alarm(self) -> bool:
        """Whether more cases are unusual than chance would have."""
        return self.unusual > self.expected

    def __str__(self) -> str:
        what = f": {', '.join(self.words)}" if self.words else ""
        return f"{self.unusual} of {self.cases} cases are unusual, up to {self.expected} would be chance{what}"


def drift_of(case: CaseFeatures, federation: Fingerprint) -> Drift:
    """Compare one image with the federation's.

    Args:
        case: its features.
        federation: what the network was trained on.

    Raises:
        ValueError: the fingerprint is of images with another number of channels, or of another release.
    """
    if case.values.keys() != federation.sums.keys() or len(case.layout) != len(federation.layout):
        raise ValueError("the fingerprint has other features: another number of channels, or another release of fedseg")
    threshold = _threshold(len(case.values), federation.cases)
    found = [
        (abs(z) / threshold, _words(name, z > 0))
        for name, value in case.values.items()
        for z in ((value - federation.mean(name)) / max(federation.spread(name), _LEAST_SPREAD),)
    ]
    for correlation in federation.agreement(case.layout):
        if correlation < -STRANGE:
            found.append((math.inf, _REVERSED))
        elif correlation < STRANGE:
            found.append((math.inf, "nothing lies where it usually does: another part of the body, or askew"))
    found.sort(key=lambda item: -item[0])
    unusual = list(dict.fromkeys(words for ratio, words in found if ratio > 1))
    if "noisier" in unusual and _SHARPER in unusual:
        unusual.remove(_SHARPER)
    return Drift(max(ratio for ratio, _ in found), tuple(unusual[:4]))


def site_drift(cases: Sequence[CaseFeatures], federation: Fingerprint) -> SiteDrift:
    """Compare a site's cases with the federation's.

    Args:
        cases: their features.
        federation: what the network is trained on.
    """
    drifts = [drift_of(case, federation) for case in cases]
    unusual = [drift for drift in drifts if drift.alarm]
    counts: dict[str, int] = {}
    for words in (word for drift in unusual for word in drift.words):
        counts[words] = counts.get(words, 0) + 1
    common = sorted((words for words, n in counts.items() if 2 * n > len(unusual)), key=lambda words: -counts[words])
    return SiteDrift(len(cases), len(unusual), _most_by_chance(len(cases)), tuple(common))


def _threshold(features: int, cases: int) -> float:
    """Largest ordinary deviation of any of so many features, in standard deviations that so many cases have told.

    Student's prediction interval: the fewer cases, the less is known of what is ordinary.
    """
    freedom = max(cases - 1, 1)
    return float(stdtrit(freedom, 1 - FALSE_ALARMS / (2 * features))) * math.sqrt(1 + 1 / cases)


def _most_by_chance(cases: int) -> int:
    """Most unusual cases that a site without drift has, with a probability of 1 - `_SITE_CONFIDENCE`."""
    total = 0.0
    for count in range(cases + 1):
        total += math.comb(cases, count) * FALSE_ALARMS**count * (1 - FALSE_ALARMS) ** (cases - count)
        if total >= 1 - _SITE_CONFIDENCE:
            return count
    return cases


def _words(name: str, more: bool) -> str:
    feature, _, _channel = name.partition(" #")
    kind, _, axis = feature.rpartition(" ")
    if axis in AXES:
        return {
            "spacing": f"{'larger' if more else 'smaller'} voxels along {axis}",
            "field of view": f"{'larger' if more else 'smaller'} field of view along {axis}",
            "slope": f"{'rougher' if more else 'blurred'} along {axis}",
        }[kind]
    return {
        "noise": "noisier" if more else "less noise",
        "sharpness": _SHARPER if more else "blurred",
        "gradient 50 %": "more texture" if more else "less texture",
        "gradient 95 %": "stronger edges" if more else "weaker edges",
    }.get(feature, "other intensity shape")
