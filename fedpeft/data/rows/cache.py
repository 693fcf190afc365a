"""Cached data on disk: keyed by content, memory-mapped, shared by all processes."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.data.rows.tables import values

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = "1"  # part of every key: raise it when an encoder gives other arrays for the same rows


def cache_folder() -> Path:
    """Return the folder of built data sets: $FEDPEFT_CACHE, else ~/.cache/fedpeft."""
    return Path(os.environ.get("FEDPEFT_CACHE") or Path.home() / ".cache" / "fedpeft")


def content_sha256(rows: "Dataset", columns: Iterable[str]) -> str:
    """Return the hash of some columns' values, whatever file they came from."""
    digest = hashlib.sha256()
    for column in columns:
        parts = [_bytes(value) for value in values(rows, column)]
        names = getattr(rows.features[column], "names", None)  # the classes of a label column
        digest.update(f"{column}:{names}:{[len(part) for part in parts]}:".encode())
        digest.update(b"".join(parts))
    return digest.hexdigest()


def _bytes(value: Any) -> bytes:
    """Return a value as bytes; an image as its file's content, whatever its path."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        if value["bytes"] is None and value["path"] and Path(value["path"]).is_file():
            return Path(value["path"]).read_bytes()
        value = value["bytes"]
    return value if isinstance(value, bytes) else repr(value).encode()


def recipe(processor: Any) -> str:
    """Describe everything that decides what a tokenizer or image processor does."""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(processor.to_dict(), sort_keys=True, default=str)
    special = [processor.pad_token, processor.bos_token, processor.eos_token]
    backend.no_truncation()  # because the last call may have left it set
    backend.no_padding()
    text = backend.to_str() + repr([special, processor.chat_template])
    return hashlib.sha256(text.encode()).hexdigest()


def cached(key: Iterable[Any], build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return ``build``'s arrays, memory-mapped read-only; built once for all processes and starts.

    Args:
        key: everything that decides the arrays; each entry's ``repr`` counts.
        build: makes the arrays, by name, if the cache lacks them.

    Raises:
        ValueError: the cache's folder cannot be written.
    """
    from filelock import FileLock

    name = hashlib.sha256("\n".join([FORMAT, *map(repr, key)]).encode()).hexdigest()
    folder = cache_folder() / "encoded" / name
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.is_dir():  # else another process was first
                    _write(folder, build())
        except OSError as error:
            raise ValueError(
                f"cannot write encoded data to {cache_folder()} ({error}): set FEDPEFT_CACHE"
            ) from error
    return {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}


def remembered(key: Iterable[Any], compute: Callable[[], Any]) -> Any:
    """Return ``compute``'s value, which JSON can hold; computed once if the cache can be written.

    Args:
        key: everything that decides the value; each entry's ``repr`` counts.
        compute: makes the value if the cache lacks it.
    """
    name = hashlib.sha256("\n".join([FORMAT, *map(repr, key)]).encode()).hexdigest()
    file = cache_folder() / "remembered" / f"{name}.json"
    with suppress(OSError, ValueError):  # not there, or half written
        return json.loads(file.read_text())
    value = compute()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{name}.{uuid.uuid4().hex}")
        draft.write_text(json.dumps(value))
        draft.replace(file)
    return value


def _write(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays as files of a folder, which then exists whole or not at all."""
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        for name, array in arrays.items():
            np.save(unfinished / f"{name}.npy", array)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
