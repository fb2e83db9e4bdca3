"""The learning rate over the rounds of a federation; both ends must agree about it."""

import math

from fedseg.config import TrainingConfig
from fedseg.errors import ConfigError


def learning_rate(config: TrainingConfig, progress: float) -> float:
    """The learning rate at a point of the federation; it stays the same within a round.

    Args:
        config: base rate and schedule.
        progress: in [0, 1]; 0 gives the base rate. `poly` and `cosine` reach 0 at 1, so the last round starts below it.

    Raises:
        ConfigError: progress is outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ConfigError(f"progress must be in [0, 1], got {progress}")
    match config.schedule:
        case "constant":
            factor = 1.0
        case "poly":
            factor = (1 - progress) ** 0.9
        case "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * factor
