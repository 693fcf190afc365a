"""Partitions give each row to one client, and the same rows for the same seed."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.stats import entropy

from fedpeft.data.partitions import shares
from fedpeft.data.partitions.base import IID, Dirichlet, Partition, Rows, own_splits
from fedpeft.data.partitions.shares import draws
from fedpeft.data.partitions.skew import EqualSize, Pathological, Quantity
from fedpeft.engine.engine import Engine

LABELS = np.arange(400) % 4


def parts(partition: Partition, clients: int = 5, seed: int = 0) -> Rows:
    return partition.indices(LABELS, clients, seed)


def same(a: Rows, b: Rows) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


ALL = [
    IID(),
    Dirichlet(0.1, min_size=5),
    Dirichlet(1.0),
    Dirichlet(100.0),
    Dirichlet(math.inf),
    Pathological(),
    Pathological(4),
    Quantity(0.1),
    Quantity(10.0, min_size=3),
    EqualSize(0.1),
    EqualSize(10.0),
]


@pytest.mark.parametrize("partition", ALL)
@pytest.mark.parametrize("clients", [2, 3, 7])
def test_disjoint_and_complete(partition: Partition, clients: int) -> None:
    by_client = parts(partition, clients)
    assert len(by_client) == clients
    assert {rows.dtype for rows in by_client} == {np.dtype(np.int64)}
    assert sorted(np.concatenate(by_client).tolist()) == list(range(400))
    assert min(map(len, by_client)) >= partition.min_size >= 3


@pytest.mark.parametrize("partition", [p for p in ALL if p != Pathological()])
def test_one_client_holds_all(partition: Partition) -> None:
    assert sorted(parts(partition, 1)[0].tolist()) == list(range(400))


@pytest.mark.parametrize("partition", ALL)
def test_seeds(partition: Partition) -> None:
    first = parts(partition)
    np.random.seed(1)  # nothing may depend on NumPy's global generator
    assert same(first, parts(partition))
    assert not same(first, parts(partition, seed=1))
    assert not same(first, parts(partition, clients=4))


@pytest.mark.parametrize("partition", ALL)
def test_labels_need_not_be_numbered_without_gaps(partition: Partition) -> None:
    assert same(partition.indices(LABELS * 3 + 2, 5, 0), parts(partition))


# --- equal random shares -------------------------------------------------------------------------


def test_iid_shares_are_equal_and_shuffled() -> None:
    assert sorted(map(len, parts(IID(), 3))) == [133, 133, 134]
    assert sorted(map(len, parts(IID(), 5))) == [80] * 5
    rows = parts(IID(), 5)[0]
    assert rows.tolist() != sorted(rows.tolist())
    counts = np.bincount(LABELS[rows], minlength=4)
    assert counts.min() >= 10  # of 80 rows in four labels


@pytest.mark.parametrize("clients", [3, 20, 50])
def test_iid_equals_flwr_datasets(clients: int) -> None:
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner

    from fedpeft.seeding import generator

    theirs = IidPartitioner(clients)
    theirs.dataset = Dataset.from_dict({"row": generator(4, "partition").permutation(400)})
    expected = [np.asarray(theirs.load_partition(i)["row"]) for i in range(clients)]
    assert same(parts(IID(), clients, seed=4), expected)


# --- label shares from a Dirichlet distribution --------------------------------------------------


def test_infinite_alpha_is_iid() -> None:
    assert same(parts(Dirichlet(math.inf)), parts(IID()))


def sizes(partition: Partition, labels: np.ndarray, clients: int, seeds: int) -> np.ndarray:
    """Return numbers of rows (seeds, clients)."""
    drawn = [partition.indices(labels, clients, seed) for seed in range(seeds)]
    return np.array([[len(rows) for rows in by_client] for by_client in drawn])


def test_two_rows_a_label_go_to_all_clients() -> None:
    """Each client gets one row of nearly half of 2,000 labels with two rows (sd 22)."""
    held = sizes(Dirichlet(10.0), np.arange(4000) % 2000, 4, 20)
    assert held.sum(1).tolist() == [4000] * 20
    assert held.min() > 900 and held.max() < 1100
    assert held.mean(0) == pytest.approx(1000, abs=20)


def test_one_row_a_label_is_drawn_by_all_clients_alike() -> None:
    """2,000 rows fall to four clients at random: 500 each with a standard deviation of 19.4."""
    held = sizes(Dirichlet(10.0), np.arange(2000), 4, 50)
    assert held.mean(0) == pytest.approx(500, abs=11)  # four standard errors
    assert held.std() == pytest.approx(19.4, rel=0.2)


def test_no_client_holds_more_labels_because_of_its_number() -> None:
    """Means over 100 seeds of ten clients' labels and rows; flwr-datasets gives the last 9.5."""
    labels = np.arange(8000) % 10
    drawn = [Dirichlet(0.1, min_size=3).indices(labels, 10, seed) for seed in range(100)]
    held = np.array([[len(np.unique(labels[rows])) for rows in clients] for clients in drawn])
    assert held.mean(0) == pytest.approx(held.mean(), abs=0.6)
    assert 4.9 < held.mean() < 5.7
    rows = np.array([[len(rows) for rows in clients] for clients in drawn])
    assert rows.mean(0) == pytest.approx(800, abs=250)  # standard error 65


