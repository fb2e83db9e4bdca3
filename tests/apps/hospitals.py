"""Three hospitals with phantoms, and an experiment small enough to run through real processes."""

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

import client.app
from fedseg.config import Experiment, parse_experiment
from fedseg.data.phantom import PhantomConfig, write_phantoms
from fedseg.federated.driver import run_federation
from fedseg.federated.local import InProcessFleet
from fedseg.federated.networks import start_state
from fedseg.federated.rounds import ServerState
from fedseg.federated.sites import OpenSites
from fedseg.federated.store import RunStore
from fedseg.site.config import SiteConfig, load_site
from fedseg.site.policy import Policy
from fedseg.site.service import opened
from tests.apps.grid import Node

NAMES = ("Aare", "Elbe", "Loire")


def tiny_experiment(**federation: object) -> Experiment:
    """Two rounds of FedProx with a tiny U-Net whose batch statistics travel too."""
    document = {
        "name": "tiny",
        "task": {
            "name": "phantom",
            "modality": "mr",
            "labels": {"background": 0, "liver": 1, "spleen": 2, "kidneys": 3},
        },
        "data": {"validation_fraction": 0.34},
        "model": {"name": "unet", "options": {"widths": [4, 8], "norm": "batch"}},
        "training": {"patch_size": [16, 16, 16], "steps_per_epoch": 1},
        "federation": {"rounds": 2, "proximal_mu": 0.01} | federation,
    }
    return parse_experiment(json.dumps(document))


def write_hospitals(folder: Path) -> dict[str, Path]:
    """The site files, by name of site, each beside its data."""
    files = {}
    for number, name in enumerate(NAMES):
        write_phantoms(folder / name / "data", PhantomConfig(cases=3, shape=(16, 20, 20), first=10 * number))
        files[name] = folder / name / "site.toml"
        files[name].write_text(
            f'name = "{name}"\ndata = "data"\ncache = "cache"\ndevice = "cpu"\nsocket = "{short_socket()}"\n'
            "[policy]\nmin_cases = 1\nmin_validation_cases = 1\n"
        )
    return files


def short_socket() -> Path:
    """A path for a UNIX socket, which must not be long."""
    return Path(tempfile.gettempdir()) / f"fedseg-{uuid4().hex[:12]}.sock"


@contextmanager
def gates(configs: Iterable[SiteConfig]) -> Iterator[dict[int, Node]]:
    """Site services in this process, and the nodes whose gates reach them."""
    with ExitStack() as services:
        nodes = {}
        for number, config in enumerate(configs):
            lenient = config.model_copy(
                update={"socket": str(short_socket()), "policy": Policy(min_cases=1, min_validation_cases=1)}
            )
            services.enter_context(opened(lenient))
            nodes[number] = Node(client.app.app, {"socket": lenient.socket})
        yield nodes


def write_experiment(path: Path, experiment: Experiment) -> None:
    """Write an experiment's file; JSON values are TOML values."""
    lines = [f"name = {json.dumps(experiment.name)}"]
    for section in ("task", "data", "model", "training", "evaluation", "federation"):
        values = getattr(experiment, section).model_dump(mode="json", exclude_defaults=True)
        lines += [f"{section}.{key} = {_value(value)}" for key, value in values.items()]
    path.write_text("\n".join(lines) + "\n")


def run_as_loop(experiment: Experiment, files: dict[str, Path], output: Path) -> ServerState:
    """The same federation without Flower: a loop in this process."""
    configs = tuple(load_site(path) for path in files.values())
    store = RunStore(output)
    try:
        fleet = InProcessFleet(list(files), OpenSites(configs)())
        return run_federation(experiment, fleet, store, lambda: start_state(experiment))
    finally:
        store.close()


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)
