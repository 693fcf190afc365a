"""Keys of cached rows: contents, and how a tokenizer encodes; and the cache of ``datasets``."""

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.cache import cache_folder, naming_the_cache
from fedpeft.data.rows.tables import values

# Functions import datasets, because it takes seconds and cached rows do without it.
if TYPE_CHECKING:
    from datasets import Dataset

DATASETS_LOCK = threading.RLock()


@contextmanager
def datasets_cached() -> Iterator[None]:
    """Let ``datasets`` keep its tables under $FEDPEFT_CACHE, so that HOME need not be writable.

    Its own folder stays where FEDPEFT_CACHE is not set, or where HF_DATASETS_CACHE names one. One
    thread at a time loads tables, because the folder is a setting of the whole process.

    Raises:
        ValueError: the folder cannot be written.
    """
    from datasets import config

    names = ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH")
    with DATASETS_LOCK:
        before = {name: getattr(config, name) for name in names}
        if os.environ.get("FEDPEFT_CACHE") and not os.environ.get("HF_DATASETS_CACHE"):
            folder = cache_folder().absolute() / "datasets"
            downloads = folder / "downloads"
            for name, path in zip(names, (folder, downloads, downloads / "extracted"), strict=True):
                setattr(config, name, path)
        try:
            with naming_the_cache(Path(config.HF_DATASETS_CACHE)):
                yield
        finally:
            for name, path in before.items():
                setattr(config, name, path)


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
