"""A process's engine: it trains and evaluates clients on the resident model."""

import logging
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from fedpeft.config import load as configuration
from fedpeft.config.schema import Config
from fedpeft.data.batching import Batch, Examples
from fedpeft.data.clients import ClientRows
from fedpeft.engine.evaluate import evaluate
from fedpeft.engine.passes import Passes, train
from fedpeft.engine.plan import Job, Plan, Trained, plan
from fedpeft.engine.probing import Vectorised, vectorised
from fedpeft.engine.replica import Replica
from fedpeft.engine.together import IMAGE_TOKENS, Member, Together, clients_in_a_pass
from fedpeft.methods.base import Phase
from fedpeft.seeding import rng_state, torch_seed
from fedpeft.state import State, load_state

log = logging.getLogger(__name__)


class Result(NamedTuple):
    """The outcome of one client's training.

    Attributes:
        after: all parameters that can change, full.
        moments: the optimizer's state to keep; empty unless ``optimizer.keep_state``.
    """

    trained: Trained
    after: State
    moments: State


class Engine:
    """Trains and evaluates clients of one configuration in this process.

    Args:
        config: the run.
        data_path: this machine's own data folder; its rows are then one client's, undivided.
    """

    def __init__(self, config: Config, data_path: str | None = None) -> None:
        if data_path is not None and getattr(config.data, "labels", None) == []:
            raise ValueError(
                "a client with its own data-path needs data.labels=[...]: numbered from its own "
                "rows, its classes could differ from the others'"
            )
        self.config, self.task = config, config.data
        self.replica = Replica(config)
        self.rows = ClientRows(config, self.replica.processor, data_path is not None)
        self.samples: list[dict[str, str]] = []  # the last generated texts, beside references
        self._passes: dict[object, Passes] = {}
        self._together: dict[object, Together] = {}

    # --- training ------------------------------------------------------------------------------

    def train(self, jobs: Sequence[Job], round: int) -> Sequence[Result | Exception]:
        """Train several clients, all in one pass per step where the model allows it.

        Returns:
            For each job, in order, its result or the error that ended its training.
        """
        if len(jobs) > 1 and self.vectorised and self.config.accumulate == 1:
            try:
                return self._train_together(jobs, round)
            except Exception as error:  # trained alone, only clients at fault fail
                log.warning("clients train one by one from here on, for in one pass: %r", error)
                self.vectorised = None
        return [self._train_alone(job, round) for job in jobs]

    def _train_alone(self, job: Job, round: int) -> Result | Exception:
        try:
            return self.train_client(job, round)
        except Exception as error:
            return error

    def train_client(self, job: Job, round: int) -> Result:
        """Train one client through all phases of its round."""
        values, moments, parts = job.start, job.moments, []
        for path, phase, names in self._phases(job, round):
            plan = self._plan(job.client, path, phase)
            passes = self._ready(names, phase.setting)
            passes.flat.load(values)
            resting = {n: v for n, v in values.items() if n not in passes.flat.named}
            load_state(self.replica.model, resting)
            with torch_seed(self.config.seed, "dropout", *path):
                loss, state = train(
                    passes, plan.steps, plan.rate, self.config.optimizer, job.terms, moments
                )
            values, moments = values | passes.flat.state(), moments | state
            parts.append((names, plan, loss))
        return Result(self._trained(round, parts), values, moments)

    def _phases(self, job: Job, round: int) -> list[tuple[list[int], Phase, list[str]]]:
        """Return each phase with the path of its draws and the names that train."""
        trained = self.replica.roles.trained(round)
        phases = []
        for number, phase in enumerate(self.config.method.phases(job.at)):
            path = [round, job.client] + ([number] if number else [])
            if names := [name for name in trained if phase.trains(name)]:
                phases.append((path, phase, names))
        if not phases:
            raise ValueError(f"no parameter trains in round {round}")
        return phases

    def _trained(self, round: int, parts: list[tuple[list[str], Plan, float]]) -> Trained:
        """Sum up a client's phases; see ``Trained`` for the phases that count."""
        shared = set(self.replica.roles.shared(round))
        counted = [p for names, p, _ in parts if shared & set(names)] or [p for _, p, _ in parts]
        rates = [plan.rate(step) for plan in counted for step in range(len(plan.steps))]
        steps = sum(len(plan.steps) for _, plan, _ in parts)
        loss = sum(loss * len(plan.steps) for _, plan, loss in parts) / steps
        loss = parts[0][2] if len(parts) == 1 else loss
        return Trained(parts[0][1].num_examples, loss, len(rates), sum(rates) / len(rates))

    def _ready(self, names: Sequence[str], setting: str) -> Passes:
        """Return the cached passes over some trained parameters, and let only these train."""
        key = (tuple(names), setting)
        self.replica.set_trainable(set(names))
        self.config.method.arrange(self.replica.model, setting)
        for other, passes in self._passes.items():
            if other != key:
                passes.flat.release()
        if key in self._passes:
            self._passes[key].flat.attach()
        else:
            self._passes[key] = Passes(self.replica.model, self._loss, self.config.precision)
        return self._passes[key]

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task.loss(self.task.forward(model, batch), batch)

    def _train_together(self, jobs: Sequence[Job], round: int) -> list[Result | Exception]:
        results: dict[int, Result | Exception] = {}
        members = [Member(job, self._phases(job, round)) for job in jobs]
        for number in range(max(len(member.phases) for member in members)):
            self._phase_together([m for m in members if m.at_phase(number)], number)
        for i, member in enumerate(members):
            if member.error is None:
                trained = self._trained(round, member.parts)
                results[i] = Result(trained, member.values, member.moments)
            else:
                results[i] = member.error
        return [results[i] for i in range(len(jobs))]

    def _phase_together(self, members: Sequence[Member], number: int) -> None:
        """Run one phase of several clients; all clients of a round have the same phases."""
        if not members:
            return
        _, phase, names = members[0].phases[number]
        load_state(self.replica.model, members[0].values)
        self.replica.set_trainable(set(names))
        self.config.method.arrange(self.replica.model, phase.setting)
        self.replica.model.train()
        for member in members:
            path = member.phases[number][0]
            member.begin(self._plan(member.job.client, path, phase), self._draws(path))
        with torch_seed(self.config.seed, "cohort", members[0].phases[number][0][0]):
            self._stacked(names, phase.setting).train(members)
        for member in members:
            member.parts.append((names, member.plan, member.loss))

    def _stacked(self, names: Sequence[str], setting: str) -> Together:
        """Return the cached ``Together`` of some trained parameters."""
        key = (tuple(names), setting)
        if key not in self._together:
            random = self.vectorised is not None and self.vectorised.random
            self._together[key] = Together(self.replica, names, random)
        return self._together[key]

    def _draws(self, path: Sequence[int]) -> Tensor:
        """Return the state of torch's generator when a client begins a phase."""
        with torch_seed(self.config.seed, "dropout", *path):
            return rng_state(self.replica.device)

    def _plan(self, client: int, path: Sequence[int], phase: Phase) -> Plan:
        return plan(self.config, *self.rows.training(client), path, phase)

    # --- clients in a pass ---------------------------------------------------------------------

    @cached_property
    def vectorised(self) -> Vectorised | None:
        """The way in which clients can train in one pass; null if the model does not allow it."""
        return vectorised(self.replica, self.rows.examples("train"))

    def clients_per_pass(self) -> int:
        """Return ``runtime.clients_per_pass``; if null, the fastest number by a step's tokens."""
        config = self.config
        if config.runtime.clients_per_pass is not None:
            return config.runtime.clients_per_pass
        if config.accumulate > 1:
            return 1
        train = self.rows.examples("train")
        tokens = float((train.lengths * train.sequences).mean()) or IMAGE_TOKENS
        numbers = sum(value.numel() for value in self.replica.initial.values())
        kind = self.replica.device.type
        if kind == "cuda" and self.vectorised is not None and self.vectorised.random:
            # With dropout, one client's step can be replayed as a CUDA graph but a group's cannot,
            # so one client per pass is faster.
            return 1
        return clients_in_a_pass(config.batch_size * tokens, numbers, kind)

    def passes(self, clients: Sequence[int]) -> list[list[int]]:
        """Divide clients into groups that train in one pass, those with the most work first."""
        size = self.clients_per_pass()
        ordered = sorted(clients, key=self.work, reverse=True)
        count = -(-len(ordered) // size)
        return [[int(c) for c in part] for part in np.array_split(ordered, count)]

    def work(self, client: int) -> float:
        """Estimate a client's tokens in a round, or its rows if the task has no tokens."""
        config, lengths = self.config, np.maximum(self.rows.training(client)[0].lengths, 1)
        if config.local_steps is None:
            return float(lengths.sum())
        return float(lengths.mean()) * min(config.batch_size, len(lengths)) * config.local_steps

    # --- evaluation ----------------------------------------------------------------------------

    def evaluate(
        self, examples: Examples, workers: int = 1, last: bool = False
    ) -> dict[str, float]:
        """Return the loaded model's measures by name.

        Args:
            examples: rows to measure on.
            workers: threads that run batches at once.
            last: the run's last evaluation, in which tasks may also measure generated text.
        """
        outputs = self._outputs(self._evaluate_batch, examples, workers)
        rows: Any = self.task.split_rows(examples.split) if self.task.reads_rows else None
        metrics = self.task.score(outputs, rows, self.replica.processor)
        if self.task.generates(last):
            generate = partial(self.task.generate_batch, processor=self.replica.processor)
            outputs = self._outputs(generate, examples, workers)
            scored, self.samples = self.task.score_generated(outputs, rows, self.replica.processor)
            metrics |= scored
        return metrics

    def _evaluate_batch(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.task.evaluate_batch(self.task.forward(model, batch), batch)

    def baseline(self, train: Examples, examples: Examples) -> float | None:
        """Return the headline measure of one answer for all rows; null without labels.

        Args:
            train: rows that choose the answer.
            examples: rows to measure it on.
        """
        if "labels" not in train.arrays:
            return None
        return self.task.baseline(train.labels, examples.labels)

    def _outputs(
        self, function: Callable[..., dict[str, Tensor]], examples: Examples, workers: int
    ) -> list[dict[str, Tensor]]:
        settings, precision = self.config.evaluation, self.config.precision
        sizes = settings.batch_size, settings.max_tokens
        return evaluate(self.replica.model, function, examples, *sizes, precision, workers)


@lru_cache(maxsize=1)
def open_engine(overrides: str, data_path: str | None) -> Engine:
    """Return the process's engine of a configuration; only the last one is kept.

    In one process the server and its clients share it. No argument has a default, because
    ``lru_cache`` would take a call that leaves one out for another engine.
    """
    extended: list[Any] = configuration.split(overrides)
    if data_path is not None:
        extended.append(f"data.path='{data_path}'")
    return Engine(configuration.load_config(extended), data_path)
