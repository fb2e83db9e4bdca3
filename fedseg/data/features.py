"""What can be said of an image without its label: a few numbers that tell scanners and protocols apart.

All are taken from the prepared image, as the network sees it. Quantiles take the place of histograms: they say the same of the
shape of intensities with fewer numbers, and their spread from case to case is a number too.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedseg.config import DataConfig, TaskConfig
from fedseg.data.cohort import Cohort
from fedseg.data.preprocess import PreparedCase, PreparedCohort, negated, prepare_cohort
from fedseg.data.shift.profiles import Shift
from fedseg.federated.fingerprint import AXES, GRID, PERCENTAGES, CaseFeatures, Fingerprint, Signs, polarity

MIDDLE = 0.6
"""Share of each side of the volume where the layout is taken: there is hardly any air, which is dark in every contrast."""
_LEAST = 1e-3
"""Of what a logarithm is taken."""


def describe(case: PreparedCase) -> CaseFeatures:
    """The features of one case; they stay at home, sums over cases may leave.

    Args:
        case: with at least one voxel.
    """
    values = {f"spacing {axis}": _log(mm) for axis, mm in zip(AXES, case.spacing, strict=True)}
    lengths = (n * mm for n, mm in zip(case.image.shape[1:], case.spacing, strict=True))
    values |= {f"field of view {axis}": _log(mm) for axis, mm in zip(AXES, lengths, strict=True)}
    for number, channel in enumerate(case.image):
        values |= {f"{name} #{number}": value for name, value in _of_channel(channel).items()}
    return CaseFeatures(values, layout_of(case.image))


def prepare_aligned(
    cohort: Cohort,
    task: TaskConfig,
    config: DataConfig,
    cache: Path,
    fingerprint: Fingerprint,
    *,
    shift: Shift | None = None,
    progress: bool = False,
) -> PreparedCohort:
    """Prepare cases for a network: like `prepare_cohort`, and negated if the network wants that and all together are reversed.

    Args:
        cohort: the cases.
        task: labels, channels and modality.
        config: orientation, spacing, crop, intensities, polarity.
        cache: folder for prepared arrays.
        fingerprint: of the federation that trained the network.
        shift: a simulated hospital's scanner and annotator.
        progress: show a bar.

    Raises:
        DataError: the cache cannot be written.
    """
    prepared = prepare_cohort(cohort, task, config, cache, shift=shift, progress=progress)
    if config.polarity == "as-is" or not fingerprint or not prepared.cases:
        return prepared
    signs = polarity((layout_of(case.image) for case in prepared.cases), fingerprint)
    return prepared if min(signs) > 0 else prepare_cohort(cohort, task, config, cache, shift=shift, signs=signs)


def align_all(cases: Sequence[PreparedCase], config: DataConfig, fingerprint: Fingerprint) -> Iterator[PreparedCase]:
    """The images of one site as a network wants them: all negated or none, one after the other so that memory is for one."""
    signs: Signs = ()
    if config.polarity == "aligned" and fingerprint and cases:
        signs = polarity((layout_of(case.image) for case in cases), fingerprint)
    return (replace(case, image=negated(case.image, signs)) for case in cases)


def align(case: PreparedCase, config: DataConfig, fingerprint: Fingerprint) -> PreparedCase:
    """One image as a network wants it: negated, if the network wants that and it is reversed."""
    if config.polarity == "as-is" or not fingerprint:
        return case
    return replace(case, image=negated(case.image, polarity([layout_of(case.image)], fingerprint)))


def layout_of(image_CDHW: NDArray[np.float32]) -> tuple[float, ...]:
    """The layouts of all channels, one after the other."""
    return tuple(float(value) for channel in image_CDHW for value in layout(channel))


def layout(image_DHW: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean intensities of `GRID`³ blocks in the middle of the volume, `(GRID ** 3,)`: where it is bright, where dark.

    A negated image has the negated layout, exactly.
    """
    found = np.asarray(image_DHW, dtype=np.float64)
    for axis, length in enumerate(image_DHW.shape):
        margin = (1 - MIDDLE) * length / 2
        edges = np.rint(np.linspace(margin, length - margin, GRID + 1)).astype(int)
        blocks = [
            found.take(range(min(low, length - 1), max(high, low + 1)), axis, mode="clip").mean(axis)
            for low, high in itertools.pairwise(edges)
        ]
        found = np.stack(blocks, axis)
    return found.ravel()


def _of_channel(image_DHW: NDArray[np.float32]) -> dict[str, float]:
    image = np.asarray(image_DHW, dtype=np.float32)
    slopes = [
        _log(float(np.abs(np.diff(image, axis=axis)).mean())) if image.shape[axis] > 1 else 0.0 for axis in range(3)
    ]
    mean = sum(slopes) / 3
    values = {f"intensity {q} %": float(v) for q, v in zip(PERCENTAGES, np.percentile(image, PERCENTAGES), strict=True)}
    values |= {f"slope {axis}": slope - mean for axis, slope in zip(AXES, slopes, strict=True)}
    smooth = ndimage.gaussian_filter(image, 1.0)
    fine = image - smooth
    gradient = ndimage.gaussian_gradient_magnitude(image, 1.0)
    # the median of what a slight blur removes is noise, for edges are few; its tail is edges
    noise = float(np.median(np.abs(fine))) / 0.6745
    values["noise"] = _log(noise)
    values["gradient 50 %"], values["gradient 95 %"] = (_log(float(v)) for v in np.percentile(gradient, (50, 95)))
    values["sharpness"] = _log(float(fine.std())) - _log(float((smooth - ndimage.gaussian_filter(image, 2.0)).std()))
    return values


def _log(value: float) -> float:
    return float(np.log(max(value, _LEAST)))
