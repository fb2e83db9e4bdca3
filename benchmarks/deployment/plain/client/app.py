"""Trains inside Flower's ClientApp, as its tutorials do: the same site, opened anew for every message."""

from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedseg import __version__
from fedseg.federated.site import Site
from fedseg.federated.sites import answer_safely
from fedseg.flower import pack_answer, read_instructions
from fedseg.site.config import load_site

app = ClientApp()


@app.query()
@app.train()
@app.evaluate()
def answer(message: Message, context: Context) -> Message:
    config = load_site(Path(str(context.node_config["site"])))
    if message.metadata.message_type == "query":
        content = RecordDict({"site": ConfigRecord({"name": config.name, "version": __version__})})
    else:
        content = pack_answer(answer_safely(Site(config), config.name, read_instructions(message.content)))
    return Message(content, reply_to=message)
