"""One typed configuration, composed by Hydra from ``conf/`` and a list of overrides."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedpeft.averaging import FedAvg
from fedpeft.data.partition import Partition
from fedpeft.data.text import TextClassification
from fedpeft.methods.base import Method
from fedpeft.models import Pretrained
from fedpeft.training import Optimization

_packaged = Path(__file__).parent / "conf"  # in a wheel; in a checkout or bundle it stands beside
CONF = _packaged if _packaged.is_dir() else Path(__file__).parent.parent / "conf"
GROUPS: dict[str, type] = {
    "method": Method,
    "model": Pretrained,
    "data": TextClassification,
    "partition": Partition,
    "strategy": FedAvg,
}
_FIELD = re.compile(rf"(({'|'.join(GROUPS)}|runtime|optimizer|evaluation)\.[\w.]+|lr)=")
_lock = Lock()  # Hydra's compose is not thread-safe; the simulation's server runs in a thread
T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key or value and the rule."""


@dataclass(frozen=True)
class Runtime:
    """Where clients run.

    Args:
        kind: ``ray`` (Flower's simulation) or ``inprocess`` (same apps and messages, one process).
        num_cpus: cores a client takes; cores / num_cpus clients run at once.
        num_gpus: share of a GPU a client takes, e.g. 0.5 for two clients a GPU.
        total_cpus: cores that Ray may use; null for all.
        threads: torch's threads in every process. Results are equal bit for bit only for equal
            numbers of threads, so it does not follow from the machine.
        device: ``auto`` (a GPU where one is given), ``cpu`` or ``cuda``.
        round_timeout: seconds to wait for a round's replies; who is late is left out.
        join_timeout: seconds to wait until all clients are there.
    """

    kind: str = "ray"
    num_cpus: float = 1
    num_gpus: float = 0
    total_cpus: int | None = None
    threads: int = 1
    device: str = "auto"
    round_timeout: float = 3600
    join_timeout: float = 120

    def __post_init__(self) -> None:
        if self.kind not in ("ray", "inprocess"):
            raise ValueError(f"runtime.kind must be ray or inprocess, got {self.kind}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"runtime.device must be auto, cpu or cuda, got {self.device}")
        if self.threads < 1 or self.num_cpus <= 0 or self.num_gpus < 0:
            raise ValueError(
                "runtime.threads must be >= 1, num_cpus > 0 and num_gpus >= 0, got "
                f"{self.threads}, {self.num_cpus} and {self.num_gpus}"
            )
        if self.round_timeout <= 0 or self.join_timeout <= 0:
            raise ValueError(
                "runtime.round_timeout and runtime.join_timeout must be > 0, got "
                f"{self.round_timeout} and {self.join_timeout}"
            )


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and when.

    Args:
        every: rounds between evaluations; the last round is always evaluated.
        clients: every client evaluates on its own validation and test rows: ``auto`` where the
            method keeps personal parameters, ``always`` or ``never``.
        batch_size: rows a batch.
        max_client_rows: at most so many rows of each of a client's own splits; null for all.
        interference: compute the aggregation's interference each round.
    """

    every: int = 1
    clients: str = "auto"
    batch_size: int = 64
    max_client_rows: int | None = None
    interference: bool = True

    def __post_init__(self) -> None:
        if self.every < 1 or self.batch_size < 1:
            raise ValueError(
                "evaluation.every and evaluation.batch_size must be >= 1, "
                f"got {self.every} and {self.batch_size}"
            )
        if self.max_client_rows is not None and self.max_client_rows < 1:
            raise ValueError(
                f"evaluation.max_client_rows must be >= 1 or null, got {self.max_client_rows}"
            )
        if self.clients not in ("auto", "always", "never"):
            raise ValueError(
                f"evaluation.clients must be auto, always or never, got {self.clients}"
            )


@dataclass(frozen=True)
class Config:
    """A run. ``clients_per_round`` is a count (int), a share (float) or null for all.

    A round is ``local_steps`` batches or, if that is null, ``local_epochs`` passes.
    """

    method: Any
    model: Any
    data: Any
    partition: Any
    strategy: Any
    runtime: Runtime = field(default_factory=Runtime)
    optimizer: Optimization = field(default_factory=Optimization)
    evaluation: Evaluation = field(default_factory=Evaluation)
    seed: int = 0
    num_clients: int = 5
    num_rounds: int = 10
    clients_per_round: int | float | None = None
    local_steps: int | None = 10
    local_epochs: int | None = None
    lr: float = 1e-3
    batch_size: int = 16
    bucketing: bool = True
    precision: str = "fp32"
    run_dir: str | None = None

    def __post_init__(self) -> None:
        for key in ("num_clients", "num_rounds", "batch_size"):
            _at_least_one(key, getattr(self, key))
        for key in ("local_steps", "local_epochs"):
            if getattr(self, key) is not None:
                _at_least_one(key, getattr(self, key))
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ConfigError(
                "give either local_steps or local_epochs and set the other to null, "
                f"got {self.local_steps} and {self.local_epochs}"
            )
        if not 0 < self.lr < float("inf"):
            raise ConfigError(f"lr must be > 0, got {self.lr}")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision must be fp32 or bf16, got {self.precision}")
        self.cohort_size()

    def cohort_size(self) -> int:
        """Clients of a round.

        Raises:
            ConfigError: a count above num_clients or below 1, or a share outside (0, 1].
        """
        given = self.clients_per_round
        if given is None:
            return self.num_clients
        if isinstance(given, int) and 1 <= given <= self.num_clients:
            return given
        if isinstance(given, float) and 0 < given <= 1:
            return max(1, round(given * self.num_clients))
        raise ConfigError(
            f"clients_per_round must be a count from 1 to num_clients={self.num_clients} or a "
            f"share in (0, 1] such as 0.5, got {given}"
        )


def _at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{key} must be >= 1, got {value}")


def split(overrides: str | Sequence[str]) -> list[str]:
    """Overrides as a list; a string is split as a shell would."""
    return shlex.split(overrides) if isinstance(overrides, str) else list(overrides)


def join(overrides: Sequence[str]) -> str:
    """Overrides as the one string that messages and run configurations carry."""
    return shlex.join(overrides)


def addable(override: str) -> str:
    """Lets ``group.field=value`` name any field of the group's class, listed in its YAML or not.

    Hydra only overrides what the YAML lists; which fields exist is checked when it is typed.
    """
    return "++" + override if _FIELD.match(override) else override


def _override(text: str) -> str:
    if "=" not in text and not text.startswith("~"):
        raise ConfigError(f"{text} is no override: write key=value")
    return addable(text)


def composed(overrides: str | Sequence[str]) -> DictConfig:
    """The composed, untyped configuration.

    Raises:
        ConfigError: an unknown key, group or name, or an override that is none.
    """
    with _lock:
        outer = GlobalHydra.instance().hydra  # a sweep's own, when this is one of its jobs
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(CONF), version_base="1.3", job_name="fedpeft"):
                return compose("config", [_override(o) for o in split(overrides)])
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(_sentence(error)) from error
        finally:
            GlobalHydra.instance().hydra = outer


def load(overrides: str | Sequence[str] = ()) -> Config:
    """The typed configuration for a list of overrides.

    Raises:
        ConfigError: as ``composed``, or a value of the wrong type or outside its rule.
    """
    tree = composed(overrides)
    try:
        values: dict[str, Any] = {name: _group(tree, name, base) for name, base in GROUPS.items()}
        scalars = [str(key) for key in tree if key not in GROUPS]
        typed = OmegaConf.merge(_writable(Config), OmegaConf.masked_copy(tree, scalars))
        plain = {key: _plain(typed, key) for key in scalars}
        return Config(**values, **plain)
    except OmegaConfBaseException as error:
        raise ConfigError(_sentence(error)) from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _plain(tree: Any, key: str) -> Any:
    node = tree[key]
    return OmegaConf.to_object(node) if OmegaConf.is_config(node) else node


def _writable(cls: type) -> Any:
    """OmegaConf's schema of a dataclass; that of a frozen one would refuse to be merged into."""
    schema = OmegaConf.structured(cls)
    OmegaConf.set_readonly(schema, False)
    for key in schema:
        if not OmegaConf.is_missing(schema, key) and OmegaConf.is_config(schema[key]):
            OmegaConf.set_readonly(schema[key], False)
    return schema


def _group(tree: DictConfig, name: str, base: type[T]) -> T:
    """Instance of a group's ``_target_``, its fields checked against the dataclass.

    Only classes of fedpeft are accepted: a client takes its configuration from the server.
    """
    node = tree[name].copy()
    OmegaConf.set_struct(node, False)
    target = node.pop("_target_", None)
    if not str(target).startswith("fedpeft."):
        raise ConfigError(f"{name}._target_ must be a class of fedpeft, got {target}")
    try:
        cls = get_class(str(target))
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{name}._target_: there is no class {target}") from error
    if not issubclass(cls, base):
        raise ConfigError(f"{name}._target_ must be a {base.__name__}, got {target}")
    try:
        value = OmegaConf.to_object(OmegaConf.merge(_writable(cls), node))
    except OmegaConfBaseException as error:
        raise ConfigError(_sentence(error, name + ".")) from error
    except ValueError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(name + ".") else f"{name}.{text}") from error
    assert isinstance(value, base)
    return value


