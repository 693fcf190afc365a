"""Parts of several commands: flags and options, and the command that goes on."""

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def flag(arguments: Sequence[str], name: str) -> tuple[bool, list[str]]:
    """Tell whether a flag is set, and return the other arguments."""
    return name in arguments, [a for a in arguments if a != name]


def option(arguments: Sequence[str], name: str) -> tuple[str, list[str]]:
    """Return an option's value, empty if it is not given, and the other arguments.

    Args:
        arguments: the command's arguments, with ``--name value`` or ``--name=value``.
        name: the option's name, with its dashes.

    Raises:
        ValueError: the option has no value, or is given twice.
    """
    rest: list[str] = []
    values: list[str] = []
    pending = False
    for argument in arguments:
        if pending:
            values.append(argument)
            pending = False
        elif argument == name:
            pending = True
        elif argument.startswith(name + "="):
            values.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    if pending or "" in values:
        raise ValueError(f"{name} needs a value")
    if len(values) > 1:
        raise ValueError(f"{name} must be given once, got {' and '.join(values)}")
    return "".join(values), rest


def listed(text: str) -> list[str]:
    """Split at commas outside of brackets: ``lora,hetlora+method.ranks=[4,8]``."""
    return re.split(r",(?![^\[{]*[\]}])", text)


def numbers(name: str, text: str, kind: Callable[[str], T]) -> list[T]:
    """Parse numbers separated by commas.

    Args:
        name: the option, for the error.
        text: the option's value; empty for no numbers.
        kind: ``int`` or ``float``.

    Returns:
        The numbers.

    Raises:
        ValueError: a part of the text is no such number.
    """
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise ValueError(f"{name} must be numbers by commas, got {text}") from error


def whole_number(name: str, text: str) -> int | None:
    """Return the whole number that an option has; null for an empty text.

    Raises:
        ValueError: the text is no whole number.
    """
    try:
        return int(text) if text else None
    except ValueError as error:
        raise ValueError(f"{name} must be one whole number, got {text}") from error


def going_on(arguments: Sequence[str], folder: Path | str, as_json: bool) -> str:
    """Return the command that goes on with the runs in a folder.

    Args:
        arguments: the arguments of the command that was stopped, without ``--json``.
        folder: holds the command's runs.
        as_json: true if the command had ``--json``.
    """
    rest = [a for a in arguments if not a.startswith(("run_dir=", "hydra.sweep.dir="))]
    options = ["--json"] if as_json else []
    return shlex.join(["fedpeft", *rest, *options, f"run_dir={folder}"])
