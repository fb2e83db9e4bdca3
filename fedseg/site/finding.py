"""What `fedseg site check` found at one point: one row of its table. And what a check has to build on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from fedseg.config import Experiment
from fedseg.data.audit import Audit
from fedseg.errors import FedsegError
from fedseg.kit import Kit
from fedseg.site.config import SiteConfig

if TYPE_CHECKING:
    from fedseg.site.route import Answer

State = Literal["ok", "attention", "not ready"]

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    """`attention`: the site can take part, but a person should look. `not ready`: it cannot."""
    found: str
    remedy: str = ""
    """What to do; empty where nothing needs to be done."""


@dataclass
class Known:
    """What the checks have found out so far; a later check builds on it."""

    folder: Path
    """Of the kit."""
    site_file: Path
    progress: bool = False
    """Show bars."""
    kit: Kit | None = None
    experiment: Experiment | None = None
    config: SiteConfig | None = None
    audit: Audit | None = None
    answer: "Answer | None" = None
    """Of the coordinator's fence."""


Check = Callable[[Known], Finding]


class NotKnownError(Exception):
    """A check cannot be made because an earlier one failed."""


def need(value: T | None, what: str) -> T:
    """What an earlier check has found out.

    Raises:
        NotKnownError: it has not.
    """
    if value is None:
        raise NotKnownError(what)
    return value


def ok(found: str, remedy: str = "") -> Finding:
    """All is well."""
    return Finding("", "ok", found, remedy)


def attention(found: str, remedy: str) -> Finding:
    """A person should look at it."""
    return Finding("", "attention", found, remedy)


def not_ready(found: str, remedy: str) -> Finding:
    """The site cannot take part before this is mended."""
    return Finding("", "not ready", found, remedy)


def run_check(name: str, check: Check, known: Known) -> Finding:
    """Run one check; whatever happens in it becomes a finding.

    Args:
        name: of the row.
        check: to be run.
        known: what it builds on, and adds to.
    """
    try:
        finding = check(known)
    except NotKnownError as error:
        finding = attention(f"was not looked at: it needs {error}, which is not ready", "mend that first")
    except FedsegError as error:
        found, _, remedy = str(error).partition("; ")
        finding = not_ready(found, remedy)
    except Exception as error:
        finding = not_ready(
            f"the check itself failed: {type(error).__name__}: {error}", "tell whoever maintains fedseg at your site"
        )
    return replace(finding, name=name)
