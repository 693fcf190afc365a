"""The files of a run: their names, what they hold, and whether the run came to its end."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from fedpeft.config.compose import leaves
from fedpeft.files import read_json

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
FAILURE = "failed.txt"  # the reason why training diverged, which a study notes
CLIENTS, PACKED = "clients.jsonl", "clients.parquet"  # while the run lasts, and after it
OVERRIDES = "overrides.yaml"  # the command's overrides, as a list
STOPPED = "stopped.txt"  # the reason why a run ended before its end
CHECKPOINTS = "checkpoints"  # folder of states from which a run goes on
LAST_ENTRY = "initial_error"  # a summary's last entry; without it the run was killed before its end
HELD = "partition.parquet"  # rows by client and label, where the server knows them


def finished(config: DictConfig) -> dict[str, Any] | None:
    """Return the summary of a run that ``resume=true`` finds ended, else null.

    Raises:
        ValueError: the run that ended has another configuration.
    """
    if not config.resume or not config.run_dir:
        return None
    folder = Path(config.run_dir)
    if not (folder / SUMMARY).exists():
        return None
    summary = read_json(folder / SUMMARY)
    if LAST_ENTRY not in summary:
        return None
    check_same(read_config(folder), config, folder)
    return summary


# Keys that change no result, so that a run may go on with others; those below a group's name, too.
FREE = {
    "logger",
    "study",
    "run_dir",
    "resume",
    "checkpoint.every",
    "checkpoint.keep",
    "logs",
    "metrics_port",
    "check",
} | {
    f"runtime.{key}"
    for key in ("kind", "address", "num_cpus", "num_gpus", "total_cpus", "lost_state")
    + ("round_timeout", "join_timeout", "min_replies", "wait_after_min")
}


def is_free(key: str) -> bool:
    """Tell whether a dotted key changes no result."""
    return key in FREE or key.partition(".")[0] in FREE


def check_same(before: Any, now: Any, path: Path) -> None:
    """Check that a saved run's configuration and a new one give the same results.

    Args:
        before: the saved run's composed configuration.
        now: the composed configuration of the run that wants to go on.
        path: the run's directory, for the error.

    Raises:
        ValueError: the two configurations would give different results.
    """
    old, new = leaves(before), leaves(now)
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if differ := [key for key in keys if not is_free(key)]:
        key = differ[0]
        raise ValueError(
            f"{path} holds a run with {key}={old.get(key, '-')}, and now it is "
            f"{new.get(key, '-')}: give another run_dir, or remove that run"
        )


def read_config(folder: Path) -> DictConfig:
    """Return a run's composed configuration.

    Raises:
        ValueError: the configuration's file is damaged; the error names it.
    """
    file = folder / CONFIG
    try:
        tree = OmegaConf.load(file)
    except (ValueError, YAMLError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{file} is damaged: {first}") from error
    if not isinstance(tree, DictConfig) or not file.stat().st_size:
        raise ValueError(f"{file} is damaged: it holds no configuration")
    return tree


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return a run's lines, without a last line that was cut off."""
    return read_lines(path / METRICS)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a file, one a line, without a last line that was cut off.

    Raises:
        ValueError: another line is damaged.
    """
    lines = file.read_bytes().split(b"\n")[:-1]
    return [_object(line, f"{file} line {n}") for n, line in enumerate(lines, start=1)]


def _object(line: bytes, place: str) -> dict[str, Any]:
    """Return the object that a line writes.

    Args:
        line: the line's bytes, as they lie in the file.
        place: file and line, for the error.

    Raises:
        ValueError: the line is no JSON, or JSON of something else than an object.
    """
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place} must be an object, got {value!r:.40}")
    return value


def unpacked(file: Path) -> list[dict[str, Any]]:
    """Return the rows that ``pack_clients`` wrote."""
    from pyarrow import parquet  # takes a quarter of a second

    with parquet.ParquetFile(file) as opened:
        return opened.read().to_pylist()


def in_columns(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return rows as a pyarrow table; a value that a row lacks is null."""
    import pyarrow  # takes a quarter of a second

    names = dict.fromkeys(name for row in rows for name in row)
    return pyarrow.table({name: [row.get(name) for row in rows] for name in names})


def finite(value: Any) -> Any:
    """Replace numbers that are not finite by null, because JSON has none."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