def test_dirichlet_shares_have_their_mean_and_variance() -> None:
    """A share of k clients has mean 1 / k and variance (1 / k) (1 - 1 / k) / (k alpha + 1)."""
    held = sizes(Dirichlet(0.5, min_size=3), np.zeros(10_000, np.int64), 4, 300) / 10_000
    assert held.mean(0) == pytest.approx(0.25, abs=0.06)
    assert held.var() == pytest.approx(0.25 * 0.75 / 3, rel=0.15)


def test_a_huge_alpha_divides_each_label_evenly() -> None:
    by_client = Dirichlet(1.7e308).indices(LABELS, 5, 0)
    counts = [np.bincount(LABELS[rows], minlength=4).tolist() for rows in by_client]
    assert counts == [[20] * 4] * 5


def test_a_label_s_rows_come_from_everywhere() -> None:
    """Clients get random rows of a label, not consecutive blocks of the file."""
    by_client = Dirichlet(1e6).indices(np.zeros(10_000, np.int64), 4, 0)
    assert [rows.mean() for rows in by_client] == pytest.approx([5000] * 4, abs=230)


def test_thousands_of_labels_take_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of all draws are bounded, so that even 500 draws in vain take half a second."""
    drawn: list[int] = []

    def counted(total: np.ndarray, of: np.ndarray) -> np.ndarray:
        drawn.append(of.size)
        return shares.apportion(total, of)

    monkeypatch.setattr("fedpeft.data.partitions.base.apportion", counted)
    with pytest.raises(ValueError, match="in each of 20 draws for num_clients=100: no alpha"):
        Dirichlet(10.0, min_size=19).indices(np.arange(2000), 100, 0)
    assert drawn == [2000 * 100] * 20 and sum(drawn) <= shares.DRAW_COST


def test_small_alpha_is_skewed() -> None:
    """The mean entropy of the clients' labels rises with alpha to at most log 4 = 1.386."""

    def mean_entropy(alpha: float) -> float:
        counts = [np.bincount(LABELS[r], minlength=4) for r in parts(Dirichlet(alpha, min_size=5))]
        return float(np.mean([entropy(count) for count in counts]))

    skewed, mild, even = mean_entropy(0.1), mean_entropy(1.0), mean_entropy(1000.0)
    assert skewed < 0.9 < mild < even
    assert even > 1.37


def test_shares_differ_by_label() -> None:
    counts = np.stack([np.bincount(LABELS[r], minlength=4) for r in parts(Dirichlet(0.3))])
    assert counts.sum(0).tolist() == [100] * 4
    orders = {tuple(np.argsort(counts[:, label])) for label in range(4)}
    assert len(orders) > 1


