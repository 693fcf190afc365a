"""A run's directory: the configuration, a line a round, the table of clients, the summary."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from fedpeft.files import append, replacing
from fedpeft.reporting.run_files import (
    CHECKPOINTS,
    CLIENTS,
    CONFIG,
    HELD,
    METRICS,
    OVERRIDES,
    PACKED,
    STOPPED,
    SUMMARY,
    check_same,
    finished,
    finite,
    in_columns,
    read_config,
    read_lines,
    unpacked,
)

LOCK = ".lock"  # is locked while a process has the directory
MOST_SAMPLES = 100  # lines of samples.jsonl
MOST_BYTES = 255  # bytes of a folder's name


def check_run_dir(path: Path, resume: bool) -> None:
    """Check that a run can write into a directory, which need not be there; nothing is made.

    Args:
        path: the directory's path.
        resume: a run that is there may go on.

    Raises:
        ValueError: the directory cannot be made, or holds a run that may not go on.
    """
    check_makeable(path)
    _check_empty(path, resume)


def check_makeable(path: Path) -> None:
    """Raise ValueError if a directory is not there and cannot be made."""
    longest = max((len(os.fsencode(name)) for name in path.parts), default=0)
    if longest > MOST_BYTES:
        raise ValueError(
            f"run_dir={path} has a name of {longest} bytes, and a file system takes {MOST_BYTES}"
        )
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"run_dir={path} cannot be made, because {there} is a file")
    try:
        Path(mkdtemp(dir=there)).rmdir()
    except OSError as error:
        raise ValueError(
            f"run_dir={path} cannot be made, because {there} cannot be written ({error.strerror})"
        ) from error


def _holds_run(path: Path) -> bool:
    """Tell whether a run has lines or checkpoints in a directory; either alone may be lost."""
    return (path / METRICS).exists() or any((path / CHECKPOINTS).glob("*"))


def _check_empty(path: Path, resume: bool) -> None:
    if _holds_run(path) and not resume:
        raise ValueError(
            f"run_dir={path} already holds a run: give another, or resume=true to go on"
        )


class InUse(ValueError):
    """Another process runs in a run's directory."""


