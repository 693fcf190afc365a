"""The rows and weights of runs that are compared: the same settings must have read the same files.

A file may change between two commands, and a table of both would compare nothing. A run's summary
has the hashes of what it read.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from fedpeft.config.compose import leaves

READ = {"data": "rows", "model": "weights"}  # what a run reads, by the group that says where


class Input(NamedTuple):
    """The rows or weights of a run.

    Attributes:
        group: ``data`` or ``model``.
        sha256: SHA-256 of the rows or weights that were read.
        path: the run's directory.
    """

    group: str
    sha256: str
    path: Path

    def check(self, sha256: str | None, other: str) -> None:
        """Compare with another hash.

        Args:
            sha256: SHA-256 of the rows or weights of the same settings; null if it is not known.
            other: names who reads it.

        Raises:
            ValueError: the hashes differ.
        """
        if sha256 and sha256 != self.sha256:
            raise ValueError(
                f"{self.path} was made from other {READ[self.group]} (SHA-256 {self.sha256[:12]}) "
                f"than {other} ({sha256[:12]}), at the same settings of {self.group}: bring back "
                "what they were, or remove those runs and make them again"
            )


def settings_key(config: DictConfig, group: str) -> str:
    """Return a text that is equal for runs that name the same rows, or weights."""
    values = {key: value for key, value in leaves(config).items() if key.startswith(f"{group}.")}
    return json.dumps([group, values], sort_keys=True, default=str)


def inputs_of(runs: Iterable[tuple[Path, DictConfig, Mapping[str, Any]]]) -> dict[str, Input]:
    """Return by ``settings_key`` what the first run with these settings read.

    Args:
        runs: path, composed configuration and summary of each.

    Raises:
        ValueError: two runs read different files at the same settings.
    """
    inputs: dict[str, Input] = {}
    for path, config, summary in runs:
        hashes = {
            "data": summary.get("data", {}).get("sha256"),
            "model": summary.get("weights_sha256"),
        }
        for group, sha256 in hashes.items():
            if sha256:
                key = settings_key(config, group)
                inputs.setdefault(key, Input(group, sha256, path)).check(sha256, str(path))
    return inputs


def mixed(runs: Iterable[tuple[Path, DictConfig, Mapping[str, Any]]]) -> list[str]:
    """Return a sentence for tables if ``inputs_of`` refuses the runs; else none."""
    try:
        inputs_of(runs)
    except ValueError as error:
        return [f"These runs do not compare: {error}."]
    return []
