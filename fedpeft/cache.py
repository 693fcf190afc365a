"""Cached data on disk: keyed by content, memory-mapped, shared by all processes, checked when read.

An entry is a folder of files and ``sums.json``, which has each file's size and CRC-32 and is
written last, or one file of JSON with its own. An entry that was cut, was changed or cannot be read
is built again.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock

from fedpeft.files import replacing

log = logging.getLogger(__name__)
# Part of every key: raise it when an encoder gives other arrays for the same rows, or when entries
# are written otherwise.
FORMAT = "6"
SUMS = "sums.json"
AT_ONCE = 1 << 22  # bytes
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


def cache_folder() -> Path:
    """Return the folder of built data sets: $FEDPEFT_CACHE, else ~/.cache/fedpeft."""
    return Path(os.environ.get("FEDPEFT_CACHE") or Path.home() / ".cache" / "fedpeft")


@contextmanager
def naming_the_cache(folder: Path) -> Iterator[None]:
    """Turn an error that comes from a cache's folder into one sentence that says what to set.

    Args:
        folder: the cache's folder.

    Raises:
        ValueError: the folder cannot be written, in place of any OSError or ValueError that this
            has caused. Other errors pass.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and not _concerns(cause, folder):
            cause = cause.__cause__ or cause.__context__
        if not isinstance(cause, OSError):
            raise
        raise ValueError(
            f"cannot write the cache {cause.filename or folder} ({cause.strerror or cause}): give "
            "FEDPEFT_CACHE a folder that can be written and has room"
        ) from error


def _concerns(error: BaseException, folder: Path) -> bool:
    """Tell whether an error is about a full disk, or about a path in or above the folder."""
    if not isinstance(error, OSError):
        return False
    if error.errno in NO_ROOM or str(error).startswith("Not enough disk space"):  # datasets' own
        return True
    named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    return named is not None and (named in (folder, *folder.parents) or folder in named.parents)


