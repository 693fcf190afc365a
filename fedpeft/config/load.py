"""One typed configuration, composed by Hydra from ``conf/`` and a list of overrides."""

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedpeft.config.schema import Config, ConfigError, Settings
from fedpeft.config.sentences import hydra_sentence, omegaconf_sentence

_PACKAGE = Path(__file__).parent.parent
_packaged = _PACKAGE / "conf"  # in a wheel; in a checkout or bundle it stands beside the package
CONF = _packaged if _packaged.is_dir() else _PACKAGE.parent / "conf"
GROUPS = {  # each with its base class, by name: torch is imported when a group is made, not before
    "method": "fedpeft.methods.base.Method",
    "model": "fedpeft.models.pretrained.Pretrained",
    "data": "fedpeft.data.tasks.base.Task",
    "partition": "fedpeft.data.partitions.base.Partition",
    "strategy": "fedpeft.algorithms.base.FedAvg",
    "compression": "fedpeft.compression.base.Compression",
}
_FIELD = re.compile(rf"(({'|'.join(GROUPS)}|runtime|optimizer|evaluation)\.[\w.]+|lr|personal)=")
_lock = Lock()  # Hydra's compose is not thread-safe; a launch composes in a thread too


def split(overrides: str | Sequence[str]) -> list[str]:
    """Overrides as a list; a string is split as a shell would.

    Raises:
        ConfigError: a quotation has no end.
    """
    try:
        return shlex.split(overrides) if isinstance(overrides, str) else list(overrides)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def join(overrides: Sequence[str]) -> str:
    """Overrides as the one string that messages and run configurations carry."""
    return shlex.join(overrides)


def sent(overrides: Sequence[str]) -> str:
    """Return what clients get: where results go is the server's own affair."""
    return join([o for o in overrides if not o.startswith("run_dir=")])


def addable(override: str) -> str:
    """Lets ``group.field=value`` name any field of the group's class, listed in its YAML or not.

    Hydra only overrides what the YAML lists; which fields exist is checked when it is typed.
    """
    return "++" + override if _FIELD.match(override) else override


# Keys of earlier versions, and what to write now.
_OLD = {
    "runtime.cohort": "is now runtime.clients_per_pass",
    "method.head": "is now personal=head, or personal=null, for every method",
    "unpadding": "is gone: buckets of rows of like length save nearly as much",
}


def _override(text: str) -> str:
    key = text.lstrip("+~").partition("=")[0]
    if key in _OLD:
        raise ConfigError(f"{key} {_OLD[key]}")
    if "=" not in text and not text.startswith("~"):
        raise ConfigError(f"{text} is no override: write key=value")
    return addable(text)


def composed(overrides: str | Sequence[str]) -> DictConfig:
    """The composed, untyped configuration.

    Raises:
        ConfigError: an unknown key, group or name, or an override that is none.
    """
    return deepcopy(_composed(tuple(split(overrides))))


@lru_cache(maxsize=16)  # a run asks for its own thrice, .1 s each
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    with _lock:
        outer = GlobalHydra.instance().hydra  # a sweep's own, when this is one of its jobs
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(CONF), version_base="1.3", job_name="fedpeft"):
                return compose("config", [_override(o) for o in overrides])
        except ConfigError:
            raise
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(hydra_sentence(error, overrides)) from error
        finally:
            GlobalHydra.instance().hydra = outer


def load_config(overrides: str | Sequence[str] = ()) -> Config:
    """The typed configuration for a list of overrides.

    Raises:
        ConfigError: as ``composed``, or a value of the wrong type or outside its rule.
    """
    tree = composed(overrides)
    with _told():
        groups = {name: _group(tree, name, get_class(base)) for name, base in GROUPS.items()}
        return Config(**_numbers(tree), **groups)


def settings(overrides: str | Sequence[str] = ()) -> Settings:
    """The same without the groups; needs no torch.

    Raises:
        ConfigError: as ``load``.
    """
    tree = composed(overrides)
    with _told():
        return Settings(**_numbers(tree))


@contextmanager
def _told() -> Iterator[None]:
    """Turns what is wrong with a value into a ConfigError."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise ConfigError(omegaconf_sentence(error)) from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _numbers(tree: DictConfig) -> dict[str, Any]:
    keys = [str(key) for key in tree if key not in GROUPS]
    _check_nested(tree)
    typed = OmegaConf.merge(_writable(Settings), OmegaConf.masked_copy(tree, keys))
    return {key: _plain(typed, key) for key in keys}


def _check_nested(tree: DictConfig) -> None:
    """Refuses one value in the place of a nested dataclass's fields: OmegaConf names no key."""
    for field in fields(Settings):
        cls = field.type
        if not (isinstance(cls, type) and is_dataclass(cls)):
            continue
        if not OmegaConf.is_dict(given := tree.get(field.name, {})):
            got = "null" if given is None else given
            raise ConfigError(f"expected key=value pairs of {cls.__name__}, got {got}")


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


def _group(tree: DictConfig, name: str, base: type) -> Any:
    """Instance of a group's ``_target_``, its fields checked against the dataclass.

    Only classes of fedpeft are accepted: a client takes its configuration from the server.
    """
    node: Any = OmegaConf.create(OmegaConf.to_container(tree[name], resolve=True))
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
        raise ConfigError(omegaconf_sentence(error, f"{name}.")) from error
    except ValueError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(name + ".") else f"{name}.{text}") from error
    assert isinstance(value, base)
    return value
