"""A process's engine: it trains and evaluates clients on the resident model."""

import logging
import time
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from fedpeft.config.load import load_config
from fedpeft.config.overrides import quoted, split
from fedpeft.config.schema import Config
from fedpeft.data.batching import Batch, Examples
from fedpeft.data.clients import ClientRows
from fedpeft.engine.evaluate import scored
from fedpeft.engine.passes import Passes, train
from fedpeft.engine.plan import Ended, Job, Part, Plan, Trained, num_steps, plan
from fedpeft.engine.probing import Vectorised, vectorised
from fedpeft.engine.replica import Replica
from fedpeft.engine.together import IMAGE_TOKENS, Member, Together, clients_in_a_pass
from fedpeft.methods.base import At
from fedpeft.nn.virtual import text_limit
from fedpeft.seeding import rng_state, torch_seed
from fedpeft.state import State, load_state

log = logging.getLogger(__name__)


class Result(NamedTuple):
    """The outcome of one client's training.

    Attributes:
        trained: counts and means, see ``Trained``.
        after: all parameters that can change, full.
        moments: the optimizer's state to keep; empty unless ``optimizer.keep_state``.
        seconds: seconds that the training took; for clients in one pass, the whole pass's.
    """

    trained: Trained
    after: State
    moments: State
    seconds: float


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
        limit = text_limit(self.replica.model)
        self.rows = ClientRows(config, self.replica.processor, data_path is not None, limit)
        self.samples: list[dict[str, str]] = []  # the last generated texts, beside references
        self._passes: dict[object, Passes] = {}
        self._together: dict[object, Together] = {}

    # --- training ------------------------------------------------------------------------------

    def train(self, jobs: Sequence[Job]) -> Sequence[Result | Exception]:
        """Train several clients of a round, all in one pass per step where the model allows it.

        Returns:
            For each job, in order, its result or the error that ended its training.
        """
        alone = self.vectorised is Vectorised.NO or self.config.accumulate > 1
        if len(jobs) > 1 and not alone:
            try:
                return self._train_together(jobs)
            except Exception as error:  # trained alone, only clients at fault fail
                log.warning("clients train one by one from here on, for in one pass: %r", error)
                self.vectorised = Vectorised.NO
        return [self._train_alone(job) for job in jobs]

    def _train_alone(self, job: Job) -> Result | Exception:
        try:
            return self.train_client(job)
        except Exception as error:
            return error

    def train_client(self, job: Job) -> Result:
        """Train one client through all phases of its round."""
        begun = time.perf_counter()
        values, moments, ended = job.start, job.moments, []
        for part in self._parts(job):
            plan = self._plan(job.client, part)
            passes = self._ready(part.names, part.phase.setting)
            passes.flat.load(values)
            resting = {n: v for n, v in values.items() if n not in passes.flat.named}
            load_state(self.replica.model, resting)
            with torch_seed(self.config.seed, "dropout", *part.path):
                loss, last_moments = train(
                    passes, plan.steps, plan.rate, self.config.optimizer, job.terms, moments
                )
            values, moments = values | passes.flat.state(), moments | last_moments
            ended.append(Ended(part.names, plan, loss))
        trained = self._trained(job.at.round, ended)
        return Result(trained, values, moments, time.perf_counter() - begun)

    def _parts(self, job: Job) -> list[Part]:
        """Return the phases in which something trains."""
        round = job.at.round
        trained = self.replica.roles.trained(round)
        parts = []
        for number, phase in enumerate(self.config.method.phases(job.at)):
            path = [round, job.client] + ([number] if number else [])
            if names := [name for name in trained if phase.trains(name)]:
                parts.append(Part(path, phase, names))
        if not parts:
            raise ValueError(f"no parameter trains in round {round}")
        return parts

    def _trained(self, round: int, ended: list[Ended]) -> Trained:
        """Sum up a client's parts; see ``Trained`` for those that count."""
        shared = set(self.replica.roles.shared(round))
        counted = [part for part in ended if shared & set(part.names)] or ended
        rates = [part.plan.rate(i) for part in counted for i in range(len(part.plan.steps))]
        steps = [len(part.plan.steps) for part in ended]
        loss = sum(part.loss * n for part, n in zip(ended, steps, strict=True)) / sum(steps)
        if len(ended) == 1:
            loss = ended[0].loss  # as it is, because x n / n may round
        return Trained(ended[0].plan.num_examples, loss, len(rates), sum(rates) / len(rates))

    def shared_steps(self, at: At, rows: int) -> int:
        """Return the steps that a client of so many training rows takes on what is shared."""
        shared = self.replica.roles.shared(at.round)
        trained = self.replica.roles.trained(at.round)
        phases = [p for p in self.config.method.phases(at) if any(map(p.trains, trained))]
        counted = [p for p in phases if any(map(p.trains, shared))] or phases
        return len(counted) * num_steps(self.config, rows)

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

    def _train_together(self, jobs: Sequence[Job]) -> list[Result | Exception]:
        begun = time.perf_counter()
        results: dict[int, Result | Exception] = {}
        members = [Member(job, self._parts(job)) for job in jobs]
        kinds = [[(part.phase.setting, part.names) for part in m.parts] for m in members]
        if any(kind != kinds[0] for kind in kinds):
            raise ValueError("the phases of a round differ by client")
        for number in range(len(kinds[0])):
            self._phase_together([m for m in members if m.error is None], number)
        for i, member in enumerate(members):
            if member.error is None:
                trained = self._trained(member.job.at.round, member.ended)
                seconds = time.perf_counter() - begun
                results[i] = Result(trained, member.values, member.moments, seconds)
            else:
                results[i] = member.error
        return [results[i] for i in range(len(jobs))]

    def _phase_together(self, members: Sequence[Member], number: int) -> None:
        """Run one phase of several clients; all clients of a round have the same phases."""
        if not members:
            return
        (round, *_), phase, names = members[0].parts[number]
        load_state(self.replica.model, members[0].values)
        self.replica.set_trainable(set(names))
        self.config.method.arrange(self.replica.model, phase.setting)
        self.replica.model.train()
        for member in members:
            part = member.parts[number]
            member.begin(self._plan(member.job.client, part), self._draws(part.path))
        with torch_seed(self.config.seed, "cohort", round):
            self._stacked(names, phase.setting).train(members)
        for member in members:
            member.ended.append(Ended(names, member.plan, member.loss))

    def _stacked(self, names: Sequence[str], setting: str) -> Together:
        """Return the cached ``Together`` of some trained parameters."""
        key = (tuple(names), setting)
        if key not in self._together:
            draws = self.vectorised is Vectorised.WITH_DRAWS
            self._together[key] = Together(self.replica, names, draws)
        return self._together[key]

    def _draws(self, path: Sequence[int]) -> Tensor:
        """Return the state of torch's generator when a client begins a phase."""
        with torch_seed(self.config.seed, "dropout", *path):
            return rng_state(self.replica.device)

    def _plan(self, client: int, part: Part) -> Plan:
        return plan(self.config, *self.rows.training(client), part.path)

    # --- clients in a pass ---------------------------------------------------------------------

    @cached_property
    def vectorised(self) -> Vectorised:
        """The way in which clients can train in one pass."""
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
        if kind == "cuda" and self.vectorised is Vectorised.WITH_DRAWS:
            # With dropout, one client's step can be replayed as a CUDA graph but a group's cannot,
            # so one client per pass is faster.
            return 1
        return clients_in_a_pass(config.batch_size * tokens, numbers, kind)

    def groups(self, clients: Sequence[int]) -> list[list[int]]:
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
        model, processor = self.replica.model, self.replica.processor
        metrics, samples = scored(model, self.config, processor, examples, workers, last)
        if samples is not None:
            self.samples = samples
        return metrics

    def baseline(self, train: Examples, examples: Examples) -> float | None:
        """Return the headline measure of one answer for all rows; null without labels.

        Args:
            train: rows that choose the answer.
            examples: rows to measure it on.
        """
        if "labels" not in train.arrays:
            return None
        return self.task.baseline(train.labels, examples.labels)


@lru_cache(maxsize=1)
def open_engine(overrides: str, data_path: str | None) -> Engine:
    """Return the process's engine of a configuration; only the last one is kept.

    In one process the server and its clients share it. No argument has a default, because
    ``lru_cache`` would take a call that leaves one out for another engine.
    """
    extended: list[Any] = split(overrides)
    if data_path is not None:
        # The client divides the rows of its own folder by itself, so no split need be there.
        extended += [f"data.path={quoted(data_path)}", "data.missing_split=error"]
    return Engine(load_config(extended), data_path)
