"""Finds the files of ``conf/`` from which a configuration was composed."""

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedpeft.config.compose import CONF, GROUPS, leaves


def choices(settings: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the choice of each group, such as ``lora`` of ``method``.

    It is the file of the same class from which the fewest values differ, the class's name if there
    is no such file, and null if the configuration has no such group. A class may have moved to
    another module since.

    Args:
        settings: a composed configuration's values by dotted key.
    """
    chosen: dict[str, str | None] = {}
    for group in reversed(GROUPS):  # method last, because its file may choose other groups too
        chosen[group] = _choice(group, {**settings, **chosen})
    return {group: chosen[group] for group in GROUPS}


def of_choice(key: str, groups: Collection[str], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a setting differs between rows only because the choice of its group does.

    Args:
        key: the setting's dotted key.
        groups: names of the groups whose choice differs between rows.
        rows: settings by dotted key, and choices by group.
    """
    group, inner, _ = key.partition(".")
    if not inner or group not in groups:
        return False
    values: dict[Any, set[str]] = {}
    for row in rows:
        values.setdefault(row.get(group), set()).add(repr(row.get(key)))
    return all(len(of_one) == 1 for of_one in values.values())


def _choice(group: str, values: Mapping[str, Any]) -> str | None:
    if (target := values.get(f"{group}._target_")) is None:
        return None
    name = str(target).rpartition(".")[2]

    def unlike(file: Path) -> tuple[int, int, int]:
        expected = _expected(group, file)
        differ = sum(values.get(key) != value for key, value in expected.items())
        return differ, -len(expected), len(file.stem)

    files = [file for file in sorted((CONF / group).glob("*.yaml")) if name == _class(file)]
    return min(files, key=unlike).stem if files else name


@cache
def _class(file: Path) -> str:
    """Return the name of the class that a file chooses."""
    match = re.search(r"_target_:.*\.(\w+)", file.read_text())
    return match[1] if match else ""


@cache
def _expected(group: str, file: Path) -> dict[str, Any]:
    """Return a file's values by dotted key, and the groups that it chooses."""
    tree = OmegaConf.load(file)
    assert isinstance(tree, DictConfig)
    defaults = tree.pop("defaults", [])
    groups = {
        str(key).removeprefix("override /"): value
        for default in defaults
        if OmegaConf.is_dict(default)
        for key, value in default.items()
    }
    if "_target_" in tree:
        tree = OmegaConf.create({group: tree})
    values = leaves(tree, resolve=False)
    return {key: v for key, v in values.items() if not key.endswith("._target_")} | groups
