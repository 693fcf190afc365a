"""One sentence for each error of Hydra and OmegaConf, made from its attributes.

Their own English stays only where it needs no change; the tests in ``tests/test_config.py`` raise
each error and say which sentence an upgrade changed.
"""

import shlex
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from types import NoneType
from typing import Any, get_args, get_origin

from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    OmegaConfBaseException,
    ValidationError,
)

UNKNOWN = (ConfigAttributeError, ConfigKeyError)
ADVICE = ("To append", "See http")  # beginnings of advice on Hydra's flags
NUMBERS = {int: "Integer", float: "Float"}  # types as named in sentences


def hydra_sentence(error: Exception, overrides: Sequence[str], known: Sequence[str]) -> str:
    """Return the sentence for overrides that cannot be composed.

    Args:
        error: the error of Hydra or of OmegaConf.
        overrides: the overrides that were composed.
        known: keys of the configuration without overrides, from which a misspelt one is guessed.

    Returns:
        The key or group, and the rule.
    """
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if not error.options:  # as for one of several names
            return f"{group} has no {name}"
        meant = meaning(get_close_matches(name, error.options, 1))
        return f"{group} must be one of {', '.join(error.options)}, got {name}{meant}"
    cause = error.__cause__
    if isinstance(cause, UNKNOWN):
        key = _override(str(cause.full_key), overrides)
        return f"unknown key {key}{meaning(_like(key, known))}"
    parts = _lines(error)
    if cause is not None and (first := _lines(cause)[:1]) and first[0] not in " ".join(parts):
        parts += first
    text = "; ".join(parts)
    if isinstance(error, OverrideParseException) and error.override not in text:
        return f"{error.override}: {text}"
    return text


def several_values(override: Override, groups: Collection[str]) -> str:
    """Return the sentence for an override of several values where one run wants one.

    Args:
        override: the parsed override.
        groups: names of the groups, whose choices are no lists and no texts.
    """
    key, _, value = str(override.input_line).lstrip("+").partition("=")
    sweep = shlex.join(["fedpeft", "run", "-m", f"{key}={value}"])
    sentence = f"{key}={value} has several values: {sweep} makes a run of each"
    if key in groups or not override.is_choice_sweep():
        return sentence
    return f"{sentence}; a list is {key}=[{value}], and a text with a comma \"{key}='{value}'\""


def meaning(names: Iterable[str]) -> str:
    """Return the question for the likeliest names, or nothing if there are none."""
    listed = " or ".join(names)
    return f": did you mean {listed}?" if listed else ""


def _like(key: str, known: Sequence[str]) -> list[str]:
    """Return known keys that a misspelt key, or a key without its group, may stand for."""
    if "." not in key and (inner := [k for k in known if k.endswith(f".{key}")]):
        return inner
    head, dot, rest = key.partition(".")
    heads = {k.partition(".")[0] for k in known} - {head}
    return [f"{name}{dot}{rest}" for name in get_close_matches(head, sorted(heads), 1)]


def _override(full_key: str, overrides: Sequence[str]) -> str:
    """Return the whole key of the override that begins with an unknown key."""
    keys = [override.lstrip("+").partition("=")[0] for override in overrides]
    return next((key for key in keys if f"{key}.".startswith(f"{full_key}.")), full_key)


def _lines(error: BaseException) -> list[str]:
    """Return the lines of an error's text, without full stops and without ``ADVICE``."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines()]
    return [line for line in lines if line and not line.startswith(ADVICE)]


def omegaconf_sentence(error: OmegaConfBaseException, group: str = "") -> str:
    """Return the sentence for a field that a typed configuration refuses.

    Args:
        error: the error of a merge into a dataclass.
        group: stands before the key, such as ``method.``.

    Returns:
        The key, the rule and the value.
    """
    key, owner = f"{group}{error.full_key}", error.object_type
    if isinstance(error, UNKNOWN):
        if not is_dataclass(owner):
            return f"no {key} is set"
        parent, dot, name = key.rpartition(".")
        close = get_close_matches(name, [field.name for field in fields(owner)], 1)
        meant = meaning(f"{parent}{dot}{match}" for match in close)
        return f"unknown key {key}: {error.object_type_str} has no such field{meant}"
    if type(error) is ValidationError and is_dataclass(owner) and error.key is not None:
        hints = {field.name: field.type for field in fields(owner)}
        return f"{key} must be {_rule(hints[str(error.key)], error.value)}"
    return f"{key}: {_lines(error)[0]}"


def _rule(hint: Any, value: Any) -> str:
    """Return the words after "must be"; the value of a list is not repeated."""
    shown = "null" if value is None else value
    options = get_args(hint) if get_origin(hint) not in (list, dict) else (hint,)
    kinds = [kind for kind in options or (hint,) if kind is not NoneType]
    if len(kinds) > 1:
        union = f"Union[{', '.join(kind.__name__ for kind in kinds)}]"
        return f"Optional[{union}], got {shown}" if NoneType in options else f"{union}, got {shown}"
    kind = kinds[0]
    if get_origin(kind) is list:
        return "a [list]"
    if get_origin(kind) is dict:
        return f"{{key: value}} pairs, got {shown}"
    name = kind.__name__ if value is None else NUMBERS.get(kind, kind.__name__)
    return f"{name}, got {shown}"
