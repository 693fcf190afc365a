"""Groups of rows by a column's values, by which clients can differ."""

import math
from typing import TYPE_CHECKING

import numpy as np

from fedpeft.data.rows.tables import kind, values
from fedpeft.errors import PartlyPublic, named_row

if TYPE_CHECKING:
    from datasets import Dataset


def groups_by(
    rows: "Dataset", column: str, is_label: bool, folder: str
) -> tuple[np.ndarray, list[str]]:
    """Return the groups of rows that share a value.

    Args:
        rows: (rows,).
        column: the column of the values.
        is_label: true if it is the label's, whose fractional values are rounded.
        folder: the data set's folder, for errors.

    Returns:
        Each row's group number, int64 (rows,), and the groups' names.

    Raises:
        ValueError: there is no such column, a row has no value in it, it holds lists, or it is not
            the label's and holds fractional numbers.
    """
    if column not in rows.column_names:
        raise PartlyPublic(
            f"partition.column={column} is no column of {folder}",
            f", only {', '.join(rows.column_names)}",
        )
    entries = values(rows, column)
    for i, value in enumerate(entries):
        if not isinstance(value, float):
            continue
        if not is_label and not value.is_integer() and math.isfinite(value):
            raise ValueError(
                f"partition.column={column} must hold texts or whole numbers, got a fractional "
                f"number in {named_row(i, 'train')}: write codes such as 1.1 as texts"
            )
        entries[i] = round(value) if math.isfinite(value) else None
    if None in entries:
        raise ValueError(
            f"{named_row(entries.index(None), 'train')} has no {column} to partition by"
        )
    if isinstance(entries[0], list | dict):
        raise ValueError(
            f"partition.column={column} must hold texts or numbers, got {kind(entries[0])} in "
            f"{named_row(0)}"
        )
    distinct = sorted(set(entries))
    index = {value: i for i, value in enumerate(distinct)}
    names = getattr(rows.features[column], "names", None)
    numbers = np.array([index[v] for v in entries], np.int64)
    return numbers, [names[v] if names else str(v) for v in distinct]
