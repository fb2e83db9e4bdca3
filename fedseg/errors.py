"""Every error that fedseg raises on purpose.

    FedsegError
    ├── ConfigError            an experiment, scenario or site file is wrong: names file, key, value, what would be right
    ├── DataError              a cohort as a whole cannot be read
    │   └── CaseError          one case cannot be used: carries a typed reason, the case is quarantined
    ├── SiteAbstained          a site will not take part in this round: carries a typed reason
    ├── ModelError             no such network, or an input or a checkpoint that does not fit it
    ├── TrainingDiverged       a loss or a gradient is not finite: the site reports it and sends no weights
    ├── MessageError           bytes that are not a valid message
    ├── UpdateRefused          screening refused a site's update: carries a typed reason
    ├── QuorumError            too few sites answered, too often
    └── StoreError             a run directory, checkpoint or database is damaged or belongs to another experiment

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


class ModelError(FedsegError):
    """No such network, or an input or checkpoint that does not fit it."""


class TrainingDiverged(FedsegError):  # noqa: N818 - an outcome of the optimisation, not a fault of the program
    """Loss or gradient became NaN or infinite; the model's weights are not to be used."""


class MessageError(FedsegError):
    """Bytes that are not a valid message."""


class UpdateRefused(FedsegError):  # noqa: N818 - a decision of the server, not a failure
    """Screening refused a site's update; the global model is untouched."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class QuorumError(FedsegError):
    """Too few sites answered, too many times in a row."""


class StoreError(FedsegError):
    """A run directory, checkpoint or database is damaged or belongs to another experiment."""
