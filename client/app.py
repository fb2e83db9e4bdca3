"""The ClientApp: a gate. It passes what the coordinator asks on to the site service, and the service's answer back.

It has the network and neither data nor torch; the site service has those and no network. The node configuration names the socket
between them: `socket="/run/fedseg/site.sock"`.
"""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedseg.errors import ConfigError
from fedseg.flower import reply_to
from fedseg.site.connect import Connection

app = ClientApp()


@app.query()
@app.train()
@app.evaluate()
def answer(message: Message, context: Context) -> Message:
    """Answer a message; a failure leaves the hospital as the name of its class and nothing else."""
    return reply_to(message, lambda: _site_service(context))


def _site_service(context: Context) -> Connection:
    socket = context.node_config.get("socket")
    if not isinstance(socket, str):
        raise ConfigError("the node configuration names no socket: --node-config 'socket=\"/run/fedseg/site.sock\"'")
    return Connection(Path(socket))
