"""Skew of labels, amounts and origins: counts by hand, and statistics that a mistake would move."""

import io
import re
from contextlib import redirect_stderr

import numpy as np
import pytest
from scipy.stats import entropy

from fedpeft.data.partitions import base as module
from fedpeft.data.partitions import skew
from fedpeft.data.partitions.base import Partition, Rows
from fedpeft.data.partitions.skew import EqualSize, Natural, Pathological, Quantity

LABELS = np.arange(2000) % 10


def counts(found: Rows, labels: np.ndarray = LABELS) -> np.ndarray:
    """Rows by client and label."""
    width = int(labels.max()) + 1
    return np.stack([np.bincount(labels[rows], minlength=width) for rows in found])


def sizes(partition: Partition, clients: int, seed: int = 0) -> np.ndarray:
    return np.array([len(rows) for rows in partition.indices(LABELS, clients, seed)])


def mean_entropy(found: Rows) -> float:
    """Of the clients' labels, at most log 10 = 2.303."""
    return float(np.mean([entropy(row) for row in counts(found)]))


# --- a few labels each ---------------------------------------------------------------------------


@pytest.mark.parametrize("each", [1, 2, 3])
@pytest.mark.parametrize("clients", [10, 25])
def test_pathological_clients_hold_that_many_labels(each: int, clients: int) -> None:
    found = counts(Pathological(each).indices(LABELS, clients, 0))
    assert (np.count_nonzero(found, axis=1) == each).all()
    assert [row[i % 10] > 0 for i, row in enumerate(found)] == [True] * clients
    assert found.sum(0).tolist() == [200] * 10
    for label in found.T:  # divided evenly among its holders
        held = label[label > 0]
        assert held.max() - held.min() <= 1


def test_pathological_with_one_label_each_is_known() -> None:
    found = counts(Pathological(1).indices(LABELS, 20, 3))
    expected = np.concatenate([np.eye(10, dtype=int)] * 2) * 100
    assert found.tolist() == expected.tolist()


def test_pathological_with_all_labels_is_balanced() -> None:
    found = counts(Pathological(10).indices(LABELS, 4, 0))
    assert found.tolist() == [[50] * 10] * 4


def test_pathological_min_size_may_be_reached_exactly() -> None:
    assert sizes(Pathological(10, min_size=500), 4).tolist() == [500] * 4


def test_pathological_holders_get_rows_from_everywhere() -> None:
    """Not the first half of the file for one, the second for the other."""
    labels = np.zeros(1000, np.int64)
    first, second = Pathological(1).indices(labels, 2, 0)
    assert abs(first.mean() - second.mean()) < 60  # blocks would differ by 500


def test_pathological_draws_again_until_every_label_has_a_client() -> None:
    """Five clients with three of ten labels each: about a sixth of all draws."""
    for seed in range(5):
        found = counts(Pathological(3).indices(LABELS, 5, seed))
        assert (found.sum(0) == 200).all()


@pytest.mark.parametrize(
    ("partition", "clients", "message"),
    [
        (Pathological(11), 10, "partition.classes_per_client=11, but there are 10 labels"),
        (
            Pathological(2),
            4,
            "num_clients=4 of partition.classes_per_client=2 cannot hold all 10 labels: raise one "
            "of them",
        ),
        (
            Pathological(1, min_size=101),
            11,
            "7 draws of partition.classes_per_client=1 of 10 labels for num_clients=11 all left a "
            "label without a client or a client with fewer than partition.min_size=101 rows: raise "
            "classes_per_client, or change num_clients",
        ),
    ],
)
def test_pathological_errors(
    monkeypatch: pytest.MonkeyPatch, partition: Partition, clients: int, message: str
) -> None:
    monkeypatch.setattr(module, "DRAWS", 7)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        partition.indices(LABELS, clients, 0)


def test_pathological_label_with_fewer_rows_than_holders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAWS", 2)
    labels = np.array([0] * 95 + [1] * 5)
    with pytest.raises(ValueError, match="2 draws of partition.classes_per_client=1 of 2 labels"):
        Pathological(1).indices(labels, 20, 0)


@pytest.mark.parametrize("each", [0, -1])
def test_pathological_needs_a_class(each: int) -> None:
    with pytest.raises(ValueError, match=f"classes_per_client must be >= 1, got {each}"):
        Pathological(each)


# --- different amounts ---------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1e-6, 0.01, 0.5, 1e6])
def test_quantity_gives_everyone_the_least(alpha: float) -> None:
    for seed in range(5):
        found = sizes(Quantity(alpha, min_size=7), 50, seed)
        assert found.min() >= 7 and found.sum() == 2000


def test_quantity_skew_follows_alpha() -> None:
    """The largest of ten clients: nearly all of the 1,900 free rows, or a tenth of them."""
    assert sizes(Quantity(1e-6, min_size=10), 10).max() == 1910
    assert sizes(Quantity(1e6, min_size=10), 10).max() - 200 <= 2
    largest = [np.mean([sizes(Quantity(a), 10, s).max() for s in range(20)]) for a in (0.1, 1, 10)]
    assert largest[0] > 1000 > largest[1] > 400 > largest[2] > 250


def test_quantity_leaves_labels_alone() -> None:
    found = [r for r in Quantity(0.5).indices(LABELS, 5, 0) if len(r) >= 200]
    assert len(found) >= 2
    assert mean_entropy(found) > 2.2


