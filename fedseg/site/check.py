"""Is this site ready? Kit, policy, data, machine, the way to the coordinator, and a round on made-up volumes.

Nothing is written but in a temporary folder, nothing is sent but an empty request, and the site's audit log stays as it is.
"""

from collections.abc import Iterator
from pathlib import Path

from fedseg.site import machine, papers, route
from fedseg.site.finding import Check, Finding, Known, run_check

LOCAL: tuple[tuple[str, Check], ...] = (
    ("kit", papers.check_kit),
    ("certificate", papers.check_certificate),
    ("experiment", papers.check_experiment),
    ("app bundle", papers.check_bundle),
    ("site file", papers.check_site_file),
    ("policy", papers.check_policy),
    ("data", papers.check_data),
    ("device", machine.check_device),
    ("disk", machine.check_disk),
    ("memory", machine.check_memory),
    ("compiler", machine.check_compiler),
)
ROUTE: tuple[tuple[str, Check], ...] = (
    ("name", route.check_name),
    ("connection", route.check_connection),
    ("server", route.check_server),
    ("clock", route.check_clock),
)


def check_site(
    kit_folder: Path, site_file: Path | None = None, *, network: bool = True, training: bool = True,
    progress: bool = False,
) -> Iterator[Finding]:  # fmt: skip
    """Look at everything that a site needs, one finding after the other.

    Args:
        kit_folder: the unpacked kit.
        site_file: the hospital's own decisions; absent: `site.toml` in the kit.
        network: also look for the coordinator.
        training: also train a step on made-up volumes.
        progress: show bars on stderr.
    """
    known = Known(kit_folder, site_file or kit_folder / "site.toml", progress)
    for name, check in (*LOCAL, *(ROUTE if network else ()), *((("dry round", _rehearse),) if training else ())):
        yield run_check(name, check, known)


def _rehearse(known: Known) -> Finding:
    from fedseg.site.rehearsal import rehearse

    return rehearse(known)
