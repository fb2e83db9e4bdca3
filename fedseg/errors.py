"""Every error that fedseg raises on purpose.

    FedsegError
    ├── ConfigError            an experiment, scenario or site file is wrong: names file, key, value, what would be right
    ├── DataError              a cohort as a whole cannot be read
    │   └── CaseError          one case cannot be used: carries a typed reason, the case is quarantined
    ├── SiteAbstained          a site will not take part in this round: carries a typed reason
    │   └── PolicyRefused      the hospital's policy forbids what was asked: carries the rule
    ├── SiteLate               a simulated machine is too slow for the round's virtual deadline
    ├── AuditError             an audit log cannot be read, or cannot be continued because it was changed
    ├── ManifestError          a data manifest is damaged, or its signature is not the site's
    ├── ModelError             no such network, or an input or a checkpoint that does not fit it
    ├── RoundCancelled         whoever asked for a round is gone, or took it back
    ├── TrainingDiverged       a loss or a gradient is not finite: the site reports it and sends no weights
    ├── SiteUnreachable        the gate finds no site service behind its socket
    ├── MessageError           bytes that are not a valid message
    ├── UpdateRefused          screening refused a site's update: carries a typed reason
    ├── QuorumError            too few sites answered, too often
    ├── SuperLinkError         Flower's server on the coordinator's machine does not answer, or refuses
    ├── StoreError             a run directory, checkpoint or database is damaged or belongs to another experiment
    └── KitError               a kit or the study's authority is incomplete, changed or open to others: names file and remedy

Messages say what was wrong, where, and what would be right. `reason` is a short code that may leave a hospital; the
message may name files and stays at home.
"""


class FedsegError(Exception):
    """Base of all errors that fedseg raises on purpose."""


class ConfigError(FedsegError):
    """A configuration file or value is wrong."""


class DataError(FedsegError):
    """A cohort cannot be read."""


class CaseError(DataError):
    """One case cannot be used.

    Args:
        reason: code such as `"missing-label"`; see `fedseg.data.cohort.Reason`.
        message: the full story for the hospital's own log.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class SiteAbstained(FedsegError):  # noqa: N818 - an answer of the site, not a failure
    """A site declines to take part, with a typed reason that may leave the hospital."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class PolicyRefused(SiteAbstained):
    """The hospital's policy forbids what was asked.

    Args:
        rule: name of the field of `fedseg.site.policy.Policy`; it may leave the hospital, and is the `reason` too.
        message: the full story for the hospital's own log.
    """

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(rule, message)
        self.rule = rule


class SiteLate(FedsegError):  # noqa: N818 - an answer of a simulated site
    """A simulated machine is too slow for the round's virtual deadline."""


class AuditError(FedsegError):
    """An audit log cannot be read or written, or cannot be continued because it was changed."""


class ManifestError(FedsegError):
    """A data manifest is damaged, or its signature is not the site's."""


class ModelError(FedsegError):
    """No such network, or an input or checkpoint that does not fit it."""


class RoundCancelled(FedsegError):  # noqa: N818 - an order, not a failure
    """Whoever asked a site for a round is gone, took it back, or the site's own time limit has passed."""


class TrainingDiverged(FedsegError):  # noqa: N818 - an outcome of the optimisation, not a fault of the program
    """Loss or gradient became NaN or infinite; the model's weights are not to be used."""


class SiteUnreachable(FedsegError):  # noqa: N818 - a state of the site
    """The gate finds no site service behind its socket, or it died while it was asked."""


class MessageError(FedsegError):
    """Bytes that are not a valid message."""


class UpdateRefused(FedsegError):  # noqa: N818 - a decision of the server, not a failure
    """Screening refused a site's update; the global model is untouched."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class QuorumError(FedsegError):
    """Too few sites answered, too many times in a row."""


class SuperLinkError(FedsegError):
    """Flower's server on the coordinator's machine does not answer, or refuses."""


class StoreError(FedsegError):
    """A run directory, checkpoint or database is damaged or belongs to another experiment."""


class KitError(FedsegError):
    """A kit, or the authority that makes kits, is incomplete, changed, or open to others."""
