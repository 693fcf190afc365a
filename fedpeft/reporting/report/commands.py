"""The command of a run: from its saved overrides or, for older runs, from its configuration."""

import json
import math
import re
import shlex
from functools import cache
from typing import Any

import yaml

from fedpeft.config.choices import choices
from fedpeft.config.compose import CONF, composed, leaves
from fedpeft.config.overrides import quoted
from fedpeft.reporting.saved_runs import SavedRun

_PLAIN = re.compile(r"[a-z][\w./-]*", re.ASCII | re.IGNORECASE)  # as YAML and Hydra read it


def command(run: SavedRun) -> str:
    """Return the command line that makes a run, without the directory and ``resume``.

    A run that did not save its overrides has a command made from its configuration, if today's
    files still have the classes that it names.
    """
    if run.overrides is not None:
        return _line(
            [o for o in run.overrides if not o.startswith(("run_dir=", "resume="))],
            (run.summary or {}).get("command"),
        )
    chosen = choices(run.settings)
    missing = [
        group for group, name in chosen.items() if not (CONF / group / f"{name}.yaml").exists()
    ]
    if missing:
        target = run.settings.get(f"{missing[0]}._target_")
        return (
            f"not saved, and not rebuilt, because no file of conf/{missing[0]} has the class "
            f"{target}; config.yaml has all values"
        )
    return f"{_line(rebuilt(run))}  # rebuilt from config.yaml"


def _line(overrides: list[str], start: str | None = None) -> str:
    """Return a command line.

    Args:
        overrides: the configuration.
        start: the command that started the run; null for a run that did not save it.
    """
    if start != "flwr run":
        return f"fedpeft run {shlex.join(overrides)}".rstrip()
    # A text of TOML. Flower looks for its end at the next double quote, escaped or not.
    text = json.dumps(shlex.join(overrides), ensure_ascii=False).replace('\\"', "\\u0022")
    return shlex.join(["flwr", "run", ".", "--stream", "--run-config", f"overrides={text}"])


def rebuilt(run: SavedRun) -> list[str]:
    """Return overrides that compose the configuration of a run whose classes are all known."""
    default, chosen = _default_choices(), choices(run.settings)
    groups = tuple(f"{g}={name}" for g, name in chosen.items() if name != default[g])
    now = _composed(groups)
    wanted = {
        key: value
        for key, value in run.settings.items()
        if not key.endswith("._target_") and (key not in now or now[key] != value)
    }
    return [*groups, *(f"{key}={_value(value)}" for key, value in wanted.items())]


@cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    return leaves(composed(overrides))


@cache
def _default_choices() -> dict[str, str | None]:
    return choices(_composed(()))


def _value(value: Any) -> str:
    """Return a value as Hydra's grammar reads it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ",".join(map(_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_value(entry)}" for key, entry in value.items()) + "}"
    plain = _PLAIN.fullmatch(value) and yaml.safe_load(value) == value
    return value if plain else quoted(value)
