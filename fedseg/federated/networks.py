"""An experiment's network: as it begins, what of it stays at the sites, and one that a process keeps for all its sites."""

import logging
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from fedseg.config import Experiment, parse_experiment
from fedseg.device import seed_everything
from fedseg.errors import ConfigError
from fedseg.federated.exchange import buffer_names, private_names, take_weights
from fedseg.federated.rounds import ServerState, initial_state
from fedseg.models import build_model
from fedseg.models.pretrained import WarmStart, load_pretrained
from fedseg.models.registry import ARCHITECTURES

log = logging.getLogger(__name__)


def start_state(experiment: Experiment) -> ServerState:
    """The state before round 1: a network freshly initialised from the experiment's seed, and what a warm start gives it.

    Raises:
        ModelError: the file of pretrained weights cannot be read, or nothing in it fits.
        ConfigError: `federation.exchange` wants tensors to stay at the sites, and there are none of that kind.
    """
    seed_everything(experiment.seed)
    model = new_model(experiment)
    warm_start(model, experiment)
    return initial_state(experiment, take_weights(model), buffer_names(model), private_in(model, experiment))


def private_in(model: nn.Module, experiment: Experiment) -> frozenset[str]:
    """Names of the experiment's network's weights that stay at each site.

    Raises:
        ConfigError: the experiment wants some to stay, and there are none of that kind.
    """
    name, exchange = experiment.model.name, experiment.federation.exchange
    names = private_names(model, exchange, ARCHITECTURES[name].encoder)
    if exchange != "all" and not names:
        raise ConfigError(
            f"federation.exchange = {exchange!r}: no tensor of {name} would stay at a site, its norm layers have none; "
            'use another model.options.norm, such as "batch", or federation.exchange = "all"'
        )
    return names


def private_of(experiment: Experiment) -> frozenset[str]:
    """The same without a network at hand, and without memory for one.

    Raises:
        ConfigError: the experiment wants some to stay, and there are none of that kind.
    """
    if experiment.federation.exchange == "all":
        return frozenset()
    with torch.device("meta"):
        return private_in(new_model(experiment), experiment)


def new_model(experiment: Experiment) -> nn.Module:
    """The experiment's network."""
    return build_model(
        experiment.model.name,
        preset=experiment.model.preset,
        in_channels=experiment.in_channels,
        num_labels=experiment.task.num_labels,
        patch_size=experiment.training.patch_size,
        deep_supervision=experiment.training.deep_supervision,
        **experiment.network_options,
    )


def warm_start(model: nn.Module, experiment: Experiment) -> WarmStart | None:
    """Load the experiment's pretrained weights into its network; None if it has none."""
    wanted = experiment.model
    if wanted.pretrained is None:
        return None
    report = load_pretrained(model, wanted.name, Path(wanted.pretrained), wanted.pretrained_part)
    log.info("warm start from %s", report)
    return report


@lru_cache(maxsize=2)
def outline(document: str) -> nn.Module:
    """The network of an experiment without memory for its weights: what the received ones are compared with.

    An experiment that asks for a network of a hundred gigabytes is so refused unless as many came with it.
    """
    with torch.device("meta"):
        return new_model(parsed(document))


@lru_cache(maxsize=2)
def warm_model(document: str, device: torch.device) -> nn.Module:
    """A network that stays on its device; every site in this process loads its weights into the same one."""
    return new_model(parsed(document)).to(device)


@lru_cache(maxsize=4)
def parsed(document: str) -> Experiment:
    """The experiment in a message; the same document is read once."""
    return parse_experiment(document)
