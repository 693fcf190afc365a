"""All that is asked of flwr-datasets: its partitioners' row numbers, without their talk.

``drawn`` reads a private attribute of partitioners, because their public way copies each client's
rows; ``tests/data/test_flower_datasets.py`` says so when an upgrade removes it.
"""

import io
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # imported where needed: flwr-datasets takes seconds
    from datasets import Dataset

INDICES = "_partition_id_to_indices"  # in every partitioner, filled by the first partition asked


def table(labels: np.ndarray) -> "Dataset":
    """The table that a partitioner goes by: a column ``label``."""
    from datasets import Dataset

    return Dataset.from_dict({"label": labels})


def drawn(partitioner: Any, table: "Dataset") -> list[np.ndarray]:
    """All row numbers of a partitioner."""
    partitioner.dataset = table
    count = partitioner.num_partitions  # draws them all, except in NaturalIdPartitioner
    if not getattr(partitioner, INDICES):
        partitioner.load_partition(0)
    found = getattr(partitioner, INDICES)  # loading each would take 1.2 ms a client
    return [np.asarray(found[i], np.int64) for i in range(count)]


def cut(order: np.ndarray, sizes: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """Row numbers ``order`` cut into parts of ``sizes``."""
    from flwr_datasets.partitioner import SizePartitioner

    parts = drawn(SizePartitioner([int(size) for size in sizes]), table(order))
    return [order[part] for part in parts]


def dirichlet(rows: "Dataset", alpha: float, num_clients: int, seed: int) -> list[np.ndarray]:
    """One draw, in which a client may get any number of rows.

    flwr-datasets would make eleven, with a warning each, and give up.

    Args:
        rows: as ``table`` gives them.
        alpha: of the shares of each label.
        num_clients: parts.
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
    """One draw, without the warning of labels that have no holder.

    Args:
        rows: as ``table`` gives them, shuffled: each holder gets a block of a label's rows.
        classes: labels that a client holds.
        num_clients: parts.
        seed: of numpy's generator.

    Returns:
        Row numbers by client; none where a label has fewer rows than holders.
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
    """A part for each value of ``labels``, without the progress bar."""
    from flwr_datasets.partitioner import NaturalIdPartitioner

    with redirect_stderr(io.StringIO()):
        return drawn(NaturalIdPartitioner("label"), table(labels))
