"""The undocumented parts of flwr-datasets that fedpeft reads are still there."""

from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
from flwr_datasets.partitioner import NaturalIdPartitioner, SizePartitioner

from fedpeft.data.partitions.flower_datasets import INDICES, cut, drawn, natural, table

LABELS = np.array([2, 0, 1, 0, 2, 1, 0, 0, 2, 1, 1, 2], np.int64)
PARTITIONERS = {
    "SizePartitioner": lambda: SizePartitioner([5, 3, 4]),
    "NaturalIdPartitioner": lambda: NaturalIdPartitioner("label"),
}


@pytest.mark.parametrize("name", PARTITIONERS)
def test_the_private_row_numbers_are_those_of_the_public_partitions(name: str) -> None:
    partitioner: Any = PARTITIONERS[name]()
    # load_partition gives rows, not their numbers, so a column holds the numbers.
    partitioner.dataset = table(LABELS).add_column("row", np.arange(len(LABELS)))  # type: ignore
    public = [np.array(partitioner.load_partition(i)["row"]) for i in range(3)]
    if not hasattr(partitioner, INDICES):
        pytest.fail(
            f"{name} of flwr-datasets {version('flwr-datasets')} has no {INDICES}, which "
            "fedpeft/data/partitions/flower_datasets.py reads: find where its row numbers are now"
        )
    private = drawn(PARTITIONERS[name](), table(LABELS))
    assert [rows.tolist() for rows in private] == [rows.tolist() for rows in public]
    assert all(rows.dtype == np.int64 for rows in private)
    assert sorted(np.concatenate(private)) == list(range(12))


def test_natural_parts_are_the_values_rows(capfd: pytest.CaptureFixture) -> None:
    parts = [sorted(part) for part in natural(LABELS)]
    assert sorted(parts) == [[0, 4, 8, 11], [1, 3, 6, 7], [2, 5, 9, 10]]
    assert capfd.readouterr() == ("", "")


def test_cut_gives_rows_in_their_order() -> None:
    parts = cut(np.array([4, 2, 0, 3, 1]), np.array([2, 3]))
    assert [part.tolist() for part in parts] == [[4, 2], [0, 3, 1]]
