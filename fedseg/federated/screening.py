"""What the server refuses before an update can touch the global model."""

import math
import statistics
from collections.abc import Collection, Sequence

import numpy as np

from fedseg.config import ScreeningConfig
from fedseg.errors import UpdateRefused
from fedseg.federated.fingerprint import LAYOUT, Fingerprint
from fedseg.federated.messages import SiteUpdate
from fedseg.federated.weights import Weights, norm

MAX_CASES = 1_000_000


def screen(
    update: SiteUpdate,
    server_round: int,
    weights: Weights,
    norms: Sequence[float],
    config: ScreeningConfig,
    buffers: Collection[str] = (),
) -> float:
    """Check one update against the exchanged weights that it started from.

    Args:
        update: what the site sent.
        server_round: the round that is being run.
        weights: the exchanged global weights; names, shapes and dtypes of the delta must be theirs.
        norms: L2 norms of recently accepted updates, of earlier rounds only, so that the order of answers does not matter.
        config: the limits.
        buffers: names of tensors that are no parameters. They must be finite, but do not count in the norm: running variances
            move by thousands in ordinary training, and would hide what the parameters do.

    Returns:
        The L2 norm of the update's parameters.

    Raises:
        UpdateRefused: with reason `stale`, `no-cases`, `wrong-names`, `wrong-dtype`, `wrong-shape`, `non-finite`,
            `wrong-metrics` or `absurd-norm`.
    """
    screen_scores(update, server_round)
    if not 0 < update.num_cases <= MAX_CASES:
        raise _refusal(update, "no-cases", f"num_cases must be in 1..{MAX_CASES}, got {update.num_cases}")
    if update.delta.keys() != weights.keys():
        missing, unknown = sorted(weights.keys() - update.delta.keys()), sorted(update.delta.keys() - weights.keys())
        raise _refusal(update, "wrong-names", f"missing {missing[:3]}, unknown {unknown[:3]}")
    for name, array in weights.items():
        delta = update.delta[name]
        if delta.dtype != np.float32:
            raise _refusal(update, "wrong-dtype", f"{name} must be float32, got {delta.dtype}")
        if delta.shape != array.shape:
            raise _refusal(update, "wrong-shape", f"{name} must have shape {array.shape}, got {delta.shape}")
    if not math.isfinite(norm(update.delta)):
        raise _refusal(update, "non-finite", "it holds NaN or infinite values")
    size = norm({name: array for name, array in update.delta.items() if name not in buffers})
    limit = config.max_norm if config.max_norm is not None else math.inf
    usual = statistics.median(norms) if norms else 0.0
    if usual > 0:  # sites that all stood still say nothing about what is absurd
        limit = min(limit, config.max_norm_ratio * usual)
    if size > limit:
        raise _refusal(update, "absurd-norm", f"its norm {size:.4g} exceeds {limit:.4g}")
    return size


def screen_scores(update: SiteUpdate, server_round: int) -> None:
    """Check what an update says beside its tensors; all that there is to check if the site only scored.

    Args:
        update: what the site sent.
        server_round: the round that was asked for.

    Raises:
        UpdateRefused: with reason `stale`, `non-finite` or `wrong-metrics`.
    """
    if update.server_round != server_round:
        raise _refusal(update, "stale", f"round {server_round} is being run")
    if not all(math.isfinite(value) for value in (*update.sums.values(), *update.training.values())):
        raise _refusal(update, "non-finite", "a metric is NaN or infinite")
    for key in update.sums:
        stem, _, kind = key.rpartition("/")
        other = {"sum": "count", "count": "sum"}.get(kind)
        if other and f"{stem}/{other}" not in update.sums:
            raise _refusal(update, "wrong-metrics", f"{key} has no {other}")


def screen_fingerprint(update: SiteUpdate, server_round: int, channels: int) -> None:
    """Check the answer to a request for a fingerprint; an empty one, which the site's policy keeps, is in order.

    Args:
        update: what the site sent.
        server_round: the round that was asked for.
        channels: of an image.

    Raises:
        UpdateRefused: with reason `stale`, `no-cases` or `wrong-fingerprint`.
    """
    screen_scores(update, server_round)
    found = update.fingerprint
    try:
        Fingerprint.from_dict(found.to_dict())
    except ValueError as error:
        raise _refusal(update, "wrong-fingerprint", str(error)) from None
    if found and len(found.layout) != LAYOUT * channels:
        raise _refusal(update, "wrong-fingerprint", f"its layout is not that of {channels} channels")
    if found.cases > min(update.num_cases, MAX_CASES):
        raise _refusal(update, "no-cases", f"a fingerprint of {found.cases} cases, the site has {update.num_cases}")


def _refusal(update: SiteUpdate, reason: str, message: str) -> UpdateRefused:
    return UpdateRefused(reason, f"update of {update.site} for round {update.server_round}: {message}")
