"""The typed configuration of a run; each value is checked where it is set."""

import math
from dataclasses import dataclass, field
from typing import Any

from fedpeft.config.optimization import Optimization
from fedpeft.config.runtime import Runtime


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key or value and the rule."""


MOST = 10**7  # largest count; a larger one is a slip, and would only keep a client busy


@dataclass(frozen=True)
class Evaluation:
    """Settings of evaluations.

    Args:
        every: rounds between evaluations; the last round is always evaluated.
        clients: every client evaluates on its own validation and test rows: ``auto`` (if any
            parameter is personal), ``always`` or ``never``.
        batch_size: most rows in a batch.
        max_tokens: most tokens in a batch, its sequences x its longest length. A language model
            that caps or scales its logits, such as Gemma 2, holds the whole batch's logits: 4 bytes
            x tokens x size of the vocabulary. Other models hold a few at a time.
        max_client_rows: most rows of each of a client's own splits; null for all.
        interference: compute the aggregation's interference in the rounds that are evaluated.
    """

    every: int = 1
    clients: str = "auto"
    batch_size: int = 64
    max_tokens: int = 8192
    max_client_rows: int | None = None
    interference: bool = True

    def __post_init__(self) -> None:
        for key in ("every", "batch_size", "max_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"evaluation.{key} must be >= 1, got {getattr(self, key)}")
        if self.max_client_rows is not None and self.max_client_rows < 1:
            raise ValueError(
                f"evaluation.max_client_rows must be >= 1 or null, got {self.max_client_rows}"
            )
        if self.clients not in ("auto", "always", "never"):
            raise ValueError(
                f"evaluation.clients must be auto, always or never, got {self.clients}"
            )


@dataclass(frozen=True)
class Checkpointing:
    """Checkpoints in the run's directory, from which ``resume=true`` goes on.

    Args:
        every: rounds between checkpoints; the last round always has one.
        keep: number of the last checkpoints that stay.
    """

    every: int = 1
    keep: int = 2

    def __post_init__(self) -> None:
        for key in ("every", "keep"):
            if getattr(self, key) < 1:
                raise ValueError(f"checkpoint.{key} must be >= 1, got {getattr(self, key)}")


@dataclass(frozen=True)
class EarlyStopping:
    """Settings of early stopping, which ends a run before its last round.

    Args:
        patience: evaluations in a row without a better measure on validation rows, by the measure
            that selects the best round; null to run all rounds.
    """

    patience: int | None = None

    def __post_init__(self) -> None:
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"early_stopping.patience must be >= 1 or null, got {self.patience}")


@dataclass(frozen=True)
class Studying:
    """Settings of ``fedpeft study``, where its options do not set them; a run reads none.

    ``fedpeft compare`` reads ``methods`` and ``questions``.

    Args:
        methods: entries of a table, each a method with overrides of its own, joined by ``+``.
        lrs: learning rates; each method's own if empty.
        seeds: seeds; the run's if empty.
        common: overrides of every run, such as ``model=minilm``, below those of the command.
        cells: overrides of each table, as one text, such as ``data=sst2 num_clients=3``; each has
            a folder of its own. One table without any if empty.
        extend: most learning rates that are added, one at a time, on the side where a method's best
            one is the grid's first or last.
        finalists: number of an entry's learning rates with which the seeds after the first are run:
            the best ones of the first seed by validation. Rates that ``extend`` adds later are run
            too. Null for all. It is one step of successive halving (arXiv 1502.07943).
        reuse_lrs: search learning rates in the first table alone, and give each method of the other
            tables the rate that was best there.
        estimate: print memory, hours and bytes before the first run.
        flops: floating-point operations a second that a machine reaches, for the estimate.
        questions: test rows that each model of a comparison answers at its end, beside the untuned
            model. The task must generate text.
    """

    methods: list[str] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    common: list[str] = field(default_factory=list)
    cells: list[str] = field(default_factory=list)
    extend: int = 0
    finalists: int | None = None
    reuse_lrs: bool = False
    estimate: bool = False
    flops: float = 1e14
    questions: int = 0

    def __post_init__(self) -> None:
        for name in ("extend", "questions"):
            if getattr(self, name) < 0:
                raise ValueError(f"study.{name} must be >= 0, got {getattr(self, name)}")
        if self.finalists is not None and self.finalists < 1:
            raise ValueError(f"study.finalists must be >= 1 or null, got {self.finalists}")
        if not 0 < self.flops < float("inf"):
            raise ValueError(f"study.flops must be > 0, got {self.flops}")


@dataclass(frozen=True)
class Settings:
    """A run's numbers.

    In a round, a client takes ``local_steps`` batches or, if that is null, ``local_epochs`` epochs.

    Args:
        seed: seed from which the run's draws derive, except draws of rows that are set aside or
            limited, and draws for which the method has its own seed; >= 0.
        num_clients: parts into which the training rows are divided, one a client.
        num_rounds: rounds of the run; 0 to measure the model as it is before training.
        local_steps: batches that a client trains on in a round; null with ``local_epochs``.
        local_epochs: times that a client goes through its rows in a round; null with
            ``local_steps``.
        clients_per_round: a count (int), a share (float) or null for all.
        lr: learning rate before the schedules.
        batch_size: rows of a training batch.
        accumulate: parts in which a batch is computed, for batches that a GPU cannot hold. The
            gradient equals the whole batch's, apart from dropout's draws.
        personal: ``head`` or shell patterns of parameter names: shared parameters that match stay
            on the client.
        frozen: the same for parameters that do not train at all.
        layers: blocks that the method changes: ``all``, ``first:N``, ``last:N``, or a list of
            numbers from 0, where -1 is the last block.
        bucketing: batch rows of like length, for less padding.
        precision: ``fp32``, or ``bf16`` for autocast.
        run_dir: the run's directory; null for ``runs/<time>_<method>``.
        resume: go on with the run in ``run_dir`` from its last checkpoint, if there is one.
        logs: ``text``, or ``json`` for an object a line on standard error.
        metrics_port: port on 127.0.0.1 at which Prometheus reads the run's numbers; null for none.
        check: the ServerApp checks itself and the nodes, and trains nothing.
    """

    runtime: Runtime = field(default_factory=Runtime)
    optimizer: Optimization = field(default_factory=Optimization)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    study: Studying = field(default_factory=Studying)
    seed: int = 0
    num_clients: int = 5
    num_rounds: int = 10
    clients_per_round: int | float | None = None
    local_steps: int | None = 10
    local_epochs: int | None = None
    lr: float = 1e-3
    batch_size: int = 16
    accumulate: int = 1
    personal: Any = None
    frozen: Any = None
    layers: Any = "all"
    bucketing: bool = True
    precision: str = "fp32"
    run_dir: str | None = None
    resume: bool = False
    logs: str = "text"
    metrics_port: int | None = None
    check: bool = False

    def __post_init__(self) -> None:
        for key in ("num_clients", "batch_size", "accumulate"):
            _in_range(key, getattr(self, key))
        _in_range("num_rounds", self.num_rounds, least=0)
        for key in ("local_steps", "local_epochs"):
            if getattr(self, key) is not None:
                _in_range(key, getattr(self, key))
        if self.seed < 0:
            raise ConfigError(f"seed must be >= 0, got {self.seed}")
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ConfigError(
                "give either local_steps or local_epochs and set the other to null, "
                f"got {self.local_steps} and {self.local_epochs}"
            )
        if not 0 < self.lr < float("inf"):
            raise ConfigError(f"lr must be > 0, got {self.lr}")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision must be fp32 or bf16, got {self.precision}")
        for key in ("personal", "frozen"):
            _check_patterns(key, getattr(self, key))
        _check_layers(self.layers)
        if self.accumulate > 1 and (self.runtime.clients_per_pass or 1) > 1:
            raise ConfigError(
                f"accumulate={self.accumulate} computes a client's batch in parts, but "
                f"runtime.clients_per_pass={self.runtime.clients_per_pass} puts several clients' "
                "batches into one pass: set one of them to 1"
            )
        if self.logs not in ("text", "json"):
            raise ConfigError(f"logs must be text or json, got {self.logs}")
        if self.metrics_port is not None and not 0 < self.metrics_port < 2**16:
            raise ConfigError(
                f"metrics_port must be from 1 to {2**16 - 1} or null, got {self.metrics_port}"
            )
        if self.resume and not self.run_dir:
            raise ConfigError("resume=true goes on with a run: give its run_dir")
        self.cohort_size()

    def fewest_replies(self, clients: int) -> int:
        """Return how many usable replies a round of so many clients needs, at most all."""
        asked = self.runtime.min_replies
        return min(clients, math.ceil(asked * clients) if isinstance(asked, float) else asked)

    def evaluates(self, round: int) -> bool:
        """Tell whether a round ends with an evaluation."""
        return round % self.evaluation.every == 0 or round == self.num_rounds

    def cohort_size(self) -> int:
        """Return the number of clients of a round.

        Raises:
            ConfigError: a count above num_clients or below 1, or a share outside (0, 1].
        """
        wanted = self.clients_per_round
        if wanted is None:
            return self.num_clients
        if isinstance(wanted, int) and 1 <= wanted <= self.num_clients:
            return wanted
        if isinstance(wanted, float) and 0 < wanted <= 1:
            return max(1, round(wanted * self.num_clients))
        raise ConfigError(
            f"clients_per_round must be a count from 1 to num_clients={self.num_clients} or a "
            f"share in (0, 1] such as 0.5, got {wanted}"
        )


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """A run's numbers, with the objects that the configuration's groups choose."""

    method: Any
    model: Any
    data: Any
    partition: Any
    strategy: Any
    compression: Any


def _in_range(key: str, value: int, least: int = 1) -> None:
    if value < least:
        raise ConfigError(f"{key} must be >= {least}, got {value}")
    if value > MOST:
        raise ConfigError(f"{key} must be <= {MOST}, got {value}")


def _check_patterns(key: str, value: Any) -> None:
    patterns = [value] if isinstance(value, str) else value
    if patterns is None or (
        isinstance(patterns, list) and all(isinstance(p, str) for p in patterns)
    ):
        return
    raise ConfigError(
        f"{key} must be head, a pattern of names, a list of them or null, got {value}"
    )


def _check_layers(value: Any) -> None:
    numbers = isinstance(value, list) and value and all(type(n) is int for n in value)
    if not (numbers or isinstance(value, str)):
        raise ConfigError(
            f"layers must be all, first:N, last:N or a list of block numbers, got {value}"
        )
