"""Row numbers from flwr-datasets' partitioners, without their warnings and progress bars.

``drawn`` reads a private attribute of partitioners, because their public way copies each client's
rows. ``tests/data/test_flower_datasets.py`` fails when an upgrade removes it.
"""

import io
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # imported late, because flwr-datasets takes seconds
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


def dirichlet(rows: "Dataset", alpha: float, num_clients: int, seed: int) -> list[np.ndarray]:
    """Draw a Dirichlet partition once; a client may get any number of rows.

    With a minimum, flwr-datasets would draw eleven times, warn each time, and give up.

    Args:
        rows: from ``table``.
        alpha: concentration of the shares of each label.
        num_clients: number of parts.
        seed: of numpy's generator.

    Returns:
        Row numbers by client.
    """
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        num_clients, "label", alpha, min_partition_size=0, self_balancing=False, seed=seed
    )
    return drawn(partitioner, rows)


def pathological(rows: "Dataset", classes: int, num_clients: int, seed: int) -> list[np.ndarray]:
    """Draw a pathological partition once, without the warning of labels that no client holds.

    Args:
        rows: from ``table``, shuffled, because each holder gets a block of a label's rows.
        classes: number of labels that a client holds.
        num_clients: number of parts.
        seed: of numpy's generator.

    Returns:
        Row numbers by client; an empty list if a label has fewer rows than holders.
    """
    from flwr_datasets.partitioner import PathologicalPartitioner

    partitioner = PathologicalPartitioner(
        num_partitions=num_clients,
        partition_by="label",
        num_classes_per_partition=classes,
        class_assignment_mode="first-deterministic",  # as in the paper
        shuffle=False,
        seed=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            return drawn(partitioner, rows)
        except ValueError:
            return []


def natural(labels: np.ndarray) -> list[np.ndarray]:
    """Return the row numbers of each value of ``labels``, without the progress bar."""
    from flwr_datasets.partitioner import NaturalIdPartitioner

    with redirect_stderr(io.StringIO()):
        return drawn(NaturalIdPartitioner("label"), table(labels))
