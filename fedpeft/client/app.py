"""The Flower ClientApp: its three verbs. What they take to import comes with the first message."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def ready() -> None:
    """Imports what the first message would."""
    import fedpeft.client.client  # noqa: F401


@app.query()
def query(message: Message, context: Context) -> Message:
    """Says which partition this node holds; in simulation, gets ready for what comes."""
    from fedpeft.client.client import partition_of, prepare

    if "config" in message.content.config_records:
        prepare(message)
        return Message(RecordDict(), reply_to=message)
    metrics = MetricRecord({"partition-id": partition_of(context)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Loads initial, received and personal values, trains, sends what is shared."""
    from fedpeft.client.client import answered, trained

    return answered(message, context, trained)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measures a client's model on its own validation and test rows."""
    from fedpeft.client.client import answered, evaluated

    return answered(message, context, evaluated)
