"""Who holds which rows: disjoint, complete, and the same for the same seed."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import entropy

from fedpeft.data.partition import IID, Dirichlet, Partition, own_splits
from fedpeft.session import Session

LABELS = np.arange(400) % 4


def parts(partition: Partition, clients: int = 5, seed: int = 0) -> list[np.ndarray]:
    return partition.indices(LABELS, clients, seed)


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "partition", [IID(), Dirichlet(0.1, 5), Dirichlet(1.0), Dirichlet(100.0), Dirichlet(math.inf)]
)
@pytest.mark.parametrize("clients", [1, 3, 7])
def test_disjoint_and_complete(partition: Partition, clients: int) -> None:
    found = parts(partition, clients)
    assert len(found) == clients
    assert sorted(np.concatenate(found).tolist()) == list(range(400))
    least = partition.min_size if isinstance(partition, Dirichlet) else 1
    assert min(map(len, found)) >= least


@pytest.mark.parametrize("partition", [IID(), Dirichlet(0.5)])
def test_seeds(partition: Partition) -> None:
    first = parts(partition)
    if isinstance(partition, Dirichlet):
        from fedpeft.data import partition as module

        module._dirichlet.cache_clear()
    assert same(first, parts(partition))
    assert not same(first, parts(partition, seed=1))
    assert not same(first, parts(partition, clients=4))


def test_iid_shares_are_equal_and_shuffled() -> None:
    assert sorted(map(len, parts(IID(), 3))) == [133, 133, 134]
    assert sorted(map(len, parts(IID(), 5))) == [80] * 5
    rows = parts(IID(), 5)[0]
    assert rows.tolist() != sorted(rows.tolist())
    counts = np.bincount(LABELS[rows], minlength=4)
    assert counts.min() >= 10  # of 80 rows in four labels


def test_infinite_alpha_is_iid() -> None:
    assert same(parts(Dirichlet(math.inf)), parts(IID()))


def test_small_alpha_is_skewed() -> None:
    """Mean entropy of the clients' labels, of at most log 4 = 1.386."""

    def mean_entropy(alpha: float) -> float:
        counts = [np.bincount(LABELS[rows], minlength=4) for rows in parts(Dirichlet(alpha, 5))]
        return float(np.mean([entropy(c) for c in counts]))

    skewed, mild, even = mean_entropy(0.1), mean_entropy(1.0), mean_entropy(1000.0)
    assert skewed < 0.8 < mild < even
    assert even > 1.37


def test_each_label_has_its_own_shares() -> None:
    counts = np.stack([np.bincount(LABELS[r], minlength=4) for r in parts(Dirichlet(0.3, 5))])
    assert counts.sum(0).tolist() == [100] * 4
    orders = {tuple(np.argsort(counts[:, label])) for label in range(4)}
    assert len(orders) > 1


def test_min_size_is_kept() -> None:
    """Where the plain draw leaves someone with less."""
    assert min(map(len, parts(Dirichlet(0.1, 1), 8, seed=3))) < 25
    assert min(map(len, parts(Dirichlet(0.1, 25), 8, seed=3))) >= 25


def test_a_min_size_that_the_draws_do_not_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpeft.data.partition.ATTEMPTS", 3)
    with pytest.raises(
        ValueError,
        match=re.escape(
            "partition.alpha=0.01 left a client with fewer than partition.min_size=80 of 400 rows "
            "in each of 33 draws for num_clients=5: raise alpha, or lower min_size or num_clients"
        ),
    ):
        parts(Dirichlet(0.01, 80))


@pytest.mark.parametrize(
    ("partition", "clients", "message"),
    [
        (IID(), 401, "400 training rows cannot give num_clients=401 at least 1 each"),
        (Dirichlet(1.0, 1), 401, "400 training rows cannot give num_clients=401 at least 1 each"),
        (Dirichlet(1.0, 10), 41, "400 training rows cannot give num_clients=41 at least 10 each"),
        (
            Dirichlet(math.inf, 10),
            41,
            "400 training rows cannot give num_clients=41 at least 10 each",
        ),
    ],
)
def test_more_clients_than_rows(partition: Partition, clients: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parts(partition, clients)


def test_one_row_each() -> None:
    assert [len(p) for p in parts(IID(), 400)] == [1] * 400


# --- a client's own splits -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "held_out"), [(3, 1), (4, 1), (10, 1), (19, 1), (20, 2), (57, 5), (100, 10)]
)
def test_own_splits(rows: int, held_out: int) -> None:
    own = np.arange(1000, 1000 + rows) * 3
    splits = own_splits(own, 0, 2)
    assert {name: len(part) for name, part in splits.items()} == {
        "validation": held_out,
        "test": held_out,
        "train": rows - 2 * held_out,
    }
    assert sorted(np.concatenate(list(splits.values())).tolist()) == own.tolist()


def test_own_splits_depend_on_seed_and_client_alone() -> None:
    own = np.arange(100)
    first = own_splits(own, 0, 0)
    again, client, seed = own_splits(own, 0, 0), own_splits(own, 0, 1), own_splits(own, 1, 0)
    for name in first:
        assert np.array_equal(first[name], again[name])
        assert set(first[name]) != set(client[name])
        assert set(first[name]) != set(seed[name])
    assert first["validation"].tolist() != list(range(10))


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_too_few_rows_for_own_splits(rows: int) -> None:
    with pytest.raises(ValueError, match=f"client 7 has {rows} rows, needs 3: one each to train"):
        own_splits(np.arange(rows), 0, 7)


# --- in a session --------------------------------------------------------------------------------


def test_clients_of_a_session_hold_all_rows_once(opened: Callable[..., Session]) -> None:
    session = opened("num_clients=4")
    assert sorted(np.concatenate(session.client_rows).tolist()) == list(range(240))
    sizes = [{k: len(v) for k, v in session.client_examples(c).items()} for c in range(4)]
    assert sum(sum(s.values()) for s in sizes) == 240
    assert [sum(s.values()) for s in sizes] == [len(rows) for rows in session.client_rows]
    for client in (-1, 4):
        with pytest.raises(
            ValueError, match=f"partition-id must be from 0 to num_clients - 1 = 3, got {client}"
        ):
            session.client_examples(client)


def test_partition_does_not_depend_on_the_method(opened: Callable[..., Session]) -> None:
    rows = [opened(f"method={m}").client_rows for m in ("lora", "scl")]
    assert same(rows[0], rows[1])
    assert not same(rows[0], opened("seed=1").client_rows)


def test_max_client_rows_limits_what_is_measured_not_what_is_trained(
    opened: Callable[..., Session],
) -> None:
    full, limited = opened(), opened("evaluation.max_client_rows=2")
    for client in range(3):
        all_rows, few = full.client_examples(client), limited.client_examples(client)
        assert len(few["train"]) == len(all_rows["train"])
        for split in ("validation", "test"):
            assert len(few[split]) == min(2, len(all_rows[split]))
            assert few[split].labels.tolist() == all_rows[split].labels[:2].tolist()
