"""The site file: what a hospital decides. It never leaves the site."""

import os
from pathlib import Path

from pydantic import Field

from fedseg.data.cohort import PersonRule
from fedseg.data.shift.profiles import Shift
from fedseg.errors import ConfigError
from fedseg.names import Name
from fedseg.sections import PositiveInt, Section, load_section, read_toml
from fedseg.site.policy import Policy


def default_cache() -> str:
    """Where preprocessed volumes are kept unless the site says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return str(Path(base) / "fedseg")


class SiteConfig(Section):
    """One hospital's data and machine."""

    name: Name
    """The site's name in the federation; letters, digits, `.`, `_`, `-`."""
    data: str
    """Folder with the cases: Decathlon (`dataset.json`), or images and labels."""
    person: PersonRule = PersonRule()
    """Which cases belong to one person."""
    cases: tuple[str, ...] | None = None
    """Use only the cases with these names; absent: all."""
    cache: str = Field(default_factory=default_cache)
    """Folder for preprocessed volumes; they are as confidential as the volumes."""
    state: str | None = None
    """Folder for the tensors that stay at the site (`federation.exchange`); absent: beside `cache`, with `-state` added."""
    socket: str = "site.sock"
    """UNIX socket on which the site service answers its gate."""
    key: str | None = None
    """The site's private key, with which it signs its data manifest; absent: `site.key` beside the site file, if it is there."""
    largest_request: PositiveInt = 4096
    """Megabytes that one request of the coordinator may have."""
    policy: Policy = Policy()
    """What this hospital allows, whatever the coordinator asks for."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ... or `auto`: a GPU if there is one."""
    threads: PositiveInt = 1
    """CPU threads for the network. Results are repeatable to the last bit only for the same number."""
    shift: Shift | None = None
    """For simulations only: another scanner and annotator than the files are from."""

    @property
    def state_folder(self) -> Path:
        """Where private tensors are kept. Unlike the cache, nothing can rebuild what is in there."""
        cache = Path(self.cache)
        return Path(self.state) if self.state is not None else cache.with_name(f"{cache.name}-state")

    @property
    def audit_log(self) -> Path:
        """Where every request and what became of it is written down."""
        return self.state_folder / "audit.jsonl"

    @property
    def manifest(self) -> Path:
        """The data manifest of the last round."""
        return self.state_folder / "data-manifest.json"


def load_site(path: Path) -> SiteConfig:
    """Read a site file; relative folders in it are relative to the file.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    if "data" not in read_toml(path):
        raise ConfigError(
            f'{path}: data is missing: which folder holds the cases? Write a line data = "/folder/with/the/cases" (in a new '
            "kit it stands there behind a #); `fedseg data check FOLDER` says whether a folder can be used"
        )
    site = load_section(SiteConfig, path)
    base = path.resolve().parent
    folders = {"data": site.data, "cache": site.cache, "state": site.state, "socket": site.socket, "key": site.key}
    if site.key is None and (base / "site.key").exists():
        folders["key"] = "site.key"
    return site.model_copy(update={key: str(base / folder) for key, folder in folders.items() if folder is not None})
