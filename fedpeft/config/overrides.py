"""Overrides as a shell hands them over: split, joined, and quoted for Hydra's grammar."""

import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from fedpeft.config.schema import ConfigError

# A value that Hydra reads as it stands; all others are tried, which takes a millisecond.
_PLAIN = re.compile(r"[\w./:+@-]*", re.ASCII)
_LISTS = re.compile(r"\[|\{(?![{%])")  # {{ and {% begin a template


def split(overrides: str | Sequence[str]) -> list[str]:
    """Return overrides as a list; a string is split as a shell would.

    Raises:
        ConfigError: a quotation has no end.
    """
    try:
        return shlex.split(overrides) if isinstance(overrides, str) else list(overrides)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def join(overrides: Sequence[str]) -> str:
    """Return overrides as the one string that messages and run configurations carry."""
    return shlex.join(overrides)


def key_of(override: str) -> str:
    """Return the key that an override sets, or the group that it chooses."""
    return override.partition("=")[0].lstrip("+~")


def quoted(text: object) -> str:
    """Return a text in Hydra's quotes, which stands for every character of it."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", str(text))
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"'{escaped}'"


def readable(override: str) -> str:
    """Return an override whose value Hydra can read: in quotes, if it cannot as it stands.

    Hydra's grammar knows no letters but a to z, and gives brackets, commas and ``=`` a meaning, so
    it cannot read a path such as ``notes (1)/Füße.csv``.

    Raises:
        ConfigError: the value begins as a list or a mapping does, but is none.
    """
    key, sign, value = override.partition("=")
    if not sign or _PLAIN.fullmatch(value):
        return override
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        if _LISTS.match(value):
            raise ConfigError(
                f"{key.lstrip('+')} must be a list or a mapping whose texts are in quotes, such as "
                f"['a b','c'], got {value}"
            ) from error
        return f"{key}={quoted(value)}"
    return override
