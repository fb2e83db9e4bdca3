"""Files to network input: one orientation, one spacing, comparable intensities; and labels back to the original grid.

The order is that of nnU-Net (Isensee et al., Nature Methods 2021): turn, crop, normalise, resample. A case that cannot
be used is quarantined with a reason and the site goes on with the others.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.config import DataConfig, TaskConfig
from fedseg.data.cache import Cache, Entry
from fedseg.data.cohort import Case, Cohort
from fedseg.data.progress import shown
from fedseg.data.reasons import Reason
from fedseg.data.resample import resample_image, resample_label, resample_probabilities, resampled_shape, zoom
from fedseg.data.shift.cases import shifted
from fedseg.data.shift.profiles import Shift
from fedseg.data.volume import Geometry, Shape3D, Spacing, Volume, read_image, read_label, require_same_grid
from fedseg.errors import CaseError, SiteAbstained

FORMAT = 2
"""Raised whenever the same files and settings would give other arrays; old cache entries are then left alone."""

FOREGROUND_SAMPLE = 2000
"""Voxels per structure that are kept as possible patch centres."""

LARGEST_IMAGE = 2**31
"""Values of one prepared image, 8 GiB: the study chooses the spacing, the hospital has the memory."""

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedGeometry:
    """How a prepared array lies in its file: enough to put a segmentation back."""

    source: Geometry
    """Of the file."""
    box: Box
    """What was cropped out of the turned array: first and one past the last voxel along D, H, W."""
    shape: Shape3D
    """Voxels after preparation, `(D, H, W)`."""

    @property
    def cropped_shape(self) -> Shape3D:
        """Voxels after cropping, before resampling, `(D, H, W)`."""
        (d0, d1), (h0, h1), (w0, w1) = self.box
        return (d1 - d0, h1 - h0, w1 - w0)

    @property
    def spacing(self) -> Spacing:
        """Voxel spacing after preparation in mm, `(D, H, W)`; the field of view is kept, so it may differ a little."""
        depth, height, width = (
            mm * old / new for mm, old, new in zip(self.source.spacing, self.cropped_shape, self.shape, strict=True)
        )
        return (depth, height, width)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        source = {"shape": self.source.shape, "affine": self.source.affine, "orientation": self.source.orientation}
        return {"source": source, "box": self.box, "shape": self.shape}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PreparedGeometry":
        """The inverse of `to_dict`."""
        source = values["source"]
        geometry = Geometry.of(source["shape"], source["affine"], str(source["orientation"]))
        (d0, d1), (h0, h1), (w0, w1) = values["box"]
        depth, height, width = (int(n) for n in values["shape"])
        return cls(geometry, ((d0, d1), (h0, h1), (w0, w1)), (depth, height, width))


@dataclass(frozen=True)
class PreparedCase:
    """A case as the network sees it."""

    name: str
    person: str
    image: NDArray[np.float32]
    """Normalised intensities `(C, D, H, W)`; read-only and memory-mapped where it comes from a cache."""
    label: NDArray[np.uint8] | None
    """Label values `(D, H, W)`, or None for an image that is to be segmented."""
    spacing: Spacing
    """Voxel spacing in mm, `(D, H, W)`, after preparation."""
    geometry: PreparedGeometry
    foreground: dict[int, NDArray[np.int32]]
    """Voxels `(n, 3)` of each structure that is present, as `(d, h, w)`: where patches may be centred."""


@dataclass(frozen=True)
class PreparedCohort:
    """What a site has to train or to evaluate with."""

    cases: tuple[PreparedCase, ...]
    quarantined: dict[str, str]
    """Reason code of each case that cannot be used, by case name."""


def prepare_case(case: Case, task: TaskConfig, config: DataConfig, shift: Shift | None = None) -> PreparedCase:
    """Read, check and prepare one labelled case.

    Args:
        case: the files.
        task: labels, channels and modality.
        config: orientation, spacing, crop and intensities.
        shift: a simulated hospital's scanner and annotator, which come between reading and preparation.

    Raises:
        CaseError: the case cannot be used, with a `Reason`.
    """
    volume = _read_channels(case.images, task, config)
    label = read_label(case.label, config.orientation)
    require_same_grid(volume.geometry, label.geometry, f"{case.name}: image and label")
    if shift is not None:
        volume, label = shifted(volume, label, shift, case.name)
    require_known_labels(np.unique(label.array), task.labels, case.name)
    image, geometry = _prepare(volume, config)
    prepared = resample_label(_crop(label.array, geometry.box).astype(np.uint8), geometry.shape)
    foreground = _sample_foreground(prepared)
    if not foreground:
        raise CaseError(Reason.EMPTY_LABEL, f"{case.name}: no structure is left at a spacing of {geometry.spacing} mm")
    return PreparedCase(case.name, case.person, image, prepared, geometry.spacing, geometry, foreground)


def prepare_image(images: tuple[Path, ...], task: TaskConfig, config: DataConfig) -> PreparedCase:
    """Read and prepare an unlabelled image, to be segmented.

    Args:
        images: one file per channel, or one file that holds all channels.
        task: tells the channels and the intensity scheme.
        config: tells orientation, spacing, crop and intensity window.

    Raises:
        CaseError: the image cannot be used, with a `Reason`.
    """
    image, geometry = _prepare(_read_channels(images, task, config), config)
    return PreparedCase(images[0].name, images[0].name, image, None, geometry.spacing, geometry, {})


def restore(prepared: NDArray[Any], geometry: PreparedGeometry) -> NDArray[np.uint8]:
    """A result on the prepared grid as label values on the file's grid, ready for `write_label`.

    Args:
        prepared: label values `(D, H, W)`, resampled by nearest neighbour, or class scores `(K, D, H, W)`, resampled
            linearly before the largest is taken.
        geometry: of the prepared image.

    Returns:
        Label values `(D, H, W)` in the orientation of `geometry.source`; background outside the crop.
    """
    if prepared.shape[-3:] != geometry.shape:
        raise ValueError(f"got an array of {prepared.shape}, the prepared image has {geometry.shape} voxels")
    if prepared.ndim == 4:
        inside = resample_probabilities(prepared, geometry.cropped_shape)
    else:
        inside = zoom(prepared.astype(np.uint8), geometry.cropped_shape, order=0)
    result = np.zeros(geometry.source.array_shape, dtype=np.uint8)
    (d0, d1), (h0, h1), (w0, w1) = geometry.box
    result[d0:d1, h0:h1, w0:w1] = inside
    return result


def prepare_cohort(
    cohort: Cohort,
    task: TaskConfig,
    config: DataConfig,
    cache: Path,
    *,
    shift: Shift | None = None,
    signs: tuple[int, ...] = (),
    progress: bool = False,
    on_case: Callable[[int], None] = lambda _: None,
) -> PreparedCohort:
    """Prepare all cases of a site, from the cache where it has them.

    Args:
        cohort: the cases.
        task: labels, channels and modality.
        config: orientation, spacing, crop and intensities.
        cache: folder for prepared arrays; may be shared by processes and by experiments.
        shift: a simulated hospital's scanner and annotator.
        signs: -1 for each channel of which the prepared intensities are negated; empty: none.
        progress: show a bar.
        on_case: called before each case with the number of cases so far (0, 1, ...); what it raises ends the work.

    Raises:
        DataError: the cache cannot be written. A bad case raises nothing; it is quarantined.
    """
    store = Cache(cache)
    cases: list[PreparedCase] = []
    quarantined: dict[str, str] = {}
    for done, case in enumerate(shown(cohort.cases, "Preparing cases", progress=progress)):
        on_case(done)
        try:
            cases.append(_load_or_prepare(case, task, config, store, shift, signs))
        except CaseError as error:
            _log.warning("quarantined %s (%s): %s", case.name, error.reason, error)
            quarantined[case.name] = str(error.reason)
    return PreparedCohort(tuple(cases), quarantined)


def require_enough(prepared: PreparedCohort, total_cases: int, config: DataConfig) -> None:
    """Check that a site has enough usable cases to take part.

    Args:
        prepared: the cases to train on.
        total_cases: cases that the site listed for this purpose, usable or not.
        config: the limits.

    Raises:
        SiteAbstained: `too-few-cases` or `too-many-quarantined`.
    """
    usable, lost = len(prepared.cases), len(prepared.quarantined)
    if usable < config.min_cases:
        raise SiteAbstained("too-few-cases", f"{usable} usable cases of {total_cases}, need {config.min_cases}")
    if total_cases - lost < config.min_usable_share * total_cases:
        raise SiteAbstained(
            "too-many-quarantined",
            f"{lost} of {total_cases} cases are quarantined, a share of {config.min_usable_share:g} must be usable",
        )


def require_known_labels(values: NDArray[Any], labels: Mapping[str, int], where: str) -> None:
    """Check a segmentation's distinct values against the label names that are expected.

    Raises:
        CaseError: a value without a name, or background only.
    """
    unknown = sorted(set(values.tolist()) - set(labels.values()))
    if unknown:
        raise CaseError(Reason.UNKNOWN_LABEL, f"{where}: label values {unknown}, known are {dict(labels)}")
    if not any(values):
        raise CaseError(Reason.EMPTY_LABEL, f"{where}: the label is background only")


def normalise(image_CDHW: NDArray[np.float32], config: DataConfig) -> NDArray[np.float32]:
    """Bring intensities to one scale: a CT window to [-1, 1], or clip and z-score each channel of an MR image.

    The statistics of MR are those of the non-zero voxels, so that an empty or masked surrounding does not count.
    """
    if config.window is not None:
        low, high = config.window
        return np.asarray((np.clip(image_CDHW, low, high) - low) * (2 / (high - low)) - 1, dtype=np.float32)
    return np.stack([_standardise(channel, config.percentiles) for channel in image_CDHW])


def negated(image_CDHW: NDArray[np.float32], signs: tuple[int, ...]) -> NDArray[np.float32]:
    """The image with the channels negated of which the sign is -1; without any, the very same."""
    if min(signs, default=1) > 0:
        return image_CDHW
    return np.asarray(image_CDHW * np.array(signs, dtype=np.float32)[:, None, None, None], dtype=np.float32)


def _standardise(channel: NDArray[np.float32], percentiles: tuple[float, float]) -> NDArray[np.float32]:
    inside = channel[channel != 0]
    low, high = np.quantile(inside, percentiles)
    clipped = np.clip(inside, low, high)
    mean, spread = float(clipped.mean(dtype=np.float64)), float(clipped.std(dtype=np.float64))
    return np.asarray((np.clip(channel, low, high) - mean) / max(spread, 1e-8 * abs(mean), 1e-30), dtype=np.float32)


def _read_channels(images: tuple[Path, ...], task: TaskConfig, config: DataConfig) -> Volume:
    volume = read_image(images, config.orientation)
    if len(volume.array) != len(task.channels):
        raise CaseError(
            Reason.WRONG_CHANNELS,
            f"{images[0]}: {len(volume.array)} channels, the task has {len(task.channels)}: {list(task.channels)}",
        )
    return volume


def _prepare(volume: Volume, config: DataConfig) -> tuple[NDArray[np.float32], PreparedGeometry]:
    box = _nonzero_box(volume.array) if config.crop == "nonzero" else _whole(volume.array)
    cropped = np.stack([_crop(channel, box) for channel in volume.array])
    depth, height, width = cropped.shape[1:]
    shape = (depth, height, width)
    # Before resampling: splines ring, and an empty surrounding would no longer be zero.
    image = normalise(cropped, config)
    if config.spacing is not None:
        shape = resampled_shape(shape, volume.spacing, config.spacing)
        if math.prod(shape) * len(image) > LARGEST_IMAGE:
            raise CaseError(
                Reason.ABSURD_SPACING,
                f"at data.spacing = {config.spacing} it would have {math.prod(shape):.3g} voxels; use a larger spacing",
            )
        image = resample_image(image, shape, volume.spacing)
    return image, PreparedGeometry(volume.geometry, box, shape)


def _whole(image_CDHW: NDArray[Any]) -> Box:
    depth, height, width = image_CDHW.shape[1:]
    return ((0, depth), (0, height), (0, width))


def _nonzero_box(image_CDHW: NDArray[Any]) -> Box:
    filled = (image_CDHW != 0).any(axis=0)
    ends = []
    for axis in range(3):
        along = np.flatnonzero(filled.any(axis=tuple(other for other in range(3) if other != axis)))
        ends.append((int(along[0]), int(along[-1]) + 1))
    return (ends[0], ends[1], ends[2])


def _crop(array_DHW: NDArray[Any], box: Box) -> NDArray[Any]:
    (d0, d1), (h0, h1), (w0, w1) = box
    return array_DHW[d0:d1, h0:h1, w0:w1]


def _sample_foreground(label_DHW: NDArray[np.uint8]) -> dict[int, NDArray[np.int32]]:
    """The same voxels every time: evenly spread over each structure."""
    sample = {}
    for value in np.unique(label_DHW[label_DHW > 0]):
        voxels = np.argwhere(label_DHW == value)
        step = np.linspace(0, len(voxels) - 1, min(len(voxels), FOREGROUND_SAMPLE)).astype(np.int64)
        sample[int(value)] = voxels[step].astype(np.int32)
    return sample


def _load_or_prepare(
    case: Case, task: TaskConfig, config: DataConfig, store: Cache, shift: Shift | None, signs: tuple[int, ...]
) -> PreparedCase:
    key = _key(case, task, config, store, shift, signs)
    entry = store.load(key)
    if entry is None:
        fresh = prepare_case(case, task, config, shift)
        assert fresh.label is not None
        points = [np.insert(voxels, 0, value, axis=1) for value, voxels in fresh.foreground.items()]
        arrays: dict[str, NDArray[Any]] = {
            "image": negated(fresh.image, signs),
            "label": fresh.label,
            "foreground": np.concatenate(points),
        }
        store.save(key, arrays, fresh.geometry.to_dict())
        entry = store.open(key) or Entry(arrays, fresh.geometry.to_dict())
    points_D4 = np.asarray(entry.arrays["foreground"])
    foreground = {int(v): points_D4[points_D4[:, 0] == v, 1:] for v in np.unique(points_D4[:, 0])}
    geometry = PreparedGeometry.from_dict(entry.about)
    return PreparedCase(
        case.name, case.person, entry.arrays["image"], entry.arrays["label"], geometry.spacing, geometry, foreground
    )


def _key(
    case: Case, task: TaskConfig, config: DataConfig, store: Cache, shift: Shift | None, signs: tuple[int, ...]
) -> str:
    """Hash of the files' content and of the settings that decide what becomes of them."""
    if case.label is None:
        raise CaseError(Reason.MISSING_LABEL, f"{case.name}: the case has no label file")
    if not case.images:
        raise CaseError(Reason.MISSING_IMAGE, f"{case.name}: the case has no image file")
    settings = config.model_dump(mode="json", include={"orientation", "spacing", "crop", "percentiles", "window"})
    settings |= {"format": FORMAT, "values": sorted(task.labels.values()), "channels": len(task.channels)}
    if shift is not None:  # which depends on the case's name
        settings |= {"shift": shift.recipe(), "case": case.name}
    if min(signs, default=1) < 0:
        settings |= {"signs": list(signs)}
    parts = [json.dumps(settings, sort_keys=True)]
    for path in (*case.images, case.label):
        missing = Reason.MISSING_LABEL if path is case.label else Reason.MISSING_IMAGE
        try:
            if not path.is_file():
                raise CaseError(missing, f"{path}: no such file")
            parts.append(store.digest(path))
        except OSError as error:
            raise CaseError(Reason.UNREADABLE, f"{path}: {error}") from error
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
