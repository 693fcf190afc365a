"""One typed configuration, composed by Hydra from ``conf/`` and a list of overrides."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import cache, lru_cache
from importlib import import_module
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
from fedpeft.config.schema import Config, ConfigError, Settings
from fedpeft.config.sentences import hydra_sentence, omegaconf_sentence, several_values

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
FAST_GROUPS = ("partition", "data")  # groups whose classes import neither transformers nor peft
PATHS = ("data.path", "model.path", "model.tokenizer_path")  # keys of files and folders
TRACKER = "fedpeft.reporting.trackers.base.Tracker"
_FIELD = re.compile(
    rf"(({'|'.join(GROUPS)}|runtime|optimizer|evaluation|checkpoint|early_stopping|study|logger)"
    r"\.[\w.]+|lr|personal)="
)
_KEY = re.compile(r"[\w./@:$-]+", re.ASCII)
_VALUE = re.compile(r"(\+\+)?(?!hydra\.)[\w.]+=", re.ASCII)
_SEVERAL = re.compile(r"[,(]")  # characters, one of which several values have
_lock = Lock()  # Hydra's compose is not thread-safe; a launch composes in a thread too


def addable(override: str) -> str:
    """Return an override that may name any field of a group's class.

    Hydra alone overrides only fields that the YAML lists. Unknown fields are refused when the
    group is typed.
    """
    return "++" + override if _FIELD.match(override) else override


# Keys of earlier versions, and their replacements.
_OLD = {
    "runtime.cohort": "is now runtime.clients_per_pass",
    "method.head": "is now personal=head, or personal=null, for every method",
    "unpadding": "is gone: buckets of rows of like length save nearly as much",
}


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


def composed(overrides: str | Sequence[str]) -> DictConfig:
    """Return the composed, untyped configuration.

    Raises:
        ConfigError: a key, group or name is unknown, or an override cannot be read.
    """
    return deepcopy(_composed(tuple(split(overrides))))


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


@lru_cache(maxsize=16)
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    """Compose the choices of groups, and set the values in a copy.

    Hydra takes 0.2 s for a composition, so one serves all runs that choose alike.
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


def load_config(overrides: str | Sequence[str] = ()) -> Config:
    """Return the typed configuration.

    Raises:
        ConfigError: the overrides cannot be composed, see ``composed``, or a value has the wrong
            type or is outside its rule.
    """
    return typed(_composed(tuple(split(overrides))))


def typed(tree: DictConfig) -> Config:
    """Return the typed form of a composed configuration.

    Raises:
        ConfigError: a value of the wrong type or outside its rule.
    """
    with _config_errors():
        groups = {name: _group(tree[name], name, base) for name, base in GROUPS.items()}
        return Config(**_ungrouped(tree), **groups)


def check_fields(overrides: str | Sequence[str]) -> None:
    """Check the groups whose fields the overrides set; groups that import least come first.

    Files of ``conf/`` hold no impossible value, so other groups need no check before a run loads
    what takes seconds.

    Raises:
        ConfigError: a value of the wrong type or outside its rule.
    """
    listed = split(overrides)
    named = {key_of(o).partition(".")[0] for o in listed if "." in key_of(o)}
    tree = _composed(tuple(listed))
    with _config_errors():
        for name in (*FAST_GROUPS, *(group for group in GROUPS if group not in FAST_GROUPS)):
            if name in named:
                _group(tree[name], name, GROUPS[name])


def trackers(overrides: str | Sequence[str]) -> list[Any]:
    """Return the settings of the trackers that ``logger`` chooses, which needs no torch.

    Raises:
        ConfigError: an override or a value is wrong, see ``load_config``, or the extra of a tracker
            is not installed.
    """
    chosen = _composed(tuple(split(overrides))).get("logger", {})
    with _config_errors():
        for name, node in chosen.items():
            if not OmegaConf.is_dict(node) or "_target_" not in node:
                raise ConfigError(f"logger.{name} is set, but not chosen: add logger={name}")
        listed = [_group(node, f"logger.{name}", TRACKER) for name, node in chosen.items()]
        for tracker in listed:
            tracker.check()
    return listed


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


