"""What a site does to its update before it leaves: clip its length, then add Gaussian noise.

Clipping bounds what one hospital can change in a round (and what its update can tell); noise proportional to that bound hides the
rest. The mechanism is that of DP-FedAvg (McMahan et al., "Learning Differentially Private Recurrent Language Models", 2018) with
the noise added at the site, so that no coordinator has to be trusted with the clean update. An epsilon is not computed here.
"""

import numpy as np

from fedseg.config import PrivacyConfig
from fedseg.federated.weights import FloatArray, Weights, norm


def protect(delta: Weights, config: PrivacyConfig, generator: np.random.Generator) -> Weights:
    """Clip an update, and add noise to it.

    Args:
        delta: trained minus received weights, everything that would leave.
        config: largest L2 norm over all tensors together, and the noise's standard deviation as a multiple of it.
        generator: of the noise; in a hospital it must be one that nobody else can know.
    """
    if config.clip_norm is None:
        return delta
    size = norm(delta)
    factor = np.float32(min(1.0, config.clip_norm / size)) if size > 0 else np.float32(1)
    deviation = np.float32(config.noise_multiplier * config.clip_norm)
    return {name: _protect(array, factor, deviation, generator) for name, array in sorted(delta.items())}


def _protect(
    array: FloatArray, factor: np.float32, deviation: np.float32, generator: np.random.Generator
) -> FloatArray:
    clipped: FloatArray = array * factor
    if deviation > 0:
        clipped += deviation * generator.standard_normal(array.shape, dtype=np.float32)
    return clipped
