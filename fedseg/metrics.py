"""How well a segmentation fits its reference: Dice, HD95 and surface Dice per structure, and means of them over sites.

One rule for missing structures, for every metric: if prediction and reference both lack the structure, they agree (Dice
1, HD95 0 mm, surface Dice 1); if only one has it, the structure is missed or invented (Dice 0, HD95 the diagonal of the
volume in mm, surface Dice 0). So every case counts in every mean, and a failure costs a finite amount instead of
vanishing as a NaN.

A surface is the set of a mask's voxels with a neighbour (of six) outside the mask or outside the volume; distances are
between voxel centres, in mm. HD95 is the larger of the two directed 95th percentiles and surface Dice (Nikolov et al.
2018, arXiv:1809.04430) counts surface voxels, both as MONAI defines them by default.

This module needs numpy and scipy only, so that a server without torch can join the sums of its sites.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Slices = tuple[slice, ...]

FAILURE_DICE = 0.5
"""A case has failed if any of its structures has a Dice below this."""


@dataclass(frozen=True)
class LabelScore:
    """One structure in one case."""

    dice: float
    """In [0, 1]."""
    hd95: float
    """Symmetric 95th-percentile Hausdorff distance in mm; NaN if surfaces were not asked for."""
    surface_dice: float
    """Share of both surfaces that lies within the tolerance of the other, in [0, 1]; NaN likewise."""
    volume_predicted: float
    """In mm³."""
    volume_reference: float
    """In mm³."""


def score_case(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    spacing: Sequence[float],
    labels: Mapping[str, int],
    *,
    surface: bool = True,
    tolerance: float = 1.0,
) -> dict[str, LabelScore]:
    """Score every structure of a case.

    Args:
        prediction: label values, `(D, H, W)`, not negative.
        reference: label values of the same shape.
        spacing: voxel size `(D, H, W)` in mm.
        labels: name to value; the background (value 0) is left out.
        surface: compute HD95 and surface Dice too, which takes longer than Dice.
        tolerance: of the surface Dice, in mm.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction and reference must have one shape, got {prediction.shape} and {reference.shape}")
    predicted, wanted = _as_labels(prediction), _as_labels(reference)
    highest = max(*labels.values(), int(predicted.max(initial=0)), int(wanted.max(initial=0)))
    voxels_predicted = np.bincount(predicted.ravel(), minlength=highest + 1)
    voxels_wanted = np.bincount(wanted.ravel(), minlength=highest + 1)
    voxels_shared = np.bincount(wanted[predicted == wanted], minlength=highest + 1)
    boxes = _union_boxes(predicted, wanted, highest) if surface else {}
    diagonal = math.hypot(*(size * step for size, step in zip(predicted.shape, spacing, strict=True)))
    voxel_volume = math.prod(spacing)
    scores = {}
    for name, value in labels.items():
        if value == 0:
            continue
        in_prediction, in_reference = int(voxels_predicted[value]), int(voxels_wanted[value])
        hd95 = surface_dice = math.nan
        if surface and in_prediction and in_reference:
            box = boxes[value]
            hd95, surface_dice = _surface_scores(predicted[box] == value, wanted[box] == value, spacing, tolerance)
        elif surface:
            hd95, surface_dice = (diagonal, 0.0) if in_prediction or in_reference else (0.0, 1.0)
        total = in_prediction + in_reference
        scores[name] = LabelScore(
            dice=2 * int(voxels_shared[value]) / total if total else 1.0,
            hd95=hd95,
            surface_dice=surface_dice,
            volume_predicted=in_prediction * voxel_volume,
            volume_reference=in_reference * voxel_volume,
        )
    return scores


