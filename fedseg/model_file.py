"""A trained network in one safetensors file: its weights, and the experiment that says how to build and feed it.

Where tensors stayed at the sites (`federation.exchange`), the server's file is incomplete: it has their initial values only,
and says so. Each site makes its own complete file of it.
"""

import json
import shlex
from dataclasses import dataclass
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
from fedseg.federated.ditto import personal_tensors
from fedseg.federated.exchange import put_weights
from fedseg.federated.fingerprint import UNKNOWN, Fingerprint
from fedseg.federated.networks import new_model, private_of
from fedseg.federated.private import PrivateTensors
from fedseg.federated.weights import Weights


@dataclass(frozen=True)
class ModelFile:
    """What a model file holds."""

    experiment: Experiment
    document: str
    """The experiment as JSON, as it was sent to the sites."""
    weights: Weights
    origin: str
    """The run that it comes from, for people."""
    missing: tuple[str, ...]
    """Names of tensors that are only initial values here, because they stayed at the sites."""
    fingerprint: Fingerprint = UNKNOWN
    """What the images look like that it was trained on; empty where the sites did not tell."""


def save_model_file(
    path: Path,
    experiment: Experiment,
    weights: Weights,
    origin: str,
    *,
    site: str | None = None,
    fingerprint: Fingerprint = UNKNOWN,
) -> None:
    """Write a network for `fedseg predict` and `fedseg evaluate`.

    Args:
        path: the file to write; it appears complete or not at all.
        experiment: what it was trained for.
        weights: its weights.
        origin: the run that it comes from, for people.
        site: whose private tensors are in the weights; None: those of no site.
        fingerprint: what the images look like that it was trained on.
    """
    header = {"format": 1, "version": __version__, "origin": origin, "experiment": experiment.to_json()}
    header |= {"missing": sorted(private_of(experiment))} if site is None else {"site": site}
    header |= {"fingerprint": fingerprint.to_dict()}
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.asarray(array, order="C") for name, array in weights.items()}
    write_durably(path, save_tensors(tensors, metadata={"fedseg-model": json.dumps(header)}))


def save_site_model(path: Path, model: ModelFile, state: Path, site: str) -> None:
    """Write the complete network of a site: the joined tensors, and the site's private ones.

    Args:
        path: the file to write.
        model: the server's.
        state: the site's folder of private tensors.
        site: its name.

    Raises:
        ModelError: the model is complete already, or the site has no private tensors of it.
        StoreError: the site's private tensors are damaged.
    """
    if not model.missing:
        raise ModelError("the model is complete: nothing of it stayed at the sites")
    kept = PrivateTensors(state, model.document, site, model.missing)
    own = kept.latest()
    if own is None:
        raise ModelError(
            f"site {site!r} has no tensors of {model.origin} in {kept.folder}: either it has not trained in that federation, "
            "or it had another name, `cache` or `state` folder then"
        )
    origin, weights = f"{model.origin}/{site}", model.weights | own
    save_model_file(path, model.experiment, weights, origin, site=site, fingerprint=model.fingerprint)


def save_personal_model(path: Path, model: ModelFile, state: Path, site: str) -> None:
    """Write the network that a site has trained for itself (Ditto).

    Raises:
        ModelError: the site has none of it.
        StoreError: it is damaged.
    """
    kept = personal_tensors(state, model.document, site, model.weights)
    own = kept.latest()
    if own is None:
        raise ModelError(f"site {site!r} has no network of its own of {model.origin} in {kept.folder}")
    origin = f"{model.origin}/{site}"
    save_model_file(path, model.experiment, own, origin, site=site, fingerprint=model.fingerprint)


def model_path(output: Path, run: str, site: str | None = None) -> Path:
    """Where a result directory has the final network of a run; given a site, the site's own if it has one."""
    own = None if site is None else site_model_path(output, run, site)
    return own if own is not None and own.exists() else output / "models" / f"{run}.safetensors"


def site_model_path(output: Path, run: str, site: str) -> Path:
    """Where a result directory has a site's own network, in runs in which tensors stayed at the sites."""
    return output / "models" / run / f"{site}.safetensors"


def load_model_file(path: Path) -> tuple[Experiment, nn.Module]:
    """Read a network, ready for inference, without its fingerprint.

    Args:
        path: a file of `save_model_file`, or a result directory (its federated model).

    Raises:
        ModelError: there is no such file, it is damaged or something else, or lacks what stayed at the sites.
    """
    experiment, model, _ = load_model(path)
    return experiment, model


def load_model(path: Path) -> tuple[Experiment, nn.Module, Fingerprint]:
    """Read a network, ready for inference, and what the images look like that it was trained on.

    Args:
        path: a file of `save_model_file`, or a result directory (its federated model).

    Raises:
        ModelError: there is no such file, it is damaged or something else, or lacks what stayed at the sites.
    """
    file = read_model_file(path)
    if file.missing:
        folder = path / "models" / "federated" if path.is_dir() else path.with_suffix("")
        command = f"fedseg personalise {shlex.quote(str(path))} --site SITE.toml --output FILE"
        simulated = f"; the simulated sites' own models are in {folder}" if folder.is_dir() else ""
        raise ModelError(
            f"{path}: is no complete network: {len(file.missing)} tensors stayed at the sites (federation.exchange = "
            f"{file.experiment.federation.exchange!r}). On a site's machine, `{command}` joins it "
            f"with that site's tensors{simulated}"
        )
    model = new_model(file.experiment)
    put_weights(model, file.weights)
    return file.experiment, model.eval(), file.fingerprint


def read_model_file(path: Path) -> ModelFile:
    """Read a model file, complete or not.

    Args:
        path: a file of `save_model_file`, or a result directory (its federated model).

    Raises:
        ModelError: there is no such file, or it is damaged or something else.
    """
    if path.is_dir():
        path = model_path(path, "federated")
    try:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["fedseg-model"])
        return ModelFile(
            experiment=parse_experiment(header["experiment"]),
            document=header["experiment"],
            weights=load_tensors(data),
            origin=header["origin"],
            missing=tuple(header.get("missing", ())),
            fingerprint=Fingerprint.from_dict(header.get("fingerprint", {})),
        )
    except FileNotFoundError:
        raise ModelError(
            f"{path}: no such model file; `fedseg simulate` and `fedseg train` write one to models/"
        ) from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a fedseg model file: {type(error).__name__}: {error}") from error