def test_min_size_is_kept() -> None:
    """With min_size=3 this draw leaves a client with fewer than 15 rows."""
    assert min(map(len, parts(Dirichlet(0.1, min_size=3), 8, seed=3))) < 15
    assert min(map(len, parts(Dirichlet(0.1, min_size=15), 8, seed=3))) >= 15


def test_few_rows_and_a_small_alpha_end_with_a_message() -> None:
    labels = np.arange(40) % 4
    with pytest.raises(
        ValueError,
        match=re.escape(
            "partition.alpha=0.1 left a client with fewer than partition.min_size=8 of 40 rows "
            "in each of 550 draws for num_clients=5: raise alpha, or lower min_size or num_clients"
        ),
    ):
        Dirichlet(0.1, min_size=8).indices(labels, 5, 0)


def test_labels_of_one_row_are_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A greater alpha is no remedy, because a label's one row cannot be divided."""
    monkeypatch.setattr(shares, "DRAWS", 5)
    with pytest.raises(
        ValueError,
        match=re.escape(
            "partition.alpha=10.0 left a client with fewer than partition.min_size=50 of 200 rows "
            "in each of 5 draws for num_clients=4: no alpha divides these labels evenly, because "
            "the median of the 200 has 1 rows: set alpha=inf, or lower min_size or num_clients"
        ),
    ):
        Dirichlet(10.0, min_size=50).indices(np.arange(200), 4, 0)
    assert [len(r) for r in Dirichlet(math.inf, min_size=50).indices(np.arange(200), 4, 0)] == (
        [50] * 4
    )


def test_a_min_size_that_the_draws_do_not_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "DRAWS", 33)
    with pytest.raises(ValueError, match="in each of 33 draws for num_clients=5"):
        parts(Dirichlet(0.01, min_size=80))


def test_large_draws_are_fewer() -> None:
    """All draws together make at most 4,000,000 numbers, in at most 550 draws."""
    assert draws(10, 10) == 550
    assert draws(4, 2000) == 500
    assert draws(10_000, 10) == 40
    assert draws(10_000, 5000) == 1


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("partition", "clients", "message"),
    [
        (IID(), 134, "400 training rows cannot give num_clients=134 at least 3 each"),
        (Dirichlet(1.0), 41, "400 training rows cannot give num_clients=41 at least 10 each"),
        (Dirichlet(math.inf), 41, "400 training rows cannot give num_clients=41 at least 10 each"),
        (Quantity(), 41, "400 training rows cannot give num_clients=41 at least 10 each"),
        (EqualSize(), 134, "400 training rows cannot give num_clients=134 at least 3 each"),
    ],
)
def test_more_clients_than_rows(partition: Partition, clients: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parts(partition, clients)


def test_as_many_clients_as_the_rows_allow() -> None:
    assert sorted(map(len, parts(IID(), 133))) == [3] * 132 + [4]
    assert [len(rows) for rows in parts(Quantity(min_size=10), 40)] == [10] * 40
    assert [len(rows) for rows in parts(EqualSize(0.1, min_size=10), 40)] == [10] * 40


@pytest.mark.parametrize("kind", [IID, Dirichlet, Pathological, Quantity, EqualSize])
@pytest.mark.parametrize("size", [2, 0, -1])
def test_a_min_size_below_what_a_client_needs(kind: type[Partition], size: int) -> None:
    rule = "partition.min_size must be >= 3, one row each to train, validate and test, got"
    with pytest.raises(ValueError, match=f"{rule} {size}"):
        kind(min_size=size)


@dataclass(frozen=True)
class Given(Partition):
    """A partition that gives ``rows`` to the clients, right or wrong."""

    rows: Rows | None = None

    def _indices(self, labels: np.ndarray, num_clients: int, seed: int) -> Rows:
        assert self.rows is not None
        return self.rows


def rows_of(*clients: list[int]) -> Rows:
    return [np.array(rows, np.int64) for rows in clients]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (rows_of([0, 1, 2]), "is of 1 clients, but num_clients=2"),
        (
            rows_of([0, 1, 2], [3, 4]),
            "gives client 1 2 of 20 rows, but every client needs partition.min_size=3",
        ),
        (
            rows_of([], [3, 4, 5]),
            "gives client 0 0 of 20 rows, but every client needs partition.min_size=3",
        ),
        (
            rows_of([0, 1, 2], [3, 20, 5]),
            "gives client 1 row number 20, but these numbers go from 0 to 19",
        ),
        (
            rows_of([0, -1, 2], [3, 4, 5]),
            "gives client 0 row number -1, but these numbers go from 0 to 19",
        ),
        (rows_of([0, 1, 2], [3, 4, 1]), "gives row number 1 (counted from 0) to clients 0 and 1"),
        (rows_of([0, 1, 1], [3, 4, 5]), "gives row number 1 (counted from 0) to clients 0 and 0"),
        ([np.arange(3), np.arange(3, 6.0)], "gives client 1 float64 numbers, not int64"),
    ],
)
def test_every_result_is_checked(rows: Rows, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'partition Given {message}')}$"):
        Given(rows=rows).indices(np.zeros(20, np.int64), 2, 0)