def settings(overrides: str | Sequence[str] = ()) -> Settings:
    """Return the typed configuration without the groups, which needs no torch.

    Raises:
        ConfigError: an override or a value is wrong, see ``load_config``.
    """
    return _settings(tuple(split(overrides)))


@lru_cache(maxsize=16)
def _settings(overrides: tuple[str, ...]) -> Settings:
    tree = _composed(overrides)
    with _config_errors():
        return Settings(**_ungrouped(tree))


@contextmanager
def _config_errors() -> Iterator[None]:
    """Turn the error of a wrong value into a ConfigError."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise ConfigError(omegaconf_sentence(error)) from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _class(name: str, target: str) -> type:
    """Import the class of a group.

    Raises:
        ConfigError: there is no such class, or its module has a fault.
    """
    module, _, cls = target.rpartition(".")
    found = None
    try:
        found = getattr(import_module(module), cls, None)
    except Exception as error:  # whatever a module does while it is imported
        absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(
            f"{error.name}."
        )
        if not absent:
            fault = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{name}._target_: {module} cannot be imported, {fault}") from error
    if not isinstance(found, type):
        raise ConfigError(f"{name}._target_: there is no class {target}")
    return found


def _ungrouped(tree: DictConfig) -> dict[str, Any]:
    """Return the typed values of the keys outside of the groups."""
    keys = [str(key) for key in tree if key not in GROUPS and key != "logger"]
    _check_nested(tree)
    merged = OmegaConf.merge(_writable(Settings), OmegaConf.masked_copy(tree, keys))
    return {key: _plain(merged, key) for key in keys}


def _check_nested(tree: DictConfig) -> None:
    """Refuse one value in place of a group of keys, because OmegaConf's error names no key."""
    for field in fields(Settings):
        cls = field.type
        if not (isinstance(cls, type) and is_dataclass(cls)):
            continue
        if not OmegaConf.is_dict(node := tree.get(field.name, {})):
            got = "null" if node is None else node
            first = f"{field.name}.{fields(cls)[0].name}"
            rule = f"{field.name} is a group of keys: set one, such as {first}=…"
            raise ConfigError(f"{rule}, got {got}")


def _plain(tree: Any, key: str) -> Any:
    node = tree[key]
    return OmegaConf.to_object(node) if OmegaConf.is_config(node) else node


@cache  # OmegaConf copies what it merges into
def _writable(cls: type) -> Any:
    """Return OmegaConf's schema of a dataclass, writable because a frozen one takes no merge."""
    schema = OmegaConf.structured(cls)
    OmegaConf.set_readonly(schema, False)
    for key in schema:
        if not OmegaConf.is_missing(schema, key) and OmegaConf.is_config(schema[key]):
            OmegaConf.set_readonly(schema[key], False)
    return schema


def _group(chosen: Any, name: str, base: str) -> Any:
    """Return the instance of a group's ``_target_``, its fields checked against the dataclass.

    Only classes of fedpeft are accepted, because a client takes its configuration from the server.
    """
    node: Any = OmegaConf.create(OmegaConf.to_container(chosen, resolve=True))
    target = node.pop("_target_", None)
    if not str(target).startswith("fedpeft."):
        raise ConfigError(f"{name}._target_ must be a class of fedpeft, got {target}")
    cls, wanted = _class(name, str(target)), _class(name, base)
    if not issubclass(cls, wanted):
        raise ConfigError(f"{name}._target_ must be a {wanted.__name__}, got {target}")
    try:
        value = OmegaConf.to_object(OmegaConf.merge(_writable(cls), node))
    except OmegaConfBaseException as error:
        raise ConfigError(omegaconf_sentence(error, f"{name}.")) from error
    except ValueError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(name + ".") else f"{name}.{text}") from error
    assert isinstance(value, wanted)
    return value