# --- equal amounts, own mixes --------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1e-6, 0.01, 0.1, 1.0, 10.0, 1e6])
def test_equal_size_is_equal(alpha: float) -> None:
    for seed in range(3):
        found = counts(EqualSize(alpha).indices(LABELS, 20, seed))
        assert found.sum(1).tolist() == [100] * 20
        assert found.sum(0).tolist() == [200] * 10
    assert sizes(EqualSize(alpha), 7).tolist() == [286] * 5 + [285] * 2


def test_equal_size_skew_follows_alpha() -> None:
    """The official code has 0.70, 1.10 and 1.86 here for alpha 0.1, 1 and 10 (sd 0.15 at 0.1)."""

    def mean(alpha: float) -> float:
        draws = [EqualSize(alpha).indices(LABELS, 20, seed) for seed in range(10)]
        return float(np.mean([mean_entropy(found) for found in draws]))

    assert mean(0.1) == pytest.approx(0.70, abs=0.15)
    assert mean(1.0) == pytest.approx(1.10, abs=0.15)
    assert mean(10.0) == pytest.approx(1.86, abs=0.15)
    assert mean(1000.0) > 2.28


def test_equal_size_draws_around_the_labels_own_shares() -> None:
    """Dirichlet(alpha x share): its mean is the share, its variance q (1 - q) / (alpha + 1)."""
    labels = np.array([0] * 90_000 + [1] * 10_000)
    found = counts(EqualSize(1.0).indices(labels, 500, 0), labels)[:250]  # no label has run out
    share = found[:, 1] / found.sum(1)
    assert share.mean() == pytest.approx(0.1, abs=0.03)
    assert share.var() == pytest.approx(0.1 * 0.9 / 2, abs=0.015)


def test_equal_size_with_a_huge_alpha_is_known() -> None:
    """Shares of 50, 30 and 20 % of 40 rows."""
    labels = np.repeat([0, 1, 2], [200, 120, 80])
    found = counts(EqualSize(1e6).indices(labels, 10, 0), labels)
    assert np.abs(found - [20, 12, 8]).max() <= 1


def test_equal_size_fills_up_from_what_is_left() -> None:
    """With one label each, the last clients take the remains of several."""
    found = counts(EqualSize(1e-6).indices(LABELS, 20, 0))
    held = np.count_nonzero(found, axis=1)
    assert held[0] == 1
    assert held.max() > 1


def test_shares_become_whole_numbers_by_largest_remainders() -> None:
    assert skew._apportion(7, np.array([0.5, 0.3, 0.2])).tolist() == [4, 2, 1]  # 3.5, 2.1, 1.4
    assert skew._apportion(8, np.array([0.1, 0.2, 0.7])).tolist() == [1, 2, 5]  # 0.8, 1.6, 5.6
    assert skew._apportion(3, np.array([0.0, 0.0, 1.0])).tolist() == [0, 0, 3]
    assert skew._apportion(0, np.array([0.5, 0.5])).tolist() == [0, 0]


@pytest.mark.parametrize("kind", [Quantity, EqualSize])
@pytest.mark.parametrize("alpha", [0.0, -1.0, 1e-7, 2e6, float("inf"), float("nan")])
def test_alpha_outside_its_range(kind: type[Quantity | EqualSize], alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha must be from 1e-6 to 1e6, got {alpha}"):
        kind(alpha)


# --- a client for each value ---------------------------------------------------------------------


def test_natural_clients_are_the_values() -> None:
    labels = np.array([2, 0, 1, 1, 0, 2, 2, 0, 1, 2])
    found = Natural(column="author").indices(labels, 3, 0)
    assert [rows.tolist() for rows in found] == [[1, 4, 7], [2, 3, 8], [0, 5, 6, 9]]


def test_natural_values_with_few_rows_are_no_clients() -> None:
    labels = np.array([0, 1, 1, 1, 2, 2, 3, 3, 3, 5, 5, 5])
    found = Natural(column="author").indices(labels, 3, 0)
    assert [rows.tolist() for rows in found] == [[1, 2, 3], [6, 7, 8], [9, 10, 11]]


@pytest.mark.parametrize(("clients", "least"), [(9, 3), (11, 3), (3, 201)])
def test_natural_needs_as_many_clients_as_values(clients: int, least: int) -> None:
    able = 10 if least == 3 else 0
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"partition.column=author has {able} values of at least partition.min_size={least} "
            f"rows (10 in all), but num_clients={clients}: each is a client, so both must be equal"
        ),
    ):
        Natural(column="author", min_size=least).indices(LABELS, clients, 0)


def test_natural_needs_a_column() -> None:
    with pytest.raises(ValueError, match="partition.column is not set: name the one whose values"):
        Natural().indices(LABELS, 10, 0)


def test_natural_draws_no_progress_bar() -> None:
    with redirect_stderr(io.StringIO()) as said:
        Natural(column="author").indices(LABELS, 10, 0)
    assert said.getvalue() == ""


# --- many clients --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "partition", [Pathological(), Quantity(min_size=3), EqualSize(0.1), Natural(column="author")]
)
def test_a_thousand_clients(partition: Partition) -> None:
    labels = np.arange(10_000) % (1000 if isinstance(partition, Natural) else 10)
    found = partition.indices(labels, 1000, 0)
    assert sum(map(len, found)) == 10_000
    if isinstance(partition, EqualSize):
        assert {len(rows) for rows in found} == {10}
