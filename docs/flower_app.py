"""fedpeft's strategy in a ServerApp of your own, and a Flower mod around its ClientApp."""

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedpeft import FederatedPEFT, client_app

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FederatedPEFT(str(context.run_config["overrides"]))
    result = strategy.start(grid, strategy.initial_arrays(), num_rounds=2)
    print(
        "parameters after two rounds:", sum(array.numpy().size for array in result.arrays.values())
    )


def count_bytes(message: Message, context: Context, call_next) -> Message:  # type: ignore[no-untyped-def]
    """Count what this client sends: a mod as any other of Flower's."""
    reply = call_next(message, context)
    context.run_config["sent"] = len(reply.content.array_records)
    return reply


client = client_app(mods=[count_bytes])
