"""One hospital, and what a coordinator asks of it."""

import dataclasses
import json

from fedseg.data.phantom import PhantomConfig, write_phantoms
from fedseg.federated.messages import RoundInstructions, SiteUpdate
from fedseg.federated.networks import start_state
from fedseg.federated.site import Site
from fedseg.site.audit import entries
from fedseg.site.config import load_site
from tests.apps.hospitals import short_socket, tiny_experiment

EXPERIMENT = tiny_experiment()
LONG = EXPERIMENT.model_copy(
    update={"training": EXPERIMENT.training.model_copy(update={"steps_per_epoch": 100_000}), "name": "long"}
)
"""Takes hours, unless somebody ends it."""


def write_hospital(folder, *, policy="min_cases = 1\nmin_validation_cases = 1", **settings):
    """A site file beside its data."""
    write_phantoms(folder / "data", PhantomConfig(cases=3, shape=(16, 20, 20)))
    file = folder / "site.toml"
    lines = {
        "name": "Aare",
        "data": "data",
        "cache": "cache",
        "device": "cpu",
        "socket": str(short_socket()),
    } | settings
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())
    file.write_text(f"{text}[policy]\n{policy}\n")
    return load_site(file)


def instructions(experiment=EXPERIMENT, **changes):
    """Of the first round."""
    wanted = {
        "server_round": 1,
        "weights": start_state(EXPERIMENT).weights,
        "experiment": experiment.to_json(),
    } | changes
    return RoundInstructions(**wanted)


def asked(experiment=EXPERIMENT, **changes):
    """The same as bytes."""
    return instructions(experiment, **changes).encode()


def directly(config, folder, wanted):
    """The update of a site that is called without service, desk and policy; with folders of its own."""
    site = Site(config.model_copy(update={"cache": str(folder / "cache-2"), "state": str(folder / "state-2")}))
    return site(wanted)


def same(update, other):
    """Whether two updates are equal to the last bit, but for what a clock says and for the manifest."""
    return _without_clock(update) == _without_clock(other)


def _without_clock(update):
    training = {name: value for name, value in update.training.items() if "seconds" not in name}
    return dataclasses.replace(update, training=training, manifest="").encode()


def decoded(answer):
    """An answer of a desk or of a connection."""
    data = answer if isinstance(answer, bytes) else b"".join(answer)
    return SiteUpdate.decode(data)


def logged(config, event="request"):
    """The audit log's entries of one kind."""
    return [entry.entry for entry in entries(config.audit_log) if entry.entry["event"] == event]
