"""A round is a function from server state and joined update to the next server state.

All that survives a round is in `ServerState`: it is the checkpoint, and resuming is nothing but loading it.
"""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedseg.config import Experiment, FederationConfig
from fedseg.federated.fingerprint import UNKNOWN, Fingerprint
from fedseg.federated.messages import RoundInstructions, SiteFailure
from fedseg.federated.phases import Phase
from fedseg.federated.weights import FloatArray, Weights

NORMS_KEPT = 50
CONTROL = "control"
"""SCAFFOLD's control of the server, among the moments of the state."""


@dataclass(frozen=True)
class ServerState:
    """Everything that the server knows between two rounds."""

    experiment_digest: str
    """Digest of the experiment that the run belongs to."""
    server_round: int
    """Last finished round; 0 with the initial weights."""
    weights: Weights
    """Global weights after that round."""
    buffers: frozenset[str] = frozenset()
    """Names of tensors that are no parameters (batch statistics): averaged, never stepped by a server optimizer."""
    private: frozenset[str] = frozenset()
    """Names of tensors that each site has for itself; here they keep their initial values, with which a site begins."""
    moments: Mapping[str, Weights] = field(default_factory=dict)
    """State of the server optimizer: `first` and `second` moments."""
    norms: tuple[float, ...] = ()
    """Norms of the last accepted updates, for screening."""
    fingerprint: Fingerprint = UNKNOWN
    """What the sites' images look like, as they told before round 1; empty where they do not."""

    @property
    def exchanged(self) -> Weights:
        """The weights that the sites train together, and an update changes."""
        return {name: array for name, array in self.weights.items() if name not in self.private}


@dataclass(frozen=True)
class AcceptedUpdate:
    """What the server keeps of an update that it folded in."""

    site: str
    num_cases: int
    norm: float
    num_bytes: int
    seconds: float
    """From the broadcast to the answer."""
    sums: Mapping[str, float]
    training: Mapping[str, float]
    quarantined: Mapping[str, int]
    manifest: str = ""
    """Digest of the site's data manifest."""
    cosine: float | None = None
    """Of the angle between its parameters' update and the joint one, see `fedseg.federated.sketch`; None while there is none."""


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round."""

    server_round: int
    attempts: int
    asked: tuple[str, ...]
    accepted: tuple[AcceptedUpdate, ...]
    failures: tuple[SiteFailure, ...]
    seconds: float
    """Of the last attempt, from its first request to the new weights."""
    phases: Mapping[Phase, float] = field(default_factory=dict)
    """The same by phase."""


def initial_state(
    experiment: Experiment, weights: Weights, buffers: Collection[str] = (), private: Collection[str] = ()
) -> ServerState:
    """The state before round 1."""
    return ServerState(experiment.digest(), 0, weights, frozenset(buffers), frozenset(private))


def instructions_for(state: ServerState, experiment: Experiment, document: str) -> RoundInstructions:
    """What the sites are told in the round after `state`.

    Args:
        state: the server's state.
        experiment: the experiment.
        document: its JSON, made once.
    """
    evaluate = state.server_round > 0 and state.server_round % experiment.federation.evaluate_every == 0
    return RoundInstructions(
        server_round=state.server_round + 1,
        weights=state.weights,
        experiment=document,
        evaluate=evaluate,
        surface=experiment.evaluation.surface_metrics,
        fingerprint=state.fingerprint,
        control=state.moments.get(CONTROL, {}),
    )


def final_instructions(state: ServerState, document: str) -> RoundInstructions:
    """The evaluation-only message that closes a run."""
    return RoundInstructions(
        state.server_round + 1, state.weights, document, train=False, surface=True, fingerprint=state.fingerprint
    )


def fingerprint_instructions(document: str) -> RoundInstructions:
    """The message before round 1 that asks for sites' fingerprints."""
    return RoundInstructions(1, {}, document, train=False, evaluate=False)


def derive_seed(*parts: object) -> int:
    """A 32-bit seed from anything printable, the same on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "little")


def choose_sites(sites: Sequence[str], experiment: Experiment, server_round: int, attempt: int) -> tuple[str, ...]:
    """The sites asked in a round: all, or a seeded share of them but never fewer than the quorum."""
    config = experiment.federation
    if config.participation >= 1:
        return tuple(sorted(sites))
    count = min(len(sites), max(config.min_sites, math.ceil(config.participation * len(sites))))
    ranked = sorted(sites, key=lambda site: (derive_seed(experiment.seed, "ask", server_round, attempt, site), site))
    return tuple(sorted(ranked[:count]))


def site_weight(num_cases: int, config: FederationConfig) -> int:
    """Weight of a site's update in the mean."""
    return num_cases if config.weighting == "cases" else 1


def apply_round(
    state: ServerState,
    joined: Weights,
    norms: Sequence[float],
    config: FederationConfig,
    control: Weights | None = None,
) -> ServerState:
    """The state after a round.

    Args:
        state: before the round.
        joined: the joint update of the accepted sites, of all exchanged tensors.
        norms: their norms, in the order of the sites' names.
        config: decides the server optimizer.
        control: SCAFFOLD's control after the round.
    """
    steps, moments = _server_step(state, joined, config)
    if control is not None:
        moments = {**moments, CONTROL: control}
    weights = {name: array if name in state.private else array + steps[name] for name, array in state.weights.items()}
    kept = (*state.norms, *norms)[-NORMS_KEPT:]
    return replace(state, server_round=state.server_round + 1, weights=weights, moments=moments, norms=kept)


def _server_step(
    state: ServerState, joined: Weights, config: FederationConfig
) -> tuple[Weights, Mapping[str, Weights]]:
    """What is added to the weights, and the optimizer's next state.

    FedAvgM: Hsu et al., arXiv 1909.06335. FedAdam: Reddi et al., arXiv 2003.00295, with tau = 1e-3 and without bias
    correction, as there. Buffers always take the plain mean: a momentum on running variances can turn them negative.
    """
    names = [name for name in joined if name not in state.buffers]
    steps = {name: joined[name] for name in state.buffers - state.private}
    beta, rate = np.float32(config.server_momentum), np.float32(config.server_learning_rate)
    if config.server_optimizer == "average":
        return steps | {name: rate * joined[name] for name in names}, {}
    if config.server_optimizer == "momentum":
        first = {name: beta * _moment(state, "first", name) + joined[name] for name in names}
        return steps | {name: rate * first[name] for name in names}, {"first": first}
    one, beta2, tau = np.float32(1), np.float32(0.99), np.float32(1e-3)
    first = {name: beta * _moment(state, "first", name) + (one - beta) * joined[name] for name in names}
    second = {
        name: beta2 * _moment(state, "second", name) + (one - beta2) * joined[name] * joined[name] for name in names
    }
    steps |= {name: np.asarray(rate * first[name] / (np.sqrt(second[name]) + tau), np.float32) for name in names}
    return steps, {"first": first, "second": second}


def _moment(state: ServerState, kind: str, name: str) -> FloatArray:
    moments = state.moments.get(kind)
    return np.zeros_like(state.weights[name]) if moments is None else moments[name]
