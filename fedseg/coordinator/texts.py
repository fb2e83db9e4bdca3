"""What kits tell their readers: `kit.toml`, the README files, and the site file that a hospital fills in."""

import json
from datetime import datetime

from fedseg.kit import KitConfig

_FINGERPRINT = """Before anything else, compare this fingerprint of the key that signed the kit with the coordinator, by
telephone, under a number that you already had:

    {fingerprint}

`fedseg` prints the fingerprint of `signing.pub`; so does `openssl pkey -pubin -in signing.pub -outform DER | sha256sum`.
"""


def kit_toml(config: KitConfig) -> bytes:
    """The text of `kit.toml`."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in config.model_dump().items() if value is not None]
    return ("\n".join(lines) + "\n").encode()


def site_readme(
    config: KitConfig,
    *,
    institution: str | None,
    own_key: bool,
    app_sha256: str,
    fingerprint: str,
    expires: datetime,
) -> bytes:
    """README.md of a hospital."""
    if own_key:
        key = (
            "Your private key has never left your hospital and is not in here. Copy it to `site.key` in this folder, as PEM\n"
            "without a passphrase, and run `chmod 600 site.key`."
        )
    else:
        key = (
            "`site.key` is this hospital's private key: whoever has it can act as you. It must be readable for nobody but the\n"
            "account that runs fedseg (mode 600). If it is not in this folder, keep the one that you have."
        )
    return f"""# {config.study}: kit of {config.site}

For {institution or config.site}: what one machine in your hospital needs to take part in the study {config.study}.

{_FINGERPRINT.format(fingerprint=fingerprint)}
{key}

1. Unpack the kit where the machine keeps its services: `unzip {config.site}.zip`. If you already have a kit of
   this study, unpack the new one over it, without its empty `site.toml`, from the folder that holds `{config.site}`:
   `unzip -o {config.site}.zip -x {config.site}/site.toml`. Cache, state and approvals stay. Then start fedseg again.
2. Edit `site.toml`: `data` is the folder with your cases; `cache` and `state` are folders that fedseg may write.
   Set the limits in `[policy]`. Nothing in that file leaves your hospital.
3. Three commands:

       fedseg site check .             # kit, data, policy and the way to the coordinator
       fedseg site approve app.fab     # somebody here has read the code that will run; --show prints it
       fedseg site start .

SHA-256 of `app.fab`, the code that will run: `{app_sha256}`

Connections only go out, to `{config.coordinator}`, with TLS 1.3. Nobody connects to you; no port needs to be opened.

The certificate expires on {expires:%d %B %Y}. Some weeks before, ask the coordinator for a renewed kit. If the
private key is lost or was seen by others, call the coordinator at once: the certificate can be revoked within minutes.
""".encode()


def coordinator_readme(config: KitConfig, *, app_sha256: str, fingerprint: str, expires: datetime) -> bytes:
    """README.md of the coordinator's server."""
    return f"""# {config.study}: kit of the coordinator's server

Sites connect to `{config.coordinator}`. Fingerprint of the key that signs all kits of the study:

    {fingerprint}

Hospitals call to compare it: let it be answered from the office, not from this folder.

    fedseg server start .       # --fence: and nginx, too
    fedseg server status .
    fedseg server stop .

nginx stands in front and lets in only machines with a certificate of this study that is in `sites.json` and not in
`crl.pem`: `nginx -c "$PWD/nginx.conf" -p /var/lib/fedseg-nginx`. After a site was added, renewed or revoked, copy
`sites.json`, `crl.pem`, `nginx.conf`, `manifest.json` and `manifest.sig` (or the whole new kit) here and run
`nginx -s reload` with the same options.

SHA-256 of `app.fab`, the code that will run: `{app_sha256}`

`server.key` and `loopback.key` must be readable for nobody but the account that runs the server (mode 600). The
certificates expire on {expires:%d %B %Y}: `fedseg provision study.toml -o kits --renew coordinator` makes new ones.
The folder `authority` stays in the office; it does not belong on this machine.
""".encode()


def site_toml(name: str) -> bytes:
    """The template of the site file: every key of `SiteConfig` and `Policy`, with its default."""
    return _SITE_TOML.replace("NAME", json.dumps(name)).encode()


_SITE_TOML = r"""# What this hospital decides. Nothing in this file leaves the hospital. Relative folders start at this file.
# A key behind a # has the value that stands there; where the value is an example, the comment says so.
name = NAME                   # as in the certificate: do not change it

# The folder with the cases, Decathlon (`dataset.json`) or images and labels. `fedseg data check FOLDER` says whether it can be
# used. This is the one line that must be filled in; the value is an example.
# data = "/data/liver"

cache = "cache"               # preprocessed volumes, as confidential as the volumes
state = "state"               # what only this site has: private tensors, the log of all requests. Back it up
device = "auto"               # cpu, cuda, cuda:1, ... or auto: a GPU if there is one
# threads = 1                 # CPU threads for the network
# socket = "site.sock"        # UNIX socket between gate and site service
# key = "site.key"            # private key of this kit, with which the site signs its data manifest
# largest_request = 4096      # megabytes that one request of the coordinator may have
# cases = ["case_001"]        # example: use only these; without it, all

# Which cases belong to one person, so that nobody is in training and validation. Without it, each case is a person; an example:
# [person]
# kind = "pattern"            # or "pairs", or "column" with `file`, `case_column` and `person_column`
# pattern = "(sub-\\d+)"      # the group in brackets is the person

# What this hospital allows, whatever the coordinator asks for.
[policy]
max_local_epochs = 10         # passes over the training cases in one round
max_minutes = 240.0           # longest time of one request; then it is cancelled
min_cases = 5                 # with fewer usable training cases nothing is trained
min_validation_cases = 3      # with fewer validation cases no sum of metrics leaves
tensors = ["*"]               # patterns for the names of tensors that may leave
max_megabytes = 200.0         # largest update
# models = ["mlru++"]         # example: networks that may be trained; without it, all that `fedseg models` lists
# labels = ["liver"]          # example: structures whose metrics may leave; without it, all of the study
# metrics = ["dice"]          # example: of dice, hd95, surface_dice, failures, loss, steps, seconds, data_seconds, quarantined
#                             # those that may leave; without it, all of them
# max_clip_norm = 1.0         # example: the study must clip updates to this norm at most; without it, it need not
# min_noise_multiplier = 0.5  # example: the study must add at least this much noise; without it, it need not
# max_rounds = 200            # example: requests of one study that are answered; without it, no limit
# hours = ["Mo-Fr 18:00-06:00", "Sa-Su 00:00-24:00"]  # example: when a request may begin; without it, always
"""
