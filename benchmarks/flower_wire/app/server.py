"""Times an exchange with every node, both ways in turn."""

import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedseg.federated.messages import RoundInstructions
from fedseg.flower import pack_instructions

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Print `RESULT way push pull total` lines."""
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.2)
    for repeat in range(int(context.run_config["repeats"])):
        for way in ("per-tensor", "one-array"):
            generator = np.random.default_rng([repeat, way == "one-array"])
            weights = {f"layer{number}": generator.standard_normal(8738, dtype=np.float32) for number in range(300)}
            begun = time.perf_counter()
            if way == "one-array":
                content = pack_instructions(RoundInstructions(1, weights, "{}"))
            else:
                content = RecordDict({"weights": ArrayRecord({name: Array(value) for name, value in weights.items()})})
            pushed, pulled = exchange(grid, content)
            print(f"RESULT {way} {pushed:.2f} {pulled:.2f} {time.perf_counter() - begun:.2f}", flush=True)


def exchange(grid: Grid, content: RecordDict) -> tuple[float, float]:
    """Seconds spent pushing, and pulling what had arrived."""
    begun = time.perf_counter()
    waiting = set(grid.push_messages([Message(content, node, "train") for node in grid.get_node_ids()]))
    pushed, pulled = time.perf_counter() - begun, 0.0
    while waiting:
        begun = time.perf_counter()
        replies = list(grid.pull_messages(waiting))
        pulled += (time.perf_counter() - begun) if replies else 0.0
        waiting -= {reply.metadata.reply_to_message_id for reply in replies}
        time.sleep(0.05)
    return pushed, pulled
