"""The ServerApp: reads an experiment, waits for the sites, and runs the rounds into a run directory.

Run configuration (`flwr run . --run-config 'experiment="..." resume=true'`):

    experiment      path of a TOML file: absolute on the coordinator's machine, or relative to the shipped bundle
    run-directory   result directory; empty: `runs/<name of the experiment>` where the SuperLink was started
    resume          go on with what the run directory holds
    wait-for-sites  so many sites must be connected before round 1; 0: the experiment's quorum
    wait-seconds    how long to wait for them, and for the quorum in later rounds
    sites           JSON file with the names of the sites that own the registered keys; empty: nodes say who they are
"""

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedseg import logs
from fedseg.config import Experiment, load_experiment
from fedseg.coordinator.between import logged
from fedseg.federated.driver import run_federation
from fedseg.federated.narrate import narrate
from fedseg.federated.networks import start_state
from fedseg.federated.store import RunStore
from fedseg.flower import FlowerFleet
from fedseg.members import read_who
from fedseg.model_file import save_model_file

RUN = "federated"

log = logging.getLogger("fedseg.server")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run an experiment, or go on with it."""
    settings = context.run_config
    bundle = Path(__file__).resolve().parents[1]
    experiment = load_experiment(bundle / str(settings["experiment"]))
    directory = Path(str(settings["run-directory"]) or f"runs/{experiment.name}").resolve()
    who = Path(str(settings["sites"])) if settings["sites"] else None
    fleet = FlowerFleet(
        grid,
        who=None if who is None else lambda: read_who(who),
        min_sites=experiment.federation.min_sites,
        patience=float(settings["wait-seconds"]),
    )
    with logged(directory), logs.about(run=RUN):
        log.info("experiment %s, results go to %s", experiment.name, directory)
        _run(experiment, fleet, directory, int(settings["wait-for-sites"]), bool(settings["resume"]))


def _run(experiment: Experiment, fleet: FlowerFleet, directory: Path, wait_for: int, resume: bool) -> None:
    store = RunStore(directory, RUN)
    try:
        sites = fleet.wait_for(max(experiment.federation.min_sites, wait_for))
        log.info("%d sites are connected: %s", len(sites), ", ".join(sites))
        state = run_federation(
            experiment,
            fleet,
            store,
            lambda: start_state(experiment),
            resume=resume,
            observe=narrate,
        )
    finally:
        store.close()
    path = directory / "models" / f"{RUN}.safetensors"
    save_model_file(path, experiment, state.weights, f"{experiment.name}/{RUN}", fingerprint=state.fingerprint)
    log.info("done; the model is %s", path)
    if state.private:
        log.info(
            "%d tensors stayed at the sites; each completes the model with `fedseg personalise`", len(state.private)
        )
