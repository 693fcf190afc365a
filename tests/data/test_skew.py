"""Skew of labels, amounts and origins, by counts and by statistics that a mistake would move."""

import io
import re
from contextlib import redirect_stderr

import numpy as np
import pytest
from scipy.stats import entropy

from fedpeft.data.partitions import shares as module
from fedpeft.data.partitions.base import Partition, Rows
from fedpeft.data.partitions.shares import apportion
from fedpeft.data.partitions.skew import EqualSize, Natural, Pathological, Quantity, _equal_size

LABELS = np.arange(2000) % 10


def counts(by_client: Rows, labels: np.ndarray = LABELS) -> np.ndarray:
    """Count rows by client and label, (clients, labels)."""
    width = int(labels.max()) + 1
    return np.stack([np.bincount(labels[rows], minlength=width) for rows in by_client])


def sizes(partition: Partition, clients: int, seed: int = 0) -> np.ndarray:
    return np.array([len(rows) for rows in partition.indices(LABELS, clients, seed)])


def mean_entropy(by_client: Rows) -> float:
    """Return the mean entropy of the clients' labels, at most log 10 = 2.303."""
    return float(np.mean([entropy(row) for row in counts(by_client)]))


# --- a few labels each ---------------------------------------------------------------------------


@pytest.mark.parametrize("each", [1, 2, 3])
@pytest.mark.parametrize("clients", [10, 25])
def test_pathological_clients_hold_that_many_labels(each: int, clients: int) -> None:
    table = counts(Pathological(each).indices(LABELS, clients, 0))
    assert (np.count_nonzero(table, axis=1) == each).all()
    assert [row[i % 10] > 0 for i, row in enumerate(table)] == [True] * clients
    assert table.sum(0).tolist() == [200] * 10
    for label in table.T:  # divided evenly among its holders
        held = label[label > 0]
        assert held.max() - held.min() <= 1


def test_pathological_with_one_label_each_is_known() -> None:
    table = counts(Pathological(1).indices(LABELS, 20, 3))
    expected = np.concatenate([np.eye(10, dtype=int)] * 2) * 100
    assert table.tolist() == expected.tolist()


def test_pathological_with_all_labels_is_balanced() -> None:
    table = counts(Pathological(10).indices(LABELS, 4, 0))
    assert table.tolist() == [[50] * 10] * 4


def test_pathological_min_size_may_be_reached_exactly() -> None:
    assert sizes(Pathological(10, min_size=500), 4).tolist() == [500] * 4


def test_pathological_holders_get_rows_from_everywhere() -> None:
    """A label's holders get random rows of it, not consecutive blocks of the file."""
    labels = np.zeros(1000, np.int64)
    first, second = Pathological(1).indices(labels, 2, 0)
    assert abs(first.mean() - second.mean()) < 60  # blocks would differ by 500