class RunDirectory:
    """Writes each file as soon as it is known, so that a killed run leaves complete lines.

    One process owns a directory at a time.

    Attributes:
        ended: the summary of a run that another process has ended since this one asked; then
            nothing is written. Null for a run to begin or to go on.

    Args:
        path: the directory's path.
        config: the run's composed configuration.
        resume: go on with what is there, instead of refusing it.
        overrides: overrides that composed the configuration; they are written, so that the
            command stays known.

    Raises:
        InUse: another process runs in the directory.
        ValueError: the directory holds a run that may not go on, or one of another configuration.
    """

    def __init__(
        self,
        path: str,
        config: DictConfig,
        resume: bool = False,
        overrides: Sequence[str] | None = None,
    ) -> None:
        # Not resolved, so that shared files do not name folders of this machine.
        self.path = Path(path)
        check_makeable(self.path)
        self._made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise InUse(f"run_dir={self.path}: another run writes into it now") from error
        self._before = {path.name for path in self.path.iterdir()} - {LOCK}
        try:
            self._claim(config, resume, overrides)
        except BaseException:
            self.discard()
            raise

    def _claim(self, config: DictConfig, resume: bool, overrides: Sequence[str] | None) -> None:
        _check_empty(self.path, resume)
        self.ended = finished(config) if resume else None
        if self.ended is not None:
            return
        held = _holds_run(self.path)
        if not held:  # the file is left by a run that was killed before its first line
            (self.path / CLIENTS).unlink(missing_ok=True)
        written = self.path / CONFIG
        if held and written.exists():
            check_same(read_config(self.path), config, self.path)
        self._write(CONFIG, OmegaConf.to_yaml(config, resolve=True))
        if overrides is not None:
            self._write(OVERRIDES, json.dumps(list(overrides), ensure_ascii=False) + "\n")
        (self.path / STOPPED).unlink(missing_ok=True)

    def close(self) -> None:
        """Let others have the directory."""
        self._lock.release()

    def discard(self) -> None:
        """Close the directory, and remove the configuration's files if nothing else is new."""
        new = {path.name for path in self.path.iterdir()} - {LOCK}
        begun = {CONFIG, OVERRIDES} if not self._before else set()
        self.close()
        if new <= begun:
            for name in (*begun, LOCK):
                (self.path / name).unlink(missing_ok=True)
            if self._made:
                self.path.rmdir()

    def keep_lines(self, last: int) -> list[dict[str, Any]]:
        """Drop the lines of rounds after ``last`` and return the others."""
        self._keep(CLIENTS, last)
        return self._keep(METRICS, last)

    def _keep(self, name: str, last: int) -> list[dict[str, Any]]:
        path, packed = self.path / name, self.path / PACKED
        if name == CLIENTS and not path.exists() and packed.exists():  # the run had ended
            lines = unpacked(packed)
        else:
            lines = read_lines(path) if path.exists() else []
        lines = [line for line in lines if line["round"] <= last]
        self._write(name, "".join(json.dumps(line) + "\n" for line in lines))
        return lines

    def append(self, line: Mapping[str, Any], clients: Sequence[Mapping[str, Any]] = ()) -> None:
        """Append a round's line and its clients' rows; both are on the disk when this returns."""
        self._append(CLIENTS, clients)
        self._append(METRICS, [line])

    def _append(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        texts = (json.dumps(finite(line), allow_nan=False) + "\n" for line in lines)
        append(self.path / name, "".join(texts))

    def pack_clients(self) -> None:
        """Write the rows of all rounds into ``clients.parquet``, at the end of the run."""
        from pyarrow import parquet  # takes a quarter of a second

        with replacing(self.path / PACKED) as draft:
            parquet.write_table(in_columns(read_lines(self.path / CLIENTS)), draft)

    def drop_clients(self) -> None:
        """Delete the lines that ``clients.parquet`` has; a run that may yet go on needs them."""
        (self.path / CLIENTS).unlink()

    def save_partition(self, table: Mapping[str, Sequence[Any]]) -> None:
        """Write ``partition.parquet``: columns client, label and rows, without counts of zero."""
        import pyarrow  # takes a quarter of a second
        from pyarrow import parquet

        with replacing(self.path / HELD) as draft:
            parquet.write_table(pyarrow.table(dict(table)), draft)

    def stop(self, reason: str) -> None:
        """Write ``stopped.txt``, which the next start in this directory removes."""
        self._write(STOPPED, reason + "\n")

    def save_samples(self, samples: Sequence[Mapping[str, str]]) -> None:
        """Write ``samples.jsonl``: the first generated texts beside their references."""
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples[:MOST_SAMPLES]]
        (self.path / "samples.jsonl").write_text("".join(lines))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, atomically."""
        text = json.dumps(finite(summary), indent=2, allow_nan=False)
        self._write(SUMMARY, text + "\n")

    def _write(self, name: str, text: str) -> None:
        with replacing(self.path / name) as draft:
            draft.write_text(text)


def new_path(label: str) -> str:
    """Make and return the directory of a run that names none; no other run gets the same."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in count(1):
        path = Path(f"runs/{stamp}_{label}" + (f"_{number}" if number > 1 else ""))
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return str(path)
    raise AssertionError


@contextmanager
def run_path(run_dir: str | None, label: str) -> Iterator[str]:
    """Yield the path of a run's directory, which is made if the run names none.

    A new directory that is still empty after an error is removed.

    Args:
        run_dir: directory that the run names; null for a new one.
        label: ends a new directory's name.
    """
    if run_dir:
        yield run_dir
        return
    path = new_path(label)
    try:
        yield path
    except BaseException:
        with suppress(OSError):  # it holds something
            Path(path).rmdir()
        raise