# What Hydra and OmegaConf say, and what a person is told.
_WORDS = (
    (r"Could not override '(.+?)'.*", r"unknown key \1"),
    (r"Key '\w+' not in '(\w+)'; full_key: (.*)", r"unknown key \2: \1 has no such field"),
    (
        r"In '.*': Could not find '(\w+)/(.*?)'; Available options.*?:; (.*); Config search.*",
        r"\1 must be one of \3, got \2",
    ),
    (
        r"Value '(.*)' of type '\w+' .* (?:to|type hint) '?(.*?)'?; full_key: (.*)",
        r"\3 must be \2, got \1",
    ),
    (r"Value '(.*)' is not a valid (\w+) .*; full_key: (.*)", r"\3 must be \2, got \1"),
    (r"Incompatible value 'None' .* type '(\w+)'; full_key: (.*)", r"\2 must be \1, got null"),
    (r"Invalid value assigned: \w+ is not a ListConfig.*; full_key: (.*)", r"\1 must be a [list]"),
    (
        r"Merge error: \w+ is not a subclass of (\w+)\. value: (.*); full_key:.*",
        r"expected key=value pairs of \1, got \2",
    ),
)


def _sentence(error: Exception, group: str = "") -> str:
    """A Hydra error without its advice on Hydra's own flags; keys get their group in front."""
    advice = (
        "To append",
        "To override",
        "Set the env",
        "See http",
        "object_type",
        "reference_type",
    )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(advice)]
    cause = error.__cause__
    if cause is not None and str(cause).splitlines():
        first = str(cause).splitlines()[0].strip()
        if first and first not in " ".join(kept):
            kept.append(first)
    text = "; ".join(kept).replace("full_key: ", f"full_key: {group}")
    if isinstance(error, OverrideParseException) and error.override not in text:
        text = f"{error.override}: {text}"
    for pattern, plain in _WORDS:
        if found := re.fullmatch(pattern, text):
            return found.expand(plain).replace("; ", ", ")
    return text
