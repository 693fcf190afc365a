"""Files that are complete or not there, whatever ends the process that writes them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a draft's path; at the end the draft takes the place of ``path``, on the disk."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield draft
        _to_disk(draft)
        draft.replace(path)
        _to_disk(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
