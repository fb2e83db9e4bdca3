"""SCAFFOLD (Karimireddy et al., arXiv 1910.06378) at a site; `fedseg.federated.steps` has the server's part."""

import numpy as np
import torch
from torch import Tensor

from fedseg.config import Experiment
from fedseg.federated.messages import RoundInstructions
from fedseg.federated.private import PrivateTensors
from fedseg.federated.steps import mean_gradient
from fedseg.federated.weights import Weights
from fedseg.schedule import learning_rate


class SiteControls:
    """SCAFFOLD at a site: its own control, kept on its disk from round to round.

    Args:
        kept: where it is.
        instructions: of this round; they carry the server's control.
        experiment: decides the learning rate.
        parameters: what has a control, as received.
    """

    def __init__(
        self, kept: PrivateTensors, instructions: RoundInstructions, experiment: Experiment, parameters: Weights
    ) -> None:
        self._kept, self._instructions, self._experiment = kept, instructions, experiment
        zeros = {name: np.zeros_like(array) for name, array in parameters.items()}
        self._server = zeros | instructions.control
        self._own = kept.before(instructions.server_round, instructions.weights) or zeros
        kept.begin(instructions.server_round, instructions.weights)

    def correction(self) -> dict[str, Tensor]:
        """What is added to every gradient: c - c_i."""
        return {name: torch.from_numpy(array - self._own[name]) for name, array in self._server.items()}

    def keep(self, delta: Weights, steps: float) -> None:
        """Work out the control after this round, from what leaves, and write it down: c_i - c + (mean gradient)."""
        progress = (self._instructions.server_round - 1) / self._experiment.federation.rounds
        training = self._experiment.training
        buffers = delta.keys() - self._server.keys()
        found = mean_gradient(delta, int(steps), training, learning_rate(training, progress), buffers)
        own = {name: self._own[name] - self._server[name] + array for name, array in found.items()}
        self._kept.save(self._instructions.server_round, self._instructions.weights, own)
