"""The configuration with its types: every value checked, every group an object of its class."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedpeft.config.compose import GROUPS, shared_tree
from fedpeft.config.overrides import key_of, split
from fedpeft.config.schema import Config, ConfigError, Settings
from fedpeft.config.sentences import omegaconf_sentence

FAST_GROUPS = ("partition", "data")  # groups whose classes import neither transformers nor peft
PATHS = ("data.path", "model.path", "model.tokenizer_path")  # keys of files and folders
TRACKER = "fedpeft.reporting.trackers.base.Tracker"


def load_config(overrides: str | Sequence[str] = ()) -> Config:
    """Return the typed configuration.

    Raises:
        ConfigError: the overrides cannot be composed, see ``composed``, or a value has the wrong
            type or is outside its rule.
    """
    return typed(shared_tree(tuple(split(overrides))))


def typed(tree: DictConfig) -> Config:
    """Return the typed form of a composed configuration.

    Raises:
        ConfigError: a value of the wrong type or outside its rule.
    """
    with _config_errors():
        groups = {name: _group(tree[name], name, base) for name, base in GROUPS.items()}
        return Config(**_ungrouped(tree), **groups)


def settings(overrides: str | Sequence[str] = ()) -> Settings:
    """Return the typed configuration without the groups, which needs no torch.

    Raises:
        ConfigError: an override or a value is wrong, see ``load_config``.
    """
    return _settings(tuple(split(overrides)))


@lru_cache(maxsize=16)
def _settings(overrides: tuple[str, ...]) -> Settings:
    tree = shared_tree(overrides)
    with _config_errors():
        return Settings(**_ungrouped(tree))


def check_fields(overrides: str | Sequence[str]) -> None:
    """Check the groups whose fields the overrides set; groups that import least come first.

    Files of ``conf/`` hold no impossible value, so other groups need no check before a run loads
    what takes seconds.

    Raises:
        ConfigError: a value of the wrong type or outside its rule.
    """
    listed = split(overrides)
    named = {key_of(o).partition(".")[0] for o in listed if "." in key_of(o)}
    tree = shared_tree(tuple(listed))
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
    chosen = shared_tree(tuple(split(overrides))).get("logger", {})
    with _config_errors():
        for name, node in chosen.items():
            if not OmegaConf.is_dict(node) or "_target_" not in node:
                raise ConfigError(f"logger.{name} is set, but not chosen: add logger={name}")
        listed = [_group(node, f"logger.{name}", TRACKER) for name, node in chosen.items()]
        for tracker in listed:
            tracker.check()
    return listed


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
