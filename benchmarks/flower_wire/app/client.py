"""Sends back what it gets."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def echo(message: Message, context: Context) -> Message:  # noqa: ARG001
    """Answer with the content."""
    return Message(message.content, reply_to=message)
