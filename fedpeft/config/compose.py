"""The configuration as Hydra composes it from ``conf/`` and a list of overrides, untyped."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedpeft.config.overrides import key_of, readable, split
from fedpeft.config.schema import ConfigError
from fedpeft.config.sentences import hydra_sentence, several_values

_PACKAGE = Path(__file__).parent.parent
_packaged = _PACKAGE / "conf"  # in a wheel; in a checkout or bundle it stands beside the package
CONF = _packaged if _packaged.is_dir() else _PACKAGE.parent / "conf"
GROUPS = {  # base classes by name, because torch is imported only when a group is built
    "method": "fedpeft.methods.base.Method",
    "model": "fedpeft.models.pretrained.Pretrained",
    "data": "fedpeft.data.tasks.base.Task",
    "partition": "fedpeft.data.partitions.base.Partition",
    "strategy": "fedpeft.algorithms.base.FedAvg",
    "compression": "fedpeft.compression.base.Compression",
}
_FIELD = re.compile(
    rf"(({'|'.join(GROUPS)}|runtime|optimizer|evaluation|checkpoint|early_stopping|study|logger)"
    r"\.[\w.]+|lr|personal)="
)
_KEY = re.compile(r"[\w./@:$-]+", re.ASCII)
_VALUE = re.compile(r"(\+\+)?(?!hydra\.)[\w.]+=", re.ASCII)
_SEVERAL = re.compile(r"[,(]")  # characters, one of which several values have
# Keys of earlier versions, and their replacements.
_OLD = {
    "runtime.cohort": "is now runtime.clients_per_pass",
    "method.head": "is now personal=head, or personal=null, for every method",
    "unpadding": "is gone: buckets of rows of like length save nearly as much",
}
_lock = Lock()  # Hydra's compose is not thread-safe; a launch composes in a thread too


def composed(overrides: str | Sequence[str]) -> DictConfig:
    """Return the composed, untyped configuration.

    Raises:
        ConfigError: a key, group or name is unknown, or an override cannot be read.
    """
    return deepcopy(shared_tree(tuple(split(overrides))))


def leaves(tree: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """Return a configuration's values by dotted key; an empty group is a value."""
    flat: dict[str, Any] = {}

    def add(node: Any, path: str) -> None:
        if not isinstance(node, dict) or not node:
            flat[path] = node
            return
        for name, value in node.items():
            add(value, f"{path}.{name}" if path else str(name))

    add(OmegaConf.to_container(tree, resolve=resolve), "")
    return flat


def changed(tree: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return a composed configuration with overrides on top.

    Args:
        tree: a composed configuration, for example as a run's directory has it.
        overrides: overrides of keys, or of groups; a group's override replaces all that ``tree``
            has of it.

    Raises:
        ConfigError: an override cannot be read, or names no key and no group.
    """
    tree = deepcopy(tree)
    for override in sorted(overrides, key=lambda o: key_of(o) not in GROUPS):  # groups first
        key = key_of(override)
        if key in GROUPS:
            tree[key] = composed([override])[key]
            continue
        if key.partition(".")[0] not in tree or "=" not in override:
            raise ConfigError(f"{override} sets no key of the configuration: write key=value")
        try:
            (parsed,) = _parsed([readable(override)])
        except HydraException as error:
            raise ConfigError(hydra_sentence(error, overrides, list(leaves(tree)))) from error
        OmegaConf.update(tree, key, parsed.value(), force_add=True)
    return tree


def addable(override: str) -> str:
    """Return an override that may name any field of a group's class.

    Hydra alone overrides only fields that the YAML lists. Unknown fields are refused when the
    group is typed.
    """
    return "++" + override if _FIELD.match(override) else override


def _override(text: str) -> str:
    key = key_of(text)
    if key in _OLD:
        raise ConfigError(f"{key} {_OLD[key]}")
    if text.startswith("--"):
        raise ConfigError(
            f"unknown option {text}: fedpeft COMMAND --help shows a command's options"
        )
    if "=" not in text and not text.startswith("~"):
        raise ConfigError(f"{text} is no override: write key=value")
    if not _KEY.fullmatch(key):
        raise ConfigError(f"unknown key {key}")
    return addable(readable(text))


@lru_cache(maxsize=16)
def shared_tree(overrides: tuple[str, ...]) -> DictConfig:
    """Return the composed configuration that all callers share, so that nobody may change it.

    Choices of groups are composed, and values are set in a copy. Hydra takes 0.2 s for a
    composition, so one serves all runs that choose alike.
    """
    values = [o for o in overrides if _sets_value(o)]
    choices = [o for o in overrides if not _sets_value(o)]
    if any(o.startswith(("+", "~")) for o in choices):
        return _from_files(overrides)  # because the order counts of what is set, added and removed
    tree = _from_files(tuple(choices))
    if not values:
        return tree
    tree = deepcopy(tree)
    try:
        for override in _parsed([_override(o) for o in values]):
            if override.is_sweep_override():
                return _from_files(overrides)  # raises the error with its sentence
            key, added = override.key_or_group, override.is_force_add()
            OmegaConf.update(tree, key, override.value(), force_add=added)
    except (HydraException, OmegaConfBaseException, ValueError):
        return _from_files(overrides)  # likewise
    return tree


def _sets_value(override: str) -> bool:
    """Tell whether an override sets a key of the configuration, and chooses or removes nothing."""
    return _VALUE.match(override) is not None and key_of(override) not in _groups()


@cache
def _groups() -> set[str]:
    return {entry.name for entry in os.scandir(CONF) if entry.is_dir()}


def _parsed(overrides: Sequence[str]) -> list[Override]:
    with _lock:
        return OverridesParser.create().parse_overrides(list(overrides))


@lru_cache(maxsize=64)
def _from_files(overrides: tuple[str, ...]) -> DictConfig:
    try:
        listed = [_override(o) for o in overrides]
        for override in _parsed([o for o in listed if _SEVERAL.search(o)]):
            if override.is_sweep_override():
                raise ConfigError(several_values(override, _groups()))
        with composing():
            return compose("config", listed)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        known = list(leaves(_from_files(()), resolve=False)) if overrides else []
        raise ConfigError(hydra_sentence(error, overrides, known)) from error


@contextmanager
def composing() -> Iterator[None]:
    """Let Hydra compose from ``conf/``; one thread at a time."""
    with _lock:
        outer = GlobalHydra.instance().hydra  # the sweep's, if this is one of its jobs
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(CONF), version_base="1.3", job_name="fedpeft"):
                yield
        finally:
            GlobalHydra.instance().hydra = outer
