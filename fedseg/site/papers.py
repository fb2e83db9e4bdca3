"""Checks of what was decided and prepared: kit, certificate, app bundle, site file, policy, data."""

import shlex
import socket as sockets
from datetime import UTC, datetime
from pathlib import Path

from fedseg.config import Experiment, load_experiment
from fedseg.errors import KitError, PolicyRefused
from fedseg.kit import certificate_days_left, load_kit
from fedseg.site.finding import Finding, Known, attention, need, not_ready, ok
from fedseg.site.policy import Policy, check_request

DAYS = 30
"""A certificate that expires sooner needs attention."""


def check_kit(known: Known) -> Finding:
    """Signature, hashes, keys."""
    try:
        known.kit = load_kit(known.folder)
    except KitError:
        known.kit = load_kit(known.folder, with_keys=False)  # goes on with what does not need the key
        load_kit(known.folder)
        raise
    if known.kit.config.role != "site":
        known.kit = None
        return not_ready(f"{known.folder}: is the coordinator's kit", "use the kit that was made for this hospital")
    config = known.kit.config
    return ok(
        f"study {config.study}, site {config.site}; signed with {known.kit.fingerprint}",
        "compare the fingerprint with the coordinator by telephone, once",
    )


def check_certificate(known: Known) -> Finding:
    """Days that are left."""
    days = certificate_days_left(need(known.kit, "the kit").certificate, datetime.now(UTC))
    ask = "ask the coordinator for a renewed kit"
    if days < 0:
        return not_ready(f"expired {-days:.0f} days ago", ask)
    if days < DAYS:
        return attention(f"expires in {days:.0f} days", ask)
    return ok(f"valid for {days:.0f} more days")


def check_experiment(known: Known) -> Finding:
    """Whether this release understands it."""
    known.experiment = experiment = load_experiment(known.folder / "experiment.toml")
    labels = ", ".join(experiment.task.structures)
    rounds = experiment.federation.rounds
    return ok(f"{experiment.name}: {rounds} rounds of {experiment.model.name}; {experiment.task.modality}; {labels}")


def check_bundle(known: Known) -> Finding:
    """Whether somebody here has approved the code that comes with the kit."""
    from fedseg.app_bundle import bundle_digest
    from fedseg.site.approval import approvals, read_bundle

    path = known.folder / "app.fab"
    digest = bundle_digest(read_bundle(path))
    found = [approval for approval in approvals(known.folder) if approval.sha256 == digest]
    if not found:
        return not_ready(
            f"{digest[:16]}... is not approved here: the gate would refuse all work",
            f"fedseg site approve --show {shlex.quote(str(path))}, then without --show",
        )
    return ok(f"{digest[:16]}... approved on {found[0].approved:%Y-%m-%d} by {found[0].by or 'somebody'}")


def check_site_file(known: Known) -> Finding:
    """Name, and the socket between gate and service."""
    from fedseg.site.config import load_site
    from fedseg.site.connect import socket_address
    from fedseg.site.start import require_own_name

    known.config = config = load_site(known.site_file)
    require_own_name(need(known.kit, "the kit"), config)
    path = Path(config.socket)
    socket_address(path)
    if path.exists():
        if not path.is_socket():
            return not_ready(f"socket {path}: is another kind of file", "choose another path in the site file")
        with sockets.socket(sockets.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                return ok(f"{known.site_file}; a site service is running on {path}")
    return ok(f"{known.site_file}; socket {path}")


def check_policy(known: Known) -> Finding:
    """What the hospital allows against what the study asks."""
    from fedseg.site.audit import rounds_done

    config = need(known.config, "the site file")
    experiment = need(known.experiment, "the experiment")
    done = rounds_done(config.audit_log, experiment.digest())
    broken = _broken(config.policy, experiment, done)
    forever = {rule: text for rule, text in broken.items() if rule != "hours"}
    if forever:
        return not_ready(
            "would refuse the study by " + "; by ".join(forever.values()),
            "talk with the coordinator, or change [policy] in the site file",
        )
    if broken:
        return attention(f"{broken['hours']}", "nothing, if that is meant: work waits until then")
    return ok("allows what the study asks")


def check_data(known: Known) -> Finding:
    """Open every case; count what the study and the policy want."""
    from fedseg.data.audit import audit_cohort
    from fedseg.data.cohort import split_by_person
    from fedseg.federated.site import Site

    config = need(known.config, "the site file")
    experiment = need(known.experiment, "the experiment")
    cohort = Site(config).cohort()
    known.audit = audit = audit_cohort(cohort, experiment.task, progress=known.progress, workers=config.threads)
    bad = {finding.case for finding in audit.errors}
    split = split_by_person(cohort, experiment.data.validation_fraction, experiment.seed)
    training, validation = (tuple(case for case in part.cases if case.name not in bad) for part in split)
    persons = [len({case.person for case in part}) for part in (training, validation)]
    found = (
        f"{audit.total_cases - len(bad)} of {audit.total_cases} cases are usable, {len(audit.warnings)} warnings; "
        f"training: {len(training)} cases of {persons[0]} persons, validation: {len(validation)} of {persons[1]}"
    )
    look = shlex.join(["fedseg", "data", "check", config.data, "--experiment", str(known.folder / "experiment.toml")])
    least = max(experiment.data.min_cases, config.policy.min_cases)
    if len(training) < least:
        whose = "policy.min_cases" if config.policy.min_cases >= experiment.data.min_cases else "the study"
        return not_ready(f"{found}; {whose} wants {least} to train on", f"add cases, or mend them: {look}")
    listed = len(split[0].cases)
    if len(training) < experiment.data.min_usable_share * listed:
        share = experiment.data.min_usable_share
        return not_ready(f"{found}; the study wants a share of {share:g} of the training cases to be usable", look)
    if len(validation) < config.policy.min_validation_cases:
        least = config.policy.min_validation_cases
        return attention(f"{found}; policy.min_validation_cases is {least}, so no scores would leave", look)
    return attention(found, look) if audit.findings else ok(found)


def _broken(policy: Policy, experiment: Experiment, done: int) -> dict[str, str]:
    """Every rule that the study breaks now, and how."""
    broken: dict[str, str] = {}
    lenient = {
        "models": None,
        "hours": None,
        "max_rounds": None,
        "max_local_epochs": experiment.federation.local_epochs,
        "max_clip_norm": None,
        "min_noise_multiplier": None,
    }
    while True:
        try:
            check_request(policy, experiment, train=True, now=datetime.now().astimezone(), rounds_done=done)
            return broken
        except PolicyRefused as refusal:
            if refusal.rule in broken:
                raise
            broken[refusal.rule] = str(refusal)
            policy = policy.model_copy(update={refusal.rule: lenient[refusal.rule]})
