"""Row numbers from flwr-datasets' partitioners, without their warnings and progress bars.

``drawn`` reads a private attribute of partitioners, because their public way copies each client's
rows. ``tests/data/test_flower_datasets.py`` fails when an upgrade removes it.
"""

import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import TYPE_CHECKING, Any

import numpy as np

# Functions import datasets and flwr_datasets, because they take seconds.
if TYPE_CHECKING:
    from datasets import Dataset

INDICES = "_partition_id_to_indices"  # in every partitioner; filled by its first use


def table(labels: np.ndarray) -> "Dataset":
    """Return the table that partitioners read: a column ``label``."""
    from datasets import Dataset

    return Dataset.from_dict({"label": labels})


def drawn(partitioner: Any, table: "Dataset") -> list[np.ndarray]:
    """Return the row numbers of each of a partitioner's parts."""
    partitioner.dataset = table
    count = partitioner.num_partitions  # draws all parts, except in NaturalIdPartitioner
    if not getattr(partitioner, INDICES):
        partitioner.load_partition(0)
    indices = getattr(partitioner, INDICES)  # loading each part would take 1.2 ms a client
    return [np.asarray(indices[i], np.int64) for i in range(count)]


def cut(order: np.ndarray, sizes: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """Cut the row numbers ``order`` into parts of ``sizes``."""
    from flwr_datasets.partitioner import SizePartitioner

    parts = drawn(SizePartitioner([int(size) for size in sizes]), table(order))
    return [order[part] for part in parts]


def natural(labels: np.ndarray) -> list[np.ndarray]:
    """Return the row numbers of each value of ``labels``, without the progress bar."""
    from flwr_datasets.partitioner import NaturalIdPartitioner

    with redirect_stderr(io.StringIO()):
        return drawn(NaturalIdPartitioner("label"), table(labels))
