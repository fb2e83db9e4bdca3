"""The way from the gate to the site: one function, so that what stands behind it can change without the gate noticing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedseg.federated.messages import Answer, RoundInstructions
from fedseg.site.config import SiteConfig, load_site


class Connection(Protocol):
    """A site that can be asked."""

    @property
    def name(self) -> str:
        """Its name in the federation."""

    def ask(self, instructions: RoundInstructions) -> Answer:
        """Its answer; an error at the site is a `SiteFailure`, not an exception."""


def connect(site_file: Path) -> Connection:
    """Reach the site that a site file describes.

    The site is opened in this process, when it is first asked for more than its name.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    return _SameProcess(load_site(site_file))


@dataclass(frozen=True)
class _SameProcess:
    config: SiteConfig

    @property
    def name(self) -> str:
        return self.config.name

    def ask(self, instructions: RoundInstructions) -> Answer:
        from fedseg.federated.site import Site, answer_safely  # torch: not needed to say a name

        return answer_safely(Site(self.config), self.config.name, instructions)
