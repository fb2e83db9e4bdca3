"""The ClientApp: passes what the coordinator asks on to the site, and the site's answer back.

The node configuration names the site file: `flower-supernode --node-config 'site="/etc/fedseg/site.toml"'`.
"""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedseg.errors import ConfigError
from fedseg.flower import reply_to
from fedseg.site.connect import Connection, connect

app = ClientApp()


@app.query()
@app.train()
@app.evaluate()
def answer(message: Message, context: Context) -> Message:
    """Answer a message; a failure leaves the hospital as the name of its class and nothing else."""
    return reply_to(message, lambda: _site(context))


def _site(context: Context) -> Connection:
    site_file = context.node_config.get("site")
    if not isinstance(site_file, str):
        raise ConfigError("the node configuration names no site file: --node-config 'site=\"/path/to/site.toml\"'")
    return connect(Path(site_file))