def test_right_rows_pass_the_check() -> None:
    rows = rows_of([0, 1, 2], [5, 4, 19])
    assert Given(rows=rows).indices(np.zeros(20, np.int64), 2, 0) is rows


# --- a client's splits ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "held_out"), [(3, 1), (4, 1), (10, 1), (19, 1), (20, 2), (57, 5), (100, 10)]
)
def test_own_splits(rows: int, held_out: int) -> None:
    numbers = np.arange(1000, 1000 + rows) * 3
    splits = own_splits(numbers, 0, 2)
    assert {name: len(part) for name, part in splits.items()} == {
        "validation": held_out,
        "test": held_out,
        "train": rows - 2 * held_out,
    }
    assert sorted(np.concatenate(list(splits.values())).tolist()) == numbers.tolist()


def test_own_splits_depend_on_seed_and_client_alone() -> None:
    rows = np.arange(100)
    first, again = own_splits(rows, 0, 0), own_splits(rows, 0, 0)
    other_client, other_seed = own_splits(rows, 0, 1), own_splits(rows, 1, 0)
    for name in first:
        assert np.array_equal(first[name], again[name])
        assert set(first[name]) != set(other_client[name])
        assert set(first[name]) != set(other_seed[name])
    assert first["validation"].tolist() != list(range(10))


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_too_few_rows_for_own_splits(rows: int) -> None:
    with pytest.raises(ValueError, match=f"client 7 has {rows} rows, needs 3: one each to train"):
        own_splits(np.arange(rows), 0, 7)


# --- with an engine ------------------------------------------------------------------------------


def test_clients_of_an_engine_hold_all_rows_once(opened: Callable[..., Engine]) -> None:
    engine = opened("num_clients=4")
    assert sorted(np.concatenate(engine.rows.by_client).tolist()) == list(range(240))
    sizes = [{k: len(v) for k, v in engine.rows.client_examples(c).items()} for c in range(4)]
    assert sum(sum(s.values()) for s in sizes) == 240
    assert [sum(s.values()) for s in sizes] == [len(rows) for rows in engine.rows.by_client]
    for client in (-1, 4):
        with pytest.raises(
            ValueError, match=f"partition-id must be from 0 to num_clients - 1 = 3, got {client}"
        ):
            engine.rows.client_examples(client)


def test_partition_does_not_depend_on_the_method(opened: Callable[..., Engine]) -> None:
    rows = [opened(f"method={m}").rows.by_client for m in ("lora", "scl")]
    assert same(rows[0], rows[1])
    assert not same(rows[0], opened("seed=1").rows.by_client)


def test_max_client_rows_limits_evaluation_but_not_training(
    opened: Callable[..., Engine],
) -> None:
    full, limited = opened(), opened("evaluation.max_client_rows=2")
    for client in range(3):
        whole, few = full.rows.client_examples(client), limited.rows.client_examples(client)
        assert len(few["train"]) == len(whole["train"])
        for split in ("validation", "test"):
            assert len(few[split]) == min(2, len(whole[split]))
            assert few[split].labels.tolist() == whole[split].labels[:2].tolist()
