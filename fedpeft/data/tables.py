"""Tables from a folder or the hub, with one clear sentence when neither is there."""

from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.seeding import generator

if TYPE_CHECKING:
    from datasets import Dataset


def load_tables(path: str, subset: str | None, revision: str | None) -> "dict[str, Dataset]":
    """All splits of a local folder or, where no such folder exists, of a hub data set.

    Raises:
        ValueError: the folder holds no table, or the hub cannot be reached.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    folder = Path(path).expanduser()
    try:
        if folder.is_dir():
            found = datasets.load_dataset(str(folder))
        elif path.startswith((".", "/", "~")):
            raise ValueError(f"data.path={path} is no folder")
        else:
            found = datasets.load_dataset(path, subset, revision=revision)
    except (OSError, DatasetsError) as error:
        raise ValueError(
            f"data set {path} is neither a folder here nor to be had from the hub "
            f"({type(error).__name__}): give a folder of parquet, CSV or JSON lines with data.path="
        ) from error
    return {str(split): table for split, table in found.items()}


def subsample(table: "Dataset", rows: int | None, purpose: str) -> "Dataset":
    """At most ``rows`` rows, the same ones in every run, in their order."""
    if rows is None or rows >= len(table):
        return table
    return table.select(sorted(generator(0, purpose).permutation(len(table))[:rows]))
