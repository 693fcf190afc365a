"""Metrics that ``evaluate`` loads: a script in a local folder, or one of the hub's own.

A name is a path that starts with ``.``, ``/`` or ``~``, or ``evaluate:`` and a path or the name of
a metric of the hub, such as ``evaluate:rouge``. ``:KEY`` behind it chooses one of several values.

Scripts of the hub's users are not loaded by name, because a server sends the names to its clients
and could so run anyone's code on them.
"""

import os
from collections.abc import Sequence
from functools import cache
from math import isfinite
from numbers import Real
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.errors import PartlyPublic
from fedpeft.models.hub import reachable

# Functions import evaluate and datasets, because they take seconds and few runs use them.
if TYPE_CHECKING:
    import evaluate

PREFIX = "evaluate:"
Rows = Sequence[Any] | np.ndarray
LOCAL = (".", "/", "~")
_lock = Lock()  # a module keeps rows while it computes, and seeds numpy's global generator


def named(name: str) -> tuple[str, str] | None:
    """Return a module's path or hub name, and its key or an empty text; null for another metric."""
    if not name.startswith((PREFIX, *LOCAL)):
        return None
    path, _, key = name.removeprefix(PREFIX).partition(":")
    return path, key


def title(name: str) -> str:
    """Return a metric's name in the results; for a module, its path's last part and its key."""
    if (parts := named(name)) is None:
        return name
    path, key = parts
    last = Path(os.path.abspath(path)).name.removesuffix(".py")
    return f"{last}_{key}" if key else last


def check(name: str) -> None:
    """Check what can be known without loading the module.

    Raises:
        ValueError: no script stands at a path, or no path and no name of the hub's own is given.
    """
    path, _ = _parts(name)
    if not path:
        raise ValueError(f"data.metrics={name} names no module: write evaluate:NAME or a folder")
    if _is_script(path):
        return
    if path.startswith(LOCAL):
        raise ValueError(
            f"data.metrics={name} has no script {_script(path)}: a module of evaluate is a folder "
            "that holds a script of the folder's name"
        )
    if "/" in path:
        raise ValueError(
            f"data.metrics={name} is no folder here, and scripts of the hub's users are not loaded "
            f"by name: {_download(path)}"
        )


def load(name: str) -> None:
    """Load a module, so that its errors come before training.

    Raises:
        ValueError: the module is not there, or its script cannot be imported.
    """
    loaded(_parts(name)[0])


def score(name: str, predictions: Rows, references: Rows) -> float:
    """Return one value of a module.

    The key in ``name`` chooses the value; without a key, it is the module's only number or the
    number that has the module's name.

    Args:
        name: the module's name, with the key of a value if it has several.
        predictions: labels, numbers or texts, (rows,).
        references: right labels, numbers or texts, or lists of right texts, (rows,); a module that
            takes one reference a row gets the first.

    Raises:
        ValueError: the module cannot be loaded, refuses the rows, or gives no such finite number.
    """
    path, key = _parts(name)
    module = loaded(path)
    try:
        with _lock:
            results = module.compute(
                predictions=predictions, references=_fitted(module.features, references)
            )
    except Exception as error:  # a script may raise anything
        said = _first_line(error)
        raise PartlyPublic(f"{name} cannot score these rows", f": {said}") from error
    return _chosen(name, key or title(name), results or {})


def _parts(name: str) -> tuple[str, str]:
    return named(name) or (name, "")


def _script(path: str) -> Path:
    """Return a local module's script: the path itself, or the file of its name in the folder."""
    local = Path(os.path.abspath(Path(path).expanduser()))
    return local if local.suffix == ".py" else local / f"{local.name}.py"


def _is_script(path: str) -> bool:
    return _script(path).is_file()


@cache
def loaded(path: str) -> "evaluate.EvaluationModule":
    """Return a module, loaded once in a process.

    Raises:
        ValueError: the module cannot be loaded from the path or the hub.
    """
    import evaluate
    from evaluate import config

    source = path
    if _is_script(path):
        source = str(_script(path))
    elif not reachable():  # read only the cache, without a retry for each of many addresses
        config.HF_EVALUATE_OFFLINE = True
    try:
        return evaluate.load(source, module_type="metric", keep_in_memory=True, seed=0)
    except Exception as error:  # a script may raise anything when it is imported
        if source != path or not isinstance(error, OSError):
            said = _first_line(error)
            raise PartlyPublic(f"metric {path} cannot be loaded", f": {said}") from error
        raise ValueError(
            f"metric {path} is no folder here and cannot be had from the hub "
            f"({_first_line(error)}): {_download(f'evaluate-metric/{path}')}"
        ) from error


def _download(repository: str) -> str:
    folder = f"FOLDER/{repository.rpartition('/')[2]}"
    return (
        f"where there is a network, run `hf download {repository} --repo-type space --local-dir "
        f"{folder}`, then give data.metrics=[{folder}]"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _fitted(features: Any, references: Rows) -> list[Any]:
    """Return references as a module takes them: one a row, or a list a row."""
    from datasets import Value

    options = features if isinstance(features, list) else [features]
    single = {isinstance(option.get("references"), Value) for option in options}
    if single == {True}:
        return [row[0] if isinstance(row, list) else row for row in references]
    if single == {False}:
        return [row if isinstance(row, list) else [row] for row in references]
    return list(references)


def _chosen(name: str, key: str, results: dict[str, Any]) -> float:
    """Return the number of a key, or the only one if ``name`` chooses none."""
    numbers = {k: float(v) for k, v in results.items() if isinstance(v, Real)}
    if len(numbers) == 1 and not _parts(name)[1]:
        key = next(iter(numbers))
    if key not in numbers:
        path = name.removesuffix(f":{key}")
        raise PartlyPublic(  # a module may name its values by labels of the rows
            f"{name} has no number {key}: write {path}:KEY",
            f", where KEY is one of {', '.join(numbers)}" if numbers else ", but it has no number",
        )
    if not isfinite(numbers[key]):
        raise ValueError(f"{name} must give a finite number, got {numbers[key]}")
    return numbers[key]