def join_sums(sums: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Add the sums of several sites, key by key; a site that lacks a key counts as 0."""
    joined: dict[str, list[float]] = {}
    for one in sums:
        for key, value in one.items():
            joined.setdefault(key, []).append(value)
    return {key: math.fsum(values) for key, values in sorted(joined.items())}  # fsum: the order of sites is irrelevant


def means_from_sums(sums: Mapping[str, float]) -> dict[str, float]:
    """Turn sums (of one site, or joined over sites) into means over all their cases.

    Args:
        sums: as `Evaluation.sums` makes them: `cases`, `failures`, and `<metric>/<label>/sum` with `.../count`.

    Returns:
        `cases`; `failure_rate`; each `<metric>/<label>`; and each `<metric>`, unweighted over cases and labels. Means
        of nothing are left out.
    """
    means = {"cases": sums.get("cases", 0.0)}
    if means["cases"] and "failures" in sums:
        means["failure_rate"] = sums["failures"] / means["cases"]
    totals: dict[str, list[tuple[float, float]]] = {}
    for key in sorted(key for key in sums if key.endswith("/count")):
        stem = key.removesuffix("/count")
        total, count = sums[f"{stem}/sum"], sums[key]
        if count:
            means[stem] = total / count
            totals.setdefault(stem.partition("/")[0], []).append((total, count))
    for metric, parts in totals.items():
        means[metric] = math.fsum(total for total, _ in parts) / math.fsum(count for _, count in parts)
    return means


def bootstrap_ci(
    values: Mapping[str, Sequence[float]], *, n: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Confidence interval of a mean over cases, by drawing persons with replacement (percentile bootstrap).

    A person's cases are drawn together, since two volumes of one person are not two pieces of evidence. For paired
    comparisons, pass differences.

    Args:
        values: the values of each person's cases.
        n: number of draws.
        seed: the same one gives the same interval.
        level: coverage, in (0, 1).

    Raises:
        ValueError: there is no person, or one without values.
    """
    if not values or any(len(of_person) == 0 for of_person in values.values()):
        raise ValueError(f"every person needs at least one value, got {len(values)} persons")
    sums = np.array([math.fsum(values[person]) for person in sorted(values)])
    counts = np.array([len(values[person]) for person in sorted(values)])
    drawn = np.random.default_rng(seed).integers(0, len(sums), size=(n, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _as_labels(array: NDArray[Any]) -> NDArray[Any]:
    return array if np.issubdtype(array.dtype, np.integer) else array.astype(np.int64)


def _union_boxes(predicted: NDArray[Any], wanted: NDArray[Any], highest: int) -> dict[int, Slices]:
    """For each label in both arrays, the smallest box that holds it in either."""
    from scipy import ndimage

    pairs = zip(
        ndimage.find_objects(predicted, max_label=highest), ndimage.find_objects(wanted, max_label=highest), strict=True
    )
    return {
        value: tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
        for value, (one, other) in enumerate(pairs, start=1)
        if one is not None and other is not None
    }


def _surface_scores(
    predicted: NDArray[np.bool_], wanted: NDArray[np.bool_], spacing: Sequence[float], tolerance: float
) -> tuple[float, float]:
    """HD95 in mm and surface Dice of two masks that are not empty, cropped to their common box."""
    from scipy.spatial import KDTree

    # trees of surface points: their cost grows with the surface, that of a distance transform with the box
    here, there = _surface_points(predicted, spacing), _surface_points(wanted, spacing)
    to_reference, _ = KDTree(there, leafsize=32).query(here)
    to_prediction, _ = KDTree(here, leafsize=32).query(there)
    hd95 = max(np.quantile(to_reference, 0.95), np.quantile(to_prediction, 0.95))
    reach = tolerance * (1 + 1e-6)  # a distance of exactly the tolerance counts, however it was rounded
    near = np.count_nonzero(to_reference <= reach) + np.count_nonzero(to_prediction <= reach)
    return float(hd95), float(near / (len(here) + len(there)))


def _surface_points(mask: NDArray[np.bool_], spacing: Sequence[float]) -> NDArray[np.float64]:
    from scipy import ndimage

    return np.argwhere(mask & ~ndimage.binary_erosion(mask)).astype(np.float64) * np.asarray(spacing, dtype=np.float64)
