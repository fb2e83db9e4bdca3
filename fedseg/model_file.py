"""A trained network in one safetensors file: its weights, and the experiment that says how to build and feed it."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from torch import nn

from fedseg import __version__
from fedseg.config import Experiment, parse_experiment
from fedseg.errors import ModelError
from fedseg.federated.checkpoint import write_durably
from fedseg.federated.exchange import put_weights
from fedseg.federated.site import new_model
from fedseg.federated.weights import Weights


def save_model_file(path: Path, experiment: Experiment, weights: Weights, origin: str) -> None:
    """Write a network for `fedseg predict` and `fedseg evaluate`.

    Args:
        path: the file to write; it appears complete or not at all.
        experiment: what it was trained for.
        weights: its exchanged tensors.
        origin: the run that it comes from, for people.
    """
    header = {"format": 1, "version": __version__, "origin": origin, "experiment": experiment.to_json()}
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.asarray(array, order="C") for name, array in weights.items()}
    write_durably(path, save_tensors(tensors, metadata={"fedseg-model": json.dumps(header)}))


def load_model_file(path: Path) -> tuple[Experiment, nn.Module]:
    """Read a network, ready for inference.

    Args:
        path: a file of `save_model_file`, or a result directory (its federated model).

    Raises:
        ModelError: there is no such file, or it is damaged or something else.
    """
    if path.is_dir():
        path = path / "models" / "federated.safetensors"
    try:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["fedseg-model"])
        weights = load_tensors(data)
        experiment = parse_experiment(header["experiment"])
    except FileNotFoundError:
        raise ModelError(
            f"{path}: no such model file; `fedseg simulate` and `fedseg train` write one to models/"
        ) from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a fedseg model file: {type(error).__name__}: {error}") from error
    model = new_model(experiment)
    put_weights(model, weights)
    return experiment, model.eval()
