"""pfl-research's side of ``against_pfl``: LoRA by FedAvg, as its documentation recommends.

As in its guide to fast simulations, users' data stay in memory as tensors. As in its benchmark of
language models, a PEFT model of transformers is wrapped, and all of a user's rows are padded to the
longest.
"""

import importlib
import json
import tempfile
import time
import types
from pathlib import Path
from typing import Any

from benchmarks.example_run import RATE, get_model, model_folder
from benchmarks.sides import WARMUPS, Rounds


def simulate(
    data: str,
    rounds: int,
    clients: int = 10,
    steps: int = 20,
    batch_size: int = 16,
    threads: int = 1,
    precision: str = "fp32",
) -> Rounds:
    """Run FedAvg over all clients.

    Args:
        data: folder of SST-2.
        rounds: number of rounds that count.
        clients: number of clients, all in each round.
        steps: a client's steps in a round.
        batch_size: rows a batch.
        threads: torch's threads in this process.
        precision: ``fp32``, or ``bf16`` for autocast.

    Returns:
        The rounds without the warm-ups.
    """
    import torch

    torch.set_num_threads(threads)
    pfl = importlib.import_module
    averaging: Any = pfl("pfl.algorithm.federated_averaging")
    base: Any = pfl("pfl.algorithm.base")
    hyper: Any = pfl("pfl.hyperparam")
    simulated: Any = pfl("pfl.aggregate.simulate")
    weighting: Any = pfl("pfl.aggregate.weighting")
    model, users = _model(precision), _users(data, clients)
    backend = simulated.SimulatedBackend(users, users, [weighting.WeightByDatapoints()])
    times, algorithm = _times(), averaging.FederatedAveraging()
    _past_evaluation(algorithm)
    algorithm.run(
        base.NNAlgorithmParams(
            central_num_iterations=1 + WARMUPS + rounds,
            evaluation_frequency=10**6,
            train_cohort_size=clients,
            val_cohort_size=0,
        ),
        backend,
        model,
        hyper.NNTrainHyperParams(
            local_batch_size=batch_size,
            local_num_epochs=None,
            local_num_steps=steps,
            local_learning_rate=RATE,
            local_max_grad_norm=1.0,
        ),
        callbacks=[times],
        send_metrics_to_platform=False,
    )
    return Rounds.between(times.ended[:-1], times.ended[1:])


def _model(precision: str) -> Any:
    """Wrap MiniLM with LoRA, with the methods ``loss`` and ``metrics`` that pfl calls."""
    import torch

    module = get_model()

    def loss(self: Any, **batch: Any) -> Any:
        self.train()
        return self(**batch).loss

    module.loss = types.MethodType(loss, module)
    module.metrics = types.MethodType(lambda self, **batch: {}, module)
    trained = [p for p in module.parameters() if p.requires_grad]
    wrapped: Any = importlib.import_module("pfl.model.pytorch")
    return wrapped.PyTorchModel(
        module,
        local_optimizer_create=lambda parameters, lr: torch.optim.AdamW(
            parameters, lr=lr, weight_decay=0.0
        ),
        central_optimizer=torch.optim.SGD(trained, lr=1.0),
        amp_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
    )


def _users(data: str, clients: int) -> Any:
    """Load the users' rows into memory as tensors, each user's padded to its longest row."""
    import pyarrow.parquet
    import torch
    from transformers import AutoTokenizer

    datasets: Any = importlib.import_module("pfl.data.pytorch")
    federated: Any = importlib.import_module("pfl.data.federated_dataset")
    sampling: Any = importlib.import_module("pfl.data.sampling")
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    table = pyarrow.parquet.read_table(f"{data}/train.parquet", columns=["sentence", "label"])
    texts, labels = table["sentence"].to_pylist(), table["label"].to_pylist()
    users = {}
    for client in range(clients):
        encoded = tokenizer(
            texts[client::clients], padding="longest", truncation=True, return_tensors="pt"
        )
        tensors = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        tensors["labels"] = torch.tensor(labels[client::clients])
        users[str(client)] = datasets.PyTorchTensorDataset(tensors, user_id=str(client))
    sampler = sampling.get_user_sampler("minimize_reuse", list(users))
    return federated.FederatedDataset(users.__getitem__, sampler)


def _past_evaluation(algorithm: Any) -> None:
    """Begin at iteration 1, because pfl evaluates at iteration 0 whatever the frequency."""
    with tempfile.TemporaryDirectory() as folder:
        state = json.dumps({"current_central_iteration": 1})
        (Path(folder) / "algorithm_checkpoint.json").write_text(state)
        algorithm.load(folder)


def _times() -> Any:
    """Return a callback that notes when training began and when each round ended."""
    callback: Any = importlib.import_module("pfl.callback.base").TrainingProcessCallback
    metrics: Any = importlib.import_module("pfl.metrics").Metrics

    class Times(callback):
        ended: list[float] = []

        def on_train_begin(self, *, model: Any) -> Any:
            self.ended.append(time.time())
            return metrics()

        def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Any]:
            self.ended.append(time.time())
            return False, metrics()

    return Times()
