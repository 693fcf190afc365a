"""Use fedpeft's strategy in your own ServerApp, and a Flower mod around its ClientApp."""

from typing import Any

from flwr.app import Context, Message, MetricRecord
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid, ServerApp

from fedpeft import FederatedPEFT, client_app

OVERRIDES = "method=fedsa_lora num_clients=3 num_rounds=2"  # unless the run gives others
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FederatedPEFT(str(context.run_config.get("overrides", OVERRIDES)))
    result = strategy.start(grid, strategy.initial_arrays(), strategy.config.num_rounds)
    numbers = sum(array.numpy().size for array in result.arrays.values())
    print("parameters after two rounds:", numbers)


def count(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Count this client's messages in its context, and add the number to the reply.

    Args:
        message: a message to the client.
        context: the context of the client's node, which lasts as long as the node.
        call_next: answers the message.
    """
    before: Any = context.state.metric_records.get("seen", {"messages": 0})
    context.state["seen"] = MetricRecord({"messages": before["messages"] + 1})
    reply = call_next(message, context)
    reply.content["seen"] = context.state["seen"]
    return reply


client = client_app(mods=[count])
