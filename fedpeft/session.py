"""What a process needs for one configuration: built once, resident over all its messages."""

from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft import config as configuration
from fedpeft.algorithms.base import Setting, Term
from fedpeft.data.batching import Examples, training_batches
from fedpeft.data.partition import own_splits
from fedpeft.memory import train_in_float32
from fedpeft.methods.base import TRAINED, Role, State
from fedpeft.schema import Config
from fedpeft.seeding import generator, torch_seed
from fedpeft.state import blocks, down_names, filled, load_state, names_with, roles, snapshot
from fedpeft.training import evaluate, train


class Trained(NamedTuple):
    """What a client's training was."""

    num_examples: int
    loss: float  # mean over the steps
    steps: int
    lr: float  # mean over the steps


class Session:
    """A configuration's injected model and tokenised rows.

    The model is one for all clients of a process, so every use begins with ``load``, which sets
    every trainable parameter: nothing of the client before is left.

    Args:
        data_path: this machine's own data folder; its rows are then one client's, undivided.
    """

    def __init__(self, config: Config, data_path: str | None = None) -> None:
        torch.set_num_threads(config.runtime.threads)
        config.model.check_precision(config.precision)
        self.config = config
        self.owns_all_rows = data_path is not None
        self.task = config.data
        if self.owns_all_rows and getattr(self.task, "labels", None) == []:
            raise ValueError(
                "a client with its own data-path needs data.labels=[...]: numbered from its own "
                "rows, its classes could differ from the others'"
            )
        self.processor = getattr(config.model, self.task.needs)()
        model = self.base_model()
        with torch_seed(config.seed, "method"):
            model = config.method.inject(model)
        train_in_float32(model)
        self.model: nn.Module = model.to(_device(config.runtime.device))
        self.trainable = [n for n, p in self.model.named_parameters() if p.requires_grad]
        self.initial = snapshot(self.model, self.trainable)
        config.strategy.check(self._setting())
        self.samples: list[dict[str, str]] = []  # the last generated texts, beside references
        # Of the session, not of the class, which would keep every session's model alive.
        self.examples = lru_cache(maxsize=None)(self._examples)
        self.client_examples = lru_cache(maxsize=256)(self._client_examples)

    def base_model(self) -> nn.Module:
        """The model before the method touches it."""
        model = self.config.model.build(
            self.task.auto_class, self.task.num_labels, self.config.seed
        )
        if self.task.needs == "tokenizer":
            model.config.pad_token_id = self.processor.pad_token_id
        return model

    def role(self, name: str, round: int) -> Role:
        """Role by method and strategy."""
        return self.config.strategy.role(self.config.method.role(name, round))

    def roles(self, round: int) -> dict[str, Role]:
        """Role of every trainable parameter; all others are frozen."""
        return roles(self.role, self.trainable, round)

    def shared(self, round: int) -> State:
        """Initial values of what is shared in a round: the keys, shapes and dtypes."""
        return {n: self.initial[n] for n in names_with(self.roles(round), Role.SHARED)}

    def blocks(self, state: State, client: int) -> State:
        """What of a state one client trains."""
        return blocks(self.config.method, state, client)

    def down(self, round: int) -> list[str]:
        """Names of what a client receives in a round."""
        return down_names(self.role, self.trainable, round)

    @property
    def has_personal(self) -> bool:
        """Whether the method keeps parameters on the client."""
        return Role.PERSONAL in self.roles(1).values()

    def _setting(self) -> Setting:
        """What the strategy is to work with."""
        config = self.config
        rounds, clients = range(1, config.num_rounds + 1), range(config.num_clients)
        shares = any(Role.SHARED in self.roles(round).values() for round in rounds)
        whole = all(
            tuple(config.method.block(name, value.shape, client)) == tuple(value.shape)
            for client in clients
            for name, value in self.initial.items()
        )
        return Setting(config.method, shares, whole, config.cohort_size())

    def load(self, *states: State, client: int | None = None) -> None:
        """Sets every parameter that can change: its initial value, then those of ``states``.

        Args:
            client: whose blocks to load, the rest being zero; null for whole parameters.
        """
        initial = self.initial
        if client is not None:
            initial = filled(self.blocks(initial, client), initial)
        load_state(self.model, initial, *(filled(state, initial) for state in states))

    def set_trainable(self, round: int) -> None:
        """``requires_grad`` by role."""
        by_name = self.roles(round)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(by_name.get(name) in TRAINED)

    def _examples(self, split: str) -> Examples:
        """A split of the whole data set."""
        return self.task.encode(split, self.processor)

    @cached_property
    def client_rows(self) -> list[np.ndarray]:
        """Row numbers of the training split by client."""
        if self.owns_all_rows:
            return [np.arange(len(self.task.train_rows))] * self.config.num_clients
        partition = self.config.partition
        groups, _ = self.task.grouped(partition.column)
        return partition.indices(groups, self.config.num_clients, self.config.seed)

    def _client_examples(self, client: int) -> dict[str, Examples]:
        """A client's own train, validation and test rows."""
        if not 0 <= client < self.config.num_clients:
            raise ValueError(
                f"partition-id must be from 0 to num_clients - 1 = {self.config.num_clients - 1}, "
                f"got {client}"
            )
        limit = self.config.evaluation.max_client_rows
        splits = own_splits(self.client_rows[client], self.config.seed, client)
        train = self.examples("train")
        return {
            name: train.select(rows if name == "train" else rows[:limit])
            for name, rows in splits.items()
        }

    def _training_rows(self, client: int) -> tuple[Examples, int]:
        """A client's rows, and how many clients' work it does: all of a round's, where pooled."""
        if not self.config.strategy.pooled:
            return self.client_examples(client)["train"], 1
        if self.owns_all_rows:
            raise ValueError("strategy=centralized needs all rows in one place: simulate it")
        clients = range(self.config.num_clients)
        rows = [self.client_examples(c)["train"].rows for c in clients]
        return self.examples("train").select(np.concatenate(rows)), self.config.cohort_size()

    def train_client(self, client: int, round: int, term: Term | None = None) -> Trained:
        """Trains the loaded model on a client's rows."""
        config = self.config
        examples, share = self._training_rows(client)
        rng = generator(config.seed, "batches", round, client)
        rows = training_batches(
            examples.lengths,
            config.batch_size,
            None if config.local_steps is None else config.local_steps * share,
            config.local_epochs,
            rng,
            config.bucketing,
        )
        batches = [examples.batch(r) for r in rows]
        self.set_trainable(round)

        def rate(step: int) -> float:
            return config.optimizer.rate(config.lr, round, config.num_rounds, step, len(batches))

        with torch_seed(config.seed, "dropout", round, client):
            loss = train(
                self.model, self.task.loss, batches, config.optimizer, rate, config.precision, term
            )
        steps = len(batches)
        return Trained(len(examples), loss, steps, sum(map(rate, range(steps))) / steps)

    def evaluate(
        self, examples: Examples, workers: int = 1, last: bool = False
    ) -> dict[str, float]:
        """Metrics of the loaded model; of generated text too where the task has them now."""
        outputs = self._outputs(self.task.evaluate_batch, examples, workers)
        rows = self.task.split_rows(examples.split)
        metrics = self.task.score(outputs, rows, self.processor)
        if self.task.generates(last):
            generate = partial(self.task.generate_batch, processor=self.processor)
            outputs = self._outputs(generate, examples, workers)
            found, self.samples = self.task.score_generated(outputs, rows, self.processor)
            metrics |= found
        return metrics

    def baseline(self, train: Examples, examples: Examples) -> float | None:
        """The headline measure of a constant answer that the training rows suggest."""
        if "labels" not in train.arrays:
            return None
        return self.task.baseline(train.labels, examples.labels)

    def _outputs(
        self, function: Callable[..., dict[str, Tensor]], examples: Examples, workers: int
    ) -> list[dict[str, Tensor]]:
        settings = self.config.evaluation
        return evaluate(
            self.model,
            function,
            examples,
            settings.batch_size,
            settings.max_tokens,
            self.config.precision,
            workers,
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("runtime.device=cuda, but torch sees no GPU in this process")
    return torch.device(name)


@lru_cache(maxsize=1)
def open_session(overrides: str, data_path: str | None) -> Session:
    """The process's session; another configuration takes its place.

    In one process the server and its clients share it: no argument has a default, since
    ``lru_cache`` would take a call that leaves it out for another session.
    """
    given: list[Any] = configuration.split(overrides)
    if data_path is not None:
        given.append(f"data.path='{data_path}'")
    return Session(configuration.load(given), data_path)
