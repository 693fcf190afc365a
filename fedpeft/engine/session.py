"""What a process needs for one configuration: built once, resident over all its messages."""

import logging
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.algorithms.base import Setting, Term
from fedpeft.config import load as configuration
from fedpeft.config.schema import Config
from fedpeft.data.batching import Examples
from fedpeft.data.clients import Holdings
from fedpeft.engine.passes import Passes, evaluate, train
from fedpeft.engine.plan import Plan, Trained, Work, plan
from fedpeft.engine.probing import together
from fedpeft.engine.together import IMAGE_TOKENS, Cohort, Member, members
from fedpeft.methods.base import TRAINED, Role, State
from fedpeft.models.precision import halve_frozen, train_in_float32
from fedpeft.seeding import rng_state, torch_seed
from fedpeft.state import blocks, down_names, filled, load_state, names_with, roles, snapshot

log = logging.getLogger(__name__)


class Session:
    """A configuration's injected model and tokenised rows.

    The model is one for all clients of a process, so every use begins with ``load``, which sets
    every trainable parameter: nothing of the client before is left.

    Args:
        data_path: this machine's own data folder; its rows are then one client's, undivided.
    """

    def __init__(self, config: Config, data_path: str | None = None) -> None:
        torch.set_num_threads(config.runtime.threads)
        config.method.check(config.num_rounds)
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
        if config.precision == "bf16":
            halve_frozen(model)
        self.model: nn.Module = model.to(_device(config.runtime.device))
        self.trainable = [n for n, p in self.model.named_parameters() if p.requires_grad]
        self.initial = snapshot(self.model, self.trainable)
        config.strategy.check(self._setting())
        config.compression.check(self._setting())
        self._ready: Passes | None = None
        self._ready_cohort: Cohort | None = None
        self.samples: list[dict[str, str]] = []  # the last generated texts, beside references
        self.rows = Holdings(config, self.processor, self.owns_all_rows)
        self.examples, self.client_examples = self.rows.examples, self.rows.client_examples

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

    def values(self, *states: State, client: int | None = None) -> State:
        """Every parameter that can change: its initial value, or that in the last of ``states``.

        Args:
            client: whose blocks they are, the rest being zero; null for whole parameters.
        """
        initial = self.initial
        if client is not None:
            initial = filled(self.blocks(initial, client), initial)
        for state in states:
            initial = initial | filled(state, self.initial)
        return initial

    def load(self, *states: State, client: int | None = None) -> None:
        """Sets every parameter that can change to ``values``."""
        load_state(self.model, self.values(*states, client=client))

    def set_trainable(self, round: int) -> None:
        """``requires_grad`` by role."""
        by_name = self.roles(round)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(by_name.get(name) in TRAINED)

    @property
    def client_rows(self) -> list[np.ndarray]:
        """Row numbers of the training split by client."""
        return self.rows.by_client

    def work(self, client: int) -> float:
        """About how many tokens a client sees in a round, or rows where there are no tokens."""
        config, lengths = self.config, np.maximum(self.rows.training(client)[0].lengths, 1)
        if config.local_steps is None:
            return float(lengths.sum())
        return float(lengths.mean()) * min(config.batch_size, len(lengths)) * config.local_steps

    def together(self) -> int:
        """How many clients train in one pass: ``runtime.cohort``, or by the tokens of a step."""
        train = self.examples("train")
        tokens = float((train.lengths * train.sequences).mean()) or IMAGE_TOKENS
        numbers = sum(value.numel() for value in self.initial.values())
        device = next(self.model.parameters()).device.type
        config = self.config
        if config.runtime.cohort is not None:
            return config.runtime.cohort
        if device == "cuda" and self._together == "random":
            return 1  # whose steps are captured, and those of a cohort that draws are not
        return members(config.batch_size * tokens, numbers, device)

    def train(
        self, works: Sequence[Work], round: int
    ) -> Sequence[tuple[Trained, State] | Exception]:
        """What several clients' training was, and their values of all that can change after it.

        They train in one pass a step where the model allows it, else one after another.
        """
        if len(works) > 1 and self._together:
            try:
                return self._train_together(works, round)
            except Exception as error:  # alone, it is one client's error, or none's
                log.warning("clients train one by one from here on, for in one pass: %r", error)
                self._together = None
        return [self._train_alone(work, round) for work in works]

    def _train_alone(self, work: Work, round: int) -> tuple[Trained, State] | Exception:
        try:
            flat = self._passes(round).flat
            flat.load(work.start)
            others = {n: v for n, v in work.start.items() if n not in flat.named}
            load_state(self.model, others)
            trained = self.train_client(work.client, round, work.term)
        except Exception as error:
            return error
        return trained, work.start | flat.state()

    def train_client(self, client: int, round: int, term: Term | None = None) -> Trained:
        """Trains the loaded model on a client's rows."""
        config, plan = self.config, self._plan(client, round)
        passes = self._passes(round)
        with torch_seed(config.seed, "dropout", round, client):
            loss = train(passes, plan.batches, config.optimizer, plan.rate, term)
        return plan.done(loss)

    def _passes(self, round: int) -> Passes:
        """Those that stand ready if the same parameters trained last, else new ones."""
        self.set_trainable(round)
        names = {name for name, role in self.roles(round).items() if role in TRAINED}
        if self._ready is None or self._ready.flat.named.keys() != names:
            if self._ready is not None:
                self._ready.flat.release()
            self._ready = Passes(self.model, self.task.loss, self.config.precision)
        return self._ready

    def _train_together(
        self, works: Sequence[Work], round: int
    ) -> list[tuple[Trained, State] | Exception]:
        plans = [self._plan(work.client, round) for work in works]
        load_state(self.model, works[0].start)
        self.set_trainable(round)
        self.model.train()
        members = [
            Member(plan.batches, plan.rate, work.start, work.term, self._draws(work.client, round))
            for work, plan in zip(works, plans, strict=True)
        ]
        with torch_seed(self.config.seed, "cohort", round):  # puts the generators back afterwards
            found = self._cohort(round).train(members)
        return [
            result if isinstance(result, Exception) else (plan.done(result[0]), result[1])
            for plan, result in zip(plans, found, strict=True)
        ]

    def _cohort(self, round: int) -> Cohort:
        """That which stands ready if the same parameters trained last, else a new one."""
        names = [name for name, role in self.roles(round).items() if role in TRAINED]
        if self._ready_cohort is None or self._ready_cohort.trained != names:
            config, random = self.config, self._together == "random"
            self._ready_cohort = Cohort(
                self.model, self.task, names, config.optimizer, config.precision, random
            )
        return self._ready_cohort

    def _draws(self, client: int, round: int) -> Tensor:
        """State of torch's generator when a client begins."""
        with torch_seed(self.config.seed, "dropout", round, client):
            return rng_state(next(self.model.parameters()).device)

    @cached_property
    def _together(self) -> str | None:
        return together(self.config, self.model, self.trainable, self.examples("train"))

    def _plan(self, client: int, round: int) -> Plan:
        return plan(self.config, *self.rows.training(client), client, round)

    def evaluate(
        self, examples: Examples, workers: int = 1, last: bool = False
    ) -> dict[str, float]:
        """Metrics of the loaded model; of generated text too where the task has them now."""
        outputs = self._outputs(self.task.evaluate_batch, examples, workers)
        rows: Any = self.task.split_rows(examples.split) if self.task.reads_rows else None
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
        settings, precision = self.config.evaluation, self.config.precision
        sizes = settings.batch_size, settings.max_tokens
        return evaluate(self.model, function, examples, *sizes, precision, workers)


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
    return Session(configuration.load_config(given), data_path)