def cached(key: Iterable[Any], build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return ``build``'s arrays, read-only; built once for all processes and starts.

    They are memory-mapped. A run whose cache cannot be written, for example on a full disk, goes on
    with the arrays in memory and warns once: they are there, and only time and memory are lost.

    Args:
        key: everything that decides the arrays; each entry's ``repr`` counts.
        build: makes the arrays, by name, if the cache lacks them or has them broken.
    """
    folder = cache_folder() / "encoded" / _name(key)
    with suppress(OSError):  # another process has begun to build it again
        if _is_whole(folder, tell=False):
            return _mapped(folder)
    try:
        lock = _locked(folder)
    except OSError as error:
        _warn_unwritable(cache_folder(), error.strerror or str(error))
        return _read_only(build())
    with lock:
        with suppress(OSError):  # it cannot be mapped
            if _is_whole(folder):  # another process was first
                return _mapped(folder)
        arrays = build()
        try:
            _fill(folder, lambda draft: _save(draft, arrays))
            return _mapped(folder)
        except OSError as error:
            _warn_unwritable(cache_folder(), error.strerror or str(error))
            return _read_only(arrays)


def cached_folder(key: Iterable[Any], write: Callable[[Path], None]) -> Path:
    """Return a folder of files; written once for all processes and starts, and checked when found.

    Args:
        key: everything that decides the files; each entry's ``repr`` counts.
        write: writes the files into an empty folder if the cache lacks them or has them broken.

    Raises:
        ValueError: the cache cannot be written.
    """
    folder = cache_folder() / "folders" / _name(key)
    with naming_the_cache(folder):
        if not _is_whole(folder, tell=False):
            with _locked(folder):
                if not _is_whole(folder):  # another process may have been first
                    _fill(folder, write)
    return folder


def _is_whole(folder: Path, tell: bool = True) -> bool:
    """Tell whether an entry's files are as they were written, and warn if they are not.

    Args:
        folder: the entry.
        tell: false warns of nothing, because the entry is looked at again under its lock.
    """
    try:
        for name, (size, crc) in _read_json(folder / SUMS).items():
            _check(folder / name, size, crc)
    except FileNotFoundError:
        return False
    except _Broken as broken:
        if tell:
            log.warning("%s: the entry is built again", broken)
        return False
    return True


def _fill(folder: Path, write: Callable[[Path], None]) -> None:
    """Write an entry's files beside its place; their sums come last, then the rename.

    What was there before goes just before the rename; who has mapped it keeps it.
    """
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)  # its process was killed, because we hold the lock
    try:
        draft.mkdir()
        write(draft)
        sums = {path.name: _size_and_crc(path) for path in sorted(draft.iterdir())}
        _write_json(draft / SUMS, sums)
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def remembered(key: Iterable[Any], compute: Callable[[], Any]) -> Any:
    """Return ``compute``'s value, which JSON can hold; computed once if the cache can be written.

    Args:
        key: everything that decides the value; each entry's ``repr`` counts.
        compute: makes the value if the cache lacks it or has it broken.
    """
    file = cache_folder() / "remembered" / f"{_name(key)}.json"
    try:
        return _read_json(file)
    except FileNotFoundError:
        pass
    except _Broken as broken:
        log.warning("%s: it is built again", broken)
    value = compute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_json(file, value)
    except OSError as error:
        _warn_unwritable(cache_folder(), error.strerror or str(error))
    return value


class _Broken(ValueError):
    """A file of an entry was cut, was changed or cannot be read; the text names it."""


def _name(key: Iterable[Any]) -> str:
    return hashlib.sha256("\n".join([FORMAT, *map(repr, key)]).encode()).hexdigest()


@cache
def _warn_unwritable(folder: Path, reason: str) -> None:
    """Warn once a process, however many entries there are."""
    log.warning(
        "cannot write the cache %s (%s): the run goes on without it and encodes rows in each "
        "process; give FEDPEFT_CACHE a folder that can be written and has room",
        *(folder, reason),
    )


def _locked(folder: Path) -> Any:
    """Return the entry's lock, acquired: one process builds it and the others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{folder}.lock").acquire()


def _read_only(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return views of the arrays that refuse writes, as memory-mapped ones do."""
    views = {name: array.view() for name, array in arrays.items()}
    for view in views.values():
        view.setflags(write=False)
    return views


def _mapped(folder: Path) -> dict[str, np.ndarray]:
    """Return an entry's arrays, memory-mapped and read-only."""
    names = sorted(_read_json(folder / SUMS))
    return {Path(name).stem: np.load(folder / name, mmap_mode="r") for name in names}


def _save(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(_Blocks(file), array)  # type: ignore[arg-type]  # it only calls write


class _Blocks:
    """A file that numpy writes in blocks, because it is no file of the operating system.

    So a full disk is an OSError with its number; ``ndarray.tofile`` would only say how many items
    it wrote.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.write = file.write


def _check(path: Path, size: int, crc: int) -> None:
    """Raise _Broken if a file has another size or CRC-32, or cannot be read.

    CRC-32 finds every change of a few bytes and takes a third of SHA-256's time, a fifth of
    BLAKE2's; nobody is kept out by it. Blocks are read and not mapped, because a bad sector ends a
    process that has mapped it.
    """
    try:
        there = path.stat().st_size
        if there != size:
            raise _Broken(f"{path} of the cache has {there} of {size} bytes")
        crc_now = _size_and_crc(path)[1]
    except OSError as error:
        raise _Broken(f"{path} of the cache cannot be read ({error.strerror})") from error
    if crc_now != crc:
        raise _Broken(f"{path} of the cache has changed since it was written")


def _size_and_crc(path: Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(AT_ONCE):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _write_json(path: Path, value: Any) -> None:
    """Write a value as JSON after a line with the text's CRC-32, atomically."""
    text = json.dumps(value)
    with replacing(path) as draft:
        draft.write_text(f"{zlib.crc32(text.encode()):08x}\n{text}")


def _read_json(path: Path) -> Any:
    """Read what ``_write_json`` wrote.

    Raises:
        FileNotFoundError: the file is not there, or its path leads through another file.
        _Broken: the file is there, but not as it was written.
    """
    try:
        crc, _, text = path.read_bytes().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(*error.args) from error
    except OSError as error:
        raise _Broken(f"{path} of the cache cannot be read ({error.strerror})") from error
    if crc != b"%08x" % zlib.crc32(text):
        raise _Broken(f"{path} of the cache was cut or changed since it was written")
    return json.loads(text)
