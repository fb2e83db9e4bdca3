"""What in a study file, or on the command line, does not fit the kits that were made already."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from fedseg.coordinator.authority import public_key_text
from fedseg.coordinator.contents import Contents
from fedseg.coordinator.ledger import Ledger
from fedseg.coordinator.study import COORDINATOR, StudySite
from fedseg.errors import ConfigError, KitError


@dataclass(frozen=True)
class Wishes:
    """What a run is asked for beside the kits that are missing."""

    renew: Collection[str] = ()
    """Sites, or `coordinator`, that get a new certificate and kit."""
    revoke: Collection[str] = ()
    """Sites that may not connect any more."""
    update: bool = False
    """Write all kits anew with the certificates that they have."""


def refuse_conflicts(folder: Path, contents: Contents, ledger: Ledger, wishes: Wishes) -> list[str]:
    """Refuse what does not fit, before anything is written.

    Args:
        folder: where the kits are.
        contents: of the kits that would be written.
        ledger: of those that were.
        wishes: what is asked for.

    Returns:
        Warnings about what fits, but is perhaps not meant.

    Raises:
        ConfigError: names what changed, and the option that would be right.
        KitError: a kit that is needed is gone.
    """
    config = contents.study.config
    if ledger.study != config.name:
        raise ConfigError(
            f"name: the kits in {folder} are of the study {ledger.study!r}, not {config.name!r}; use another folder"
        )
    _check_wishes([site.name for site in config.sites], [site.name for site in ledger.sites], wishes)
    _check_what_all_kits_share(folder, contents, ledger, wishes)
    warnings: list[str] = []
    for site in config.sites:
        warnings += _check_site(folder, site, contents, ledger, wishes)
    listed = {site.name for site in config.sites}
    return warnings + [
        f"{site.name} is not in the study file, but may still connect; use --revoke {site.name}"
        for site in ledger.sites
        if site.name not in listed and site.revoked is None and site.name not in wishes.revoke
    ]


def _check_wishes(in_study: Collection[str], with_kit: Collection[str], wishes: Wishes) -> None:
    for name in wishes.renew:
        if name not in (*in_study, COORDINATOR):
            raise ConfigError(f"--renew {name}: the study file has no such site; it has {_listed(in_study)}")
    for name in wishes.revoke:
        if name not in with_kit:
            right = "use --renew coordinator" if name == COORDINATOR else f"sites with a kit: {_listed(with_kit)}"
            raise ConfigError(f"--revoke {name}: no such site has a kit; {right}")
        if name in wishes.renew:
            raise ConfigError(f"--revoke {name} and --renew {name}: --renew alone revokes the old certificate")


def _check_what_all_kits_share(folder: Path, contents: Contents, ledger: Ledger, wishes: Wishes) -> None:
    coordinator = contents.study.config.coordinator
    facts = (
        ("coordinator.host and port", ledger.address, coordinator.address),
        ("the experiment", ledger.experiment_sha256, contents.experiment_sha256),
        ("the app bundle", ledger.app_sha256, contents.app_sha256),
    )
    changed = [what for what, old, new in facts if old != new]
    if changed and not wishes.update:
        raise ConfigError(
            f"{' and '.join(changed)} changed since the kits in {folder} were made; add --update to write all kits anew "
            "(they keep their certificates) and hand them out, or change it back"
        )
    if ledger.server is None or COORDINATOR in wishes.renew:
        return
    if ledger.names != coordinator.all_names:
        raise ConfigError(
            f"coordinator.names: the server's certificate is for {_listed(ledger.names)}, the study file says "
            f"{_listed(coordinator.all_names)}; add --renew coordinator, or change it back"
        )
    if not (folder / COORDINATOR).is_dir():
        raise KitError(
            f"{folder / COORDINATOR}: is missing; bring it back, or make new certificates with --renew coordinator"
        )


def _check_site(folder: Path, site: StudySite, contents: Contents, ledger: Ledger, wishes: Wishes) -> Iterable[str]:
    own = contents.study.public_keys.get(site.name)
    key = None if own is None else public_key_text(own)
    for other in ledger.sites:
        if other.name != site.name and key in {issued.public_key for issued in (other, *other.earlier)}:
            raise ConfigError(f"{site.name}: has the key of {other.name}; each hospital needs a key of its own")
    known = ledger.site(site.name)
    if known is None:
        return
    if known.name != site.name:
        raise ConfigError(f"{site.name}: there is a kit of {known.name}; write the name as it was")
    if site.name in wishes.renew:
        if known.revoked is not None and key == known.public_key:
            raise ConfigError(
                f"{site.name}: was revoked with this very key; a hospital that comes back needs a new one"
            )
        return
    if known.revoked is not None:
        yield f"{site.name} is revoked; --renew {site.name} would admit it again"
        return
    if (key is None) != (known.key_source == "made here") or (key is not None and key != known.public_key):
        raise ConfigError(f"{site.name}: its key is another one than in its kit; add --renew {site.name}")
    kit = folder / "sites" / site.name
    if wishes.update and not (kit / "site.crt").is_file():
        raise KitError(f"{kit}: is missing; bring it back, or add --renew {site.name}")
    if site.institution != known.institution:
        yield f"{site.name}: its institution changed; --renew {site.name} would put it into its kit"


def _listed(names: Collection[str]) -> str:
    return ", ".join(names) if names else "none"
