"""Parts of several commands: flags and options, and the command that goes on."""

import shlex
from collections.abc import Sequence
from pathlib import Path


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