@pytest.mark.parametrize("seed", range(5))
def test_pathological_draws_again_until_every_label_has_a_client(seed: int) -> None:
    """About a sixth of all draws of three of ten labels for five clients uses every label."""
    table = counts(Pathological(3).indices(LABELS, 5, seed))
    assert (table.sum(0) == 200).all()


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
            "no draw of 7 of partition.classes_per_client=1 of 10 labels for num_clients=11 can be "
            "used; the last one left a client with fewer than partition.min_size=101 rows: lower "
            "min_size, or change classes_per_client or num_clients",
        ),
        (
            Pathological(5),
            2,
            "no draw of 7 of partition.classes_per_client=5 of 10 labels for num_clients=2 can be "
            "used; the last one left a label without a client: raise classes_per_client or "
            "num_clients",
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
    with pytest.raises(
        ValueError,
        match="no draw of 2 .* left a label with more clients than rows: lower classes_per_client",
    ):
        Pathological(1).indices(labels, 20, 0)


def test_pathological_rest_goes_to_any_holder() -> None:
    """Three rows of each label for two holders: over 200 seeds, each client has 7.5 rows (sd 1.1).

    flwr-datasets gives the rest of each division to the first holder: 10 rows and 5.
    """
    labels = np.arange(15) % 5
    drawn = [Pathological(5).indices(labels, 2, seed) for seed in range(200)]
    held = np.array([[len(rows) for rows in by_client] for by_client in drawn])
    assert held.mean(0) == pytest.approx(7.5, abs=0.35)
    assert held.std() == pytest.approx(1.12, abs=0.15)


def test_pathological_further_labels_are_any() -> None:
    """Client 0 holds label 0 and, over 300 seeds, each of the others as often."""
    tables = [counts(Pathological(4).indices(LABELS, 10, seed)) for seed in range(300)]
    held = np.mean([table[0] > 0 for table in tables], axis=0)
    assert held[0] == 1
    assert held[1:] == pytest.approx(1 / 3, abs=0.11)  # four standard errors


@pytest.mark.parametrize("each", [0, -1])
def test_pathological_needs_a_class(each: int) -> None:
    with pytest.raises(ValueError, match=f"classes_per_client must be >= 1, got {each}"):
        Pathological(each)


# --- different amounts ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("alpha", [1e-6, 0.01, 0.5, 1e6])
def test_quantity_gives_everyone_the_least(alpha: float, seed: int) -> None:
    numbers = sizes(Quantity(alpha, min_size=7), 50, seed)
    assert numbers.min() >= 7 and numbers.sum() == 2000


def test_quantity_skew_follows_alpha() -> None:
    """The largest of ten clients has nearly all of the 1,900 free rows, or a tenth of them."""
    assert sizes(Quantity(1e-6, min_size=10), 10).max() == 1910
    assert sizes(Quantity(1e6, min_size=10), 10).max() - 200 <= 2
    largest = [np.mean([sizes(Quantity(a), 10, s).max() for s in range(20)]) for a in (0.1, 1, 10)]
    assert largest[0] > 1000 > largest[1] > 400 > largest[2] > 250


def test_quantity_leaves_labels_alone() -> None:
    large = [rows for rows in Quantity(0.5).indices(LABELS, 5, 0) if len(rows) >= 200]
    assert len(large) >= 2
    assert mean_entropy(large) > 2.2


# --- equal amounts, different mixes --------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [1e-6, 0.01, 0.1, 1.0, 10.0, 1e6])
def test_equal_size_is_equal(alpha: float, seed: int) -> None:
    table = counts(EqualSize(alpha).indices(LABELS, 20, seed))
    assert table.sum(1).tolist() == [100] * 20
    assert table.sum(0).tolist() == [200] * 10


@pytest.mark.parametrize("alpha", [1e-6, 0.01, 0.1, 1.0, 10.0, 1e6])
def test_equal_size_differs_by_one_row_at_most(alpha: float) -> None:
    assert sorted(sizes(EqualSize(alpha), 7)) == [285] * 2 + [286] * 5


def test_equal_size_skew_follows_alpha() -> None:
    """The official code has 0.70, 1.10 and 1.86 here for alpha 0.1, 1 and 10 (sd 0.15 at 0.1)."""

    def mean(alpha: float) -> float:
        draws = [EqualSize(alpha).indices(LABELS, 20, seed) for seed in range(10)]
        return float(np.mean([mean_entropy(by_client) for by_client in draws]))

    assert mean(0.1) == pytest.approx(0.70, abs=0.15)
    assert mean(1.0) == pytest.approx(1.10, abs=0.15)
    assert mean(10.0) == pytest.approx(1.86, abs=0.15)
    assert mean(1000.0) > 2.28


def test_equal_size_draws_around_the_labels_shares() -> None:
    """Dirichlet(alpha x share) has the share q as its mean and q (1 - q) / (alpha + 1) as variance.

    The first 250 clients to come are counted, because no label has run out yet.
    """
    table = _equal_size(
        np.full(500, 200), np.array([90_000, 10_000]), 1.0, np.random.default_rng(0)
    )[:250]
    share = table[:, 1] / table.sum(1)
    assert share.mean() == pytest.approx(0.1, abs=0.03)
    assert share.var() == pytest.approx(0.1 * 0.9 / 2, abs=0.015)


def test_equal_size_with_a_huge_alpha_is_known() -> None:
    """Each client has 50, 30 and 20 % of its 40 rows from the three labels."""
    labels = np.repeat([0, 1, 2], [200, 120, 80])
    table = counts(EqualSize(1e6).indices(labels, 10, 0), labels)
    assert np.abs(table - [20, 12, 8]).max() <= 1


def test_equal_size_fills_up_from_the_rows_left() -> None:
    """The first to come hold one label each, and the last take the remains of several."""
    held = np.count_nonzero(counts(EqualSize(1e-6).indices(LABELS, 20, 0)), axis=1)
    assert held.min() == 1
    assert held.max() > 1


def test_equal_size_clients_come_in_any_order() -> None:
    """Over 100 seeds no client holds more labels than another because of its number."""
    drawn = [EqualSize(1e-6).indices(LABELS, 8, seed) for seed in range(100)]
    held = np.array([np.count_nonzero(counts(by_client), axis=1) for by_client in drawn])
    assert held.mean(0) == pytest.approx(held.mean(), abs=4 * held.std() / 10)


@pytest.mark.parametrize(
    ("total", "shares", "expected"),
    [
        (7, [0.5, 0.3, 0.2], [4, 2, 1]),  # 3.5, 2.1, 1.4
        (8, [0.1, 0.2, 0.7], [1, 2, 5]),  # 0.8, 1.6, 5.6
        (3, [0.0, 0.0, 1.0], [0, 0, 3]),
        (0, [0.5, 0.5], [0, 0]),
    ],
)
def test_shares_become_whole_numbers_by_largest_remainders(
    total: int, shares: list[float], expected: list[int]
) -> None:
    assert apportion(total, np.array(shares)).tolist() == expected


def test_each_row_of_shares_has_a_total_of_its_own() -> None:
    shares = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    assert apportion(np.array([7, 8]), shares).tolist() == [[4, 2, 1], [1, 2, 5]]


@pytest.mark.parametrize("kind", [Quantity, EqualSize])
@pytest.mark.parametrize("alpha", [0.0, -1.0, 1e-7, 2e6, float("inf"), float("nan")])
def test_alpha_outside_its_range(kind: type[Quantity | EqualSize], alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha must be from 1e-6 to 1e6, got {alpha}"):
        kind(alpha)


# --- a client for each value ---------------------------------------------------------------------


def test_natural_clients_are_the_values() -> None:
    labels = np.array([2, 0, 1, 1, 0, 2, 2, 0, 1, 2])
    by_client = Natural(column="author").indices(labels, 3, 0)
    assert [rows.tolist() for rows in by_client] == [[1, 4, 7], [2, 3, 8], [0, 5, 6, 9]]


def test_natural_values_with_few_rows_are_no_clients() -> None:
    labels = np.array([0, 1, 1, 1, 2, 2, 3, 3, 3, 5, 5, 5])
    by_client = Natural(column="author").indices(labels, 3, 0)
    assert [rows.tolist() for rows in by_client] == [[1, 2, 3], [6, 7, 8], [9, 10, 11]]


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
    with redirect_stderr(io.StringIO()) as printed:
        Natural(column="author").indices(LABELS, 10, 0)
    assert printed.getvalue() == ""


# --- many clients --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "partition", [Pathological(), Quantity(min_size=3), EqualSize(0.1), Natural(column="author")]
)
def test_a_thousand_clients(partition: Partition) -> None:
    labels = np.arange(10_000) % (1000 if isinstance(partition, Natural) else 10)
    by_client = partition.indices(labels, 1000, 0)
    assert sum(map(len, by_client)) == 10_000
    if isinstance(partition, EqualSize):
        assert {len(rows) for rows in by_client} == {10}
