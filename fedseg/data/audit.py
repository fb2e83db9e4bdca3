"""The admission test of a site's data: what is wrong with which case, and what the cohort looks like.

Errors are what `prepare_cohort` would quarantine; warnings are for a person to look at. The fingerprint (shapes, spacings,
intensities, volumes of structures) shows at a glance whether a cohort is what the study means.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from fedseg.config import TaskConfig
from fedseg.data.cohort import Case, Cohort
from fedseg.data.preprocess import require_known_labels
from fedseg.data.progress import shown
from fedseg.data.reasons import Reason
from fedseg.data.volume import Volume, read_image, read_label, require_same_grid
from fedseg.errors import CaseError

WARNINGS = {
    "duplicate-image": "the same image stands under two names",
    "duplicate-person": "the same image stands under two persons: a split could put one person on both sides",
    "no-orientation": "the header does not say how the patient lies (qform and sform code 0); left and right are a guess",
    "sheared": "the voxel axes are not at right angles",
    "not-hounsfield": "the values of a CT image do not look like Hounsfield units",
    "absent-structure": "a structure of the task is not in the label",
    "unusual-volume": "a structure is ten times larger or smaller than in the other cases",
}
"""Codes of what a person should look at, with one line each."""


@dataclass(frozen=True)
class Finding:
    """One remark on one case."""

    case: str
    severity: Literal["error", "warning"]
    reason: str
    """A `Reason` for errors, a key of `WARNINGS` for warnings."""
    detail: str
    """The full story; may name files."""


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest value over the cases."""

    minimum: float
    median: float
    maximum: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Of at least one value."""
        low, middle, high = np.quantile(np.array(list(values), dtype=np.float64), [0, 0.5, 1])
        return cls(float(low), float(middle), float(high))


@dataclass(frozen=True)
class Fingerprint:
    """What the readable cases of a cohort look like."""

    cases: int
    persons: int
    shape: tuple[Spread, ...] = ()
    """Voxels along D, H, W."""
    spacing: tuple[Spread, ...] = ()
    """mm along D, H, W."""
    orientations: dict[str, int] = field(default_factory=dict)
    """Number of cases by axis codes of the file."""
    dtypes: dict[str, int] = field(default_factory=dict)
    """Number of cases by type of the stored values."""
    intensity: dict[str, Spread] = field(default_factory=dict)
    """Percentiles 0.5, 50 and 99.5 of each case."""
    volumes: dict[str, Spread] = field(default_factory=dict)
    """mm³ of each structure, in the cases that have it."""
    present: dict[str, int] = field(default_factory=dict)
    """Number of cases that have the structure."""


@dataclass(frozen=True)
class Audit:
    """The result of an audit."""

    findings: tuple[Finding, ...]
    """Sorted by case; errors before warnings."""
    fingerprint: Fingerprint
    total_cases: int

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that keep a case out of training."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that a person should look at."""
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    def to_json(self) -> str:
        """The whole audit as a JSON document. It names cases: it is for the hospital, not for the coordinator."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)


@dataclass(frozen=True)
class _Facts:
    """What one case told."""

    case: Case
    findings: tuple[Finding, ...]
    content: str = ""
    orientation: str = ""
    dtype: str = ""
    shape: tuple[int, int, int] = (0, 0, 0)
    spacing: tuple[float, float, float] = (0.0, 0.0, 0.0)
    intensity: tuple[float, float, float] = (0.0, 0.0, 0.0)
    volumes: dict[int, float] = field(default_factory=dict)


def audit_cohort(cohort: Cohort, task: TaskConfig | None = None, *, progress: bool = True, workers: int = 1) -> Audit:
    """Open and check every case.

    Args:
        cohort: the cases.
        task: labels, channels and modality to check against; absent: the cohort's own label names, if it has them.
        progress: show a bar.
        workers: threads that read files.
    """
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        found = pool.map(lambda case: _examine(case, cohort, task), cohort.cases)
        facts = list(shown(found, "Checking cases", total=len(cohort.cases), progress=progress))
    names = _structures(cohort, task)
    findings = [finding for fact in facts for finding in fact.findings]
    findings += [*_duplicates(facts), *_unusual_volumes(facts, names)]
    findings.sort(key=lambda finding: (finding.case, finding.severity, finding.reason))
    return Audit(tuple(findings), _fingerprint(facts, names, len(cohort.persons())), len(cohort.cases))


def _examine(case: Case, cohort: Cohort, task: TaskConfig | None) -> _Facts:
    """Stop at the first error of a case; collect its warnings."""
    try:
        volume = read_image(case.images)
        if task is not None and len(volume.array) != len(task.channels):
            told = f"{len(volume.array)} channels, the task has {len(task.channels)}: {list(task.channels)}"
            raise CaseError(Reason.WRONG_CHANNELS, f"{case.images[0]}: {told}")
        label = read_label(case.label)
        require_same_grid(volume.geometry, label.geometry, f"{case.name}: image and label")
        values, counts = np.unique(label.array, return_counts=True)
        _require_labels(values, cohort, task, case.name)
    except CaseError as error:
        return _Facts(case, (Finding(case.name, "error", str(error.reason), str(error)),))
    header: Any = nib.load(case.images[0])
    voxel = float(np.prod(volume.spacing))
    low, middle, high = (float(value) for value in np.quantile(volume.array[0], [0.005, 0.5, 0.995]))
    return _Facts(
        case=case,
        findings=tuple(_warnings(case, volume, values, header, cohort, task)),
        content=hashlib.sha256(repr(volume.array.shape).encode() + volume.array.tobytes()).hexdigest(),
        orientation="".join(nib.orientations.aff2axcodes(np.array(volume.geometry.affine))),
        dtype=str(header.get_data_dtype()),
        shape=volume.geometry.array_shape,
        spacing=volume.spacing,
        intensity=(low, middle, high),
        volumes={int(v): float(n) * voxel for v, n in zip(values, counts, strict=True) if v},
    )


def _require_labels(values: NDArray[Any], cohort: Cohort, task: TaskConfig | None, where: str) -> None:
    labels = task.labels if task else cohort.labels or {f"label {value}": value for value in {0, *values.tolist()}}
    require_known_labels(values, labels, where)


def _warnings(
    case: Case, volume: Volume, values: NDArray[Any], header: Any, cohort: Cohort, task: TaskConfig | None
) -> Iterator[Finding]:
    def warn(reason: str, detail: str) -> Finding:
        return Finding(case.name, "warning", reason, detail)

    codes = [int(header.header.get(key, 1)) for key in ("qform_code", "sform_code")]
    if not any(codes):
        yield warn("no-orientation", f"{case.images[0]}: qform and sform code are 0")
    axes = np.array(volume.geometry.affine)[:3, :3]
    axes = axes / np.linalg.norm(axes, axis=0)
    cosine = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if cosine > 0.01:
        yield warn("sheared", f"{case.images[0]}: two axes meet at {np.degrees(np.arccos(cosine)):.0f} degrees")
    lowest, highest = float(volume.array.min()), float(volume.array.max())
    if task is not None and task.modality == "ct" and (lowest >= -150 or lowest < -10000 or highest > 40000):
        yield warn("not-hounsfield", f"{case.images[0]}: values run from {lowest:g} to {highest:g}, air is about -1000")
    absent = [name for value, name in _structures(cohort, task).items() if value not in values]
    if absent:
        yield warn("absent-structure", f"{case.label}: has no {', '.join(absent)}")


def _duplicates(facts: Sequence[_Facts]) -> Iterator[Finding]:
    first: dict[str, Case] = {}
    for fact in facts:
        if not fact.content:
            continue
        other = first.setdefault(fact.content, fact.case)
        if other is not fact.case:
            reason = "duplicate-image" if other.person == fact.case.person else "duplicate-person"
            yield Finding(fact.case.name, "warning", reason, f"the same voxels as case {other.name}")


def _unusual_volumes(facts: Sequence[_Facts], names: dict[int, str]) -> Iterator[Finding]:
    for value, name in names.items():
        having = [fact for fact in facts if value in fact.volumes]
        if len(having) < 3:
            continue
        usual = float(np.median([fact.volumes[value] for fact in having]))
        for fact in having:
            if not usual / 10 <= fact.volumes[value] <= usual * 10:
                detail = f"{name}: {fact.volumes[value]:.4g} mm³, the median is {usual:.4g} mm³"
                yield Finding(fact.case.name, "warning", "unusual-volume", detail)


def _structures(cohort: Cohort, task: TaskConfig | None) -> dict[int, str]:
    """Names of the foreground labels by value."""
    labels = task.labels if task else cohort.labels or {}
    return {value: name for name, value in sorted(labels.items(), key=lambda item: item[1]) if value}


def _fingerprint(facts: Sequence[_Facts], names: dict[int, str], persons: int) -> Fingerprint:
    good = [fact for fact in facts if fact.content]
    if not good:
        return Fingerprint(cases=0, persons=persons)
    values = sorted({value for fact in good for value in fact.volumes})
    named = {names.get(value, f"label {value}"): value for value in values}
    return Fingerprint(
        cases=len(good),
        persons=persons,
        shape=tuple(Spread.of(fact.shape[axis] for fact in good) for axis in range(3)),
        spacing=tuple(Spread.of(fact.spacing[axis] for fact in good) for axis in range(3)),
        orientations=dict(Counter(fact.orientation for fact in good)),
        dtypes=dict(Counter(fact.dtype for fact in good)),
        intensity={
            name: Spread.of(fact.intensity[number] for fact in good)
            for number, name in enumerate(("0.5", "50", "99.5"))
        },
        volumes={
            name: Spread.of(fact.volumes[value] for fact in good if value in fact.volumes)
            for name, value in named.items()
        },
        present={name: sum(value in fact.volumes for fact in good) for name, value in named.items()},
    )
