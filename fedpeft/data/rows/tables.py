"""Tables from a folder, a file or the hub, and one clear error if none of them is there."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import constants

from fedpeft.data.rows.text_files import PLAIN, RECODE, TextFormat
from fedpeft.errors import PartlyPublic, named_row
from fedpeft.files import check_path, not_below
from fedpeft.models.hub import reachable
from fedpeft.seeding import generator

# Functions import datasets, because it takes seconds and cached rows do without it.
if TYPE_CHECKING:
    from datasets import Dataset

_SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]+)?$")  # as in train-00000-of-00001 on the hub
READERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".json": "json",
}
KINDS = {
    type(None): "nothing",
    str: "text",
    bool: "true or false",
    int: "a whole number",
    list: "a list",
    dict: "a nested value",
}


def load_tables(
    path: str, subset: str | None, revision: str | None, text: TextFormat = PLAIN
) -> "dict[str, Dataset]":
    """Load all splits of a local folder or file; if neither is there, of a hub data set.

    In a folder of tables (``train.parquet``, ``validation_matched-00000-of-00001.parquet``), the
    files' names are the splits' names. ``datasets.load_dataset`` reads any other layout, such as
    folders of images. A single file is the split ``train``.

    Args:
        path: folder, file or hub name.
        subset: the hub data set's configuration.
        revision: the hub data set's commit or tag.
        text: the format of CSV files and JSON lines.

    Returns:
        Tables by split.

    Raises:
        ValueError: nothing can be read there, or the hub cannot be reached.
    """
    import datasets

    datasets.disable_progress_bars()
    local = check_path("data.path", path)
    if local.is_file():
        return _read(path, {"train": [local]}, text)
    if local.is_dir():
        return _read(path, _split_files(local), text)
    return _from_hub(path, subset, revision)


def marks(path: str) -> list[tuple[str, int, int]] | None:
    """Return name, size and time of change of every file at a path; null for a hub name."""
    local = Path(path).expanduser()
    if not local.exists():
        return None
    files = [local] if local.is_file() else sorted(f for f in local.rglob("*") if f.is_file())
    return [(str(f), (stat := f.stat()).st_size, stat.st_mtime_ns) for f in files]


def line_of(path: str, split: str, row: int, rows: int, text: TextFormat = PLAIN) -> int | None:
    """Return the line of a CSV file or of JSON lines at which a row begins, from 1.

    Args:
        path: the data set's folder, file or hub name.
        split: name of the row's split.
        row: the row's position in the split, from 0.
        rows: number of rows of the split.
        text: the format of the files.

    Returns:
        Null if the split is no single file of text, or its lines are not these rows.
    """
    local = Path(path).expanduser()
    files = [local] if local.is_file() else []
    if local.is_dir():
        files = _split_files(local).get(split, [])
    if len(files) != 1:
        return None
    lines = text.first_lines(files[0])
    return lines[row] if len(lines) == rows else None


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each split, or none if a file's name cannot be a split's."""
    tables: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in READERS and not file.name.startswith("."):
            tables.setdefault(_SHARD.sub("", file.stem), []).append(file)
    return tables if all(split.isidentifier() for split in tables) else {}


def _read(path: str, files: dict[str, list[Path]], text: TextFormat) -> "dict[str, Dataset]":
    import datasets
    from datasets.exceptions import DatasetsError

    kinds = {file.suffix for parts in files.values() for file in parts}
    if len(kinds) > 1 or kinds - READERS.keys():
        raise ValueError(
            f"data.path={path} holds {', '.join(sorted(kinds))}: give files of one kind, "
            f"one of {', '.join(READERS)}"
        )
    for file in (file for parts in files.values() for file in parts if kinds != {".parquet"}):
        text.check(path, file)
    try:
        if files:  # load splits one by one, because in one call all need the same columns
            kind = READERS[kinds.pop()]
            return {split: text.load(kind, parts) for split, parts in files.items()}
        return {str(k): v for k, v in datasets.load_dataset(str(Path(path).expanduser())).items()}
    except (OSError, ValueError, TypeError, DatasetsError) as error:
        cause = error.__cause__ or error
        first = (str(cause).splitlines() or [type(cause).__name__])[0]
        if "corresponds to no data" in first:
            raise ValueError(f"data.path={path}: a file has no rows") from error
        what = f"data.path={path} cannot be read as parquet, CSV, JSON lines or images"
        line, where = text.broken_line((f for parts in files.values() for f in parts), first)
        raise PartlyPublic(f"{what}{line}", where) from error


def _from_hub(path: str, subset: str | None, revision: str | None) -> "dict[str, Dataset]":
    import datasets.config
    from datasets.exceptions import DatasetsError

    if not reachable():  # read only the cache, without minutes of retries
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        tables = datasets.load_dataset(path, subset, revision=revision)
    except (OSError, ValueError, DatasetsError) as error:
        first = (str(error).splitlines() or [""])[0]
        wanted = f"{path}" + (f" --revision {revision}" if revision else "")
        inside = f"--include '{subset}/*' " if subset else ""
        folder = f"FOLDER/{subset}" if subset else "FOLDER"
        raise PartlyPublic(
            f"data set {path} is no folder here{not_below(path)} and cannot be had from the hub "
            f"({type(error).__name__}): where there is a network, run `hf download {wanted} "
            f"--repo-type dataset {inside}--local-dir FOLDER`, then give data.path={folder}",
            f"; {first}",
        ) from error
    return {str(split): table for split, table in tables.items()}


def subsample(table: "Dataset", rows: int | None, purpose: str) -> "Dataset":
    """Return at most ``rows`` rows in their order, the same in every run.

    Args:
        table: all rows.
        rows: number of rows at most; null for all.
        purpose: name of the draw; another purpose draws other rows.
    """
    if rows is None or rows >= len(table):
        return table
    return table.select(np.sort(generator(0, purpose).permutation(len(table))[:rows]))


def values(rows: "Dataset", column: str) -> list[Any]:
    """Return a column's values as Python objects, because ``rows[column]`` is lazy and slow.

    Raises:
        ValueError: a text is no UTF-8.
    """
    cells = rows.select_columns([column]).with_format("arrow")[:][column]
    try:
        return cells.to_pylist()
    except UnicodeDecodeError as error:
        row = named_row(_undecodable(cells))
        raise ValueError(f"column {column} is no UTF-8 in {row}: {RECODE}") from error


def _undecodable(cells: Any) -> int:
    """Return the number of the first cell whose text is no UTF-8."""
    for i, cell in enumerate(cells):
        try:
            cell.as_py()
        except UnicodeDecodeError:
            return i
    raise AssertionError("all cells are UTF-8")


def kind(value: Any) -> str:
    """Return the kind of a cell, such as ``a whole number``, because errors quote no value."""
    if isinstance(value, float):
        return "a number" if math.isfinite(value) else "a number that is not finite"
    return KINDS.get(type(value), type(value).__name__)
