"""Files that are complete or not there, whatever ends the process that writes them."""

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")  # name or owner/name
OF_FILES = (".csv", ".json", ".jsonl", ".parquet", ".tsv", ".txt", ".xlsx")  # no hub name ends so


class Unwritten(OSError):
    """A file was not written. Its text is one sentence that names the file."""

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


def check_path(key: str, path: str) -> Path:
    """Return the path without ``~``.

    Args:
        key: the configuration's key, for the error.
        path: may also be the name of something on the hub.

    Raises:
        ValueError: the path does not exist, and by its form it is no hub name.
    """
    local = Path(path).expanduser()
    is_name = HUB_NAME.fullmatch(path) and not path.endswith(OF_FILES)
    if not is_name and not local.exists():
        raise ValueError(f"{key}={path} is no folder or file")
    return local


def not_below(path: str) -> str:
    """Say that a path's parent folder is here but lacks the path's last name; else empty.

    Args:
        path: a path that is no folder here, so it is perhaps misspelt and no name of the hub.
    """
    local = Path(path).expanduser()
    if "/" not in path or local.exists() or not local.parent.is_dir():
        return ""
    return f" (the folder {local.parent} is here, but holds no {local.name})"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a draft's path; at the end the draft takes the place of ``path``, on the disk.

    Raises:
        Unwritten: the disk is full, or the folder cannot be written. What was at ``path`` is still
            there, and the draft is not.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield draft
        _to_disk(draft)
        draft.replace(path)
        _to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        raise _unwritten(path, error) from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        ValueError: the file is damaged; the error names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def append(path: Path, text: str) -> None:
    """Append a text to a file; it is on the disk when this returns.

    Raises:
        Unwritten: the disk is full, or the file cannot be written.
    """
    try:
        with path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: Exception) -> Unwritten:
    """Return an error with the path and the reason; safetensors gives the number in its text."""
    number = getattr(error, "errno", None)
    if match := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(match[1])
    reason = str(error) if number is None else os.strerror(number)
    return Unwritten(errno.EIO if number is None else number, reason, str(path))


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
