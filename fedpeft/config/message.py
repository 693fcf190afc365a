"""The configuration as messages carry it: what a server sends, and what a client takes."""

import json
import re
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedpeft.config.compose import composed
from fedpeft.config.overrides import join, key_of, quoted, split
from fedpeft.config.schema import ConfigError
from fedpeft.config.sentences import omegaconf_sentence

INTERPOLATION = "${"
MOST_CHARACTERS = 1 << 16  # length of a message's overrides; Hydra takes a minute for a megabyte
_MARKS = re.compile(r"[\\'\"]")  # characters that splitting or parsing an override takes away
# Beginnings of overrides that clients need not know.
OF_SERVER = (
    *("run_dir=", "resume=", "logs=", "metrics_port=", "check="),
    *("checkpoint.", "early_stopping.", "study.", "hydra.", "logger=", "logger."),
)


def for_clients(overrides: Sequence[str]) -> str:
    """Return the overrides that clients get, without those that only the server needs."""
    shared = [o for o in overrides if not _of_server(o)]
    if not any(INTERPOLATION in o for o in shared):
        return join(shared)
    tree = composed(shared)
    return join([_resolved(o, tree) if INTERPOLATION in o else o for o in shared])


def _resolved(override: str, tree: DictConfig) -> str:
    """Put the value in the place of an interpolation, because clients resolve none.

    Raises:
        ConfigError: the interpolation cannot be resolved, or stands for more than one value.
    """
    key = key_of(override)
    try:
        value = OmegaConf.select(tree, key)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{override}: {omegaconf_sentence(error)}") from error
    if OmegaConf.is_config(value):
        raise ConfigError(f"{override}: an interpolation must stand for one value")
    if not isinstance(value, str):
        return f"{key}={json.dumps(value)}"
    return f"{key}={quoted(value)}"


def _of_server(override: str) -> bool:
    """Tell whether an override sets a key that clients need not know."""
    return override.lstrip("+").startswith(OF_SERVER)


def of_message(overrides: str) -> list[str]:
    """Return the overrides that a server sent, as a list.

    Quotes and escapes vanish when the text is split and parsed, so they may hide no interpolation.
    Hydra takes the choice of a group for a path, from which ``..`` leads to any YAML file.

    Raises:
        ConfigError: the text is too long, could read this machine's environment, or composes other
            files than ours.
    """
    if len(overrides) > MOST_CHARACTERS:
        raise ConfigError(
            f"the configuration in a message must have at most {MOST_CHARACTERS} characters, "
            f"got {len(overrides)}"
        )
    received = split(overrides)
    for override in received:
        key, value = key_of(override).strip(), override.partition("=")[2]
        if INTERPOLATION in _MARKS.sub("", override):
            raise ConfigError("the configuration in a message must not hold an interpolation")
        if key.startswith("hydra"):
            raise ConfigError("the configuration in a message must not set Hydra itself")
        if "." not in key.partition("@")[0] and "/" in value:
            raise ConfigError(f"the configuration in a message must not name a path in {key}")
    return received
