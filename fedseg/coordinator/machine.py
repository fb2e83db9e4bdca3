"""Series of the coordinator's machine: certificates, disk, what was started again, who is connected."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from fedseg.coordinator.exporter import CATALOGUE
from fedseg.coordinator.state import read_status
from fedseg.coordinator.watch import online_nodes
from fedseg.credentials import load_certificate
from fedseg.errors import ConfigError, KitError
from fedseg.kit import Kit, load_roster
from fedseg.members import read_who
from fedseg.series import Samples


class MachineCollector(Collector):
    """Looks at a kit and a state folder at each scrape.

    Args:
        kit: the coordinator's.
        state: the supervisor's state folder.
    """

    def __init__(self, kit: Kit, state: Path) -> None:
        self._kit, self._state = kit, state

    def collect(self) -> Iterator[Metric]:
        """All series that can be read just now."""
        samples = Samples(CATALOGUE)
        for part in (self._certificates, self._disk, self._restarts, self._connections):
            with suppress(ConfigError, KitError, OSError):  # half a copy of a kit, a study that is just beginning
                part(samples)
        yield from samples.families()

    def _certificates(self, samples: Samples) -> None:
        for name in ("ca.crt", "server.crt", "loopback.crt"):
            expires = load_certificate(self._kit.folder / name).not_valid_after_utc.timestamp()
            samples.add("fedseg_certificate_expiry_timestamp_seconds", expires, name)
        for site in load_roster(self._kit.roster).sites:
            if site.revoked is None:
                samples.add("fedseg_certificate_expiry_timestamp_seconds", site.not_after.timestamp(), site.name)

    def _disk(self, samples: Samples) -> None:
        usage = shutil.disk_usage(self._state)
        samples.add("fedseg_state_free_bytes", usage.free)
        samples.add("fedseg_state_size_bytes", usage.total)

    def _restarts(self, samples: Samples) -> None:
        for program, count in read_status(self._state)["restarts"].items():
            samples.add("fedseg_restarts", count, program)

    def _connections(self, samples: Samples) -> None:
        online = online_nodes(self._state / "superlink.db")
        for node, member in read_who(self._state / "sites.json").items():
            samples.add("fedseg_site_connected", float(node in online), member.name)
