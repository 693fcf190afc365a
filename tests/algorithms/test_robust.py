"""Robust rules by hand, under attack, and against Flower's."""

import pytest
import torch
from flwr.serverapp import strategy as flower

from fedpeft.algorithms.base import FedAvg
from fedpeft.algorithms.robust import Krum, Median, NormClipping, TrimmedMean
from fedpeft.state import State
from tests.algorithms.aggregation import aggregate, aggregate_by_flower, random_states

ZERO = {"a": torch.zeros(1)}


def numbers(*values: float) -> list[State]:
    return [{"a": torch.tensor([float(value)])} for value in values]


def test_median_by_hand() -> None:
    assert aggregate(Median(), numbers(5, -100, 1), ZERO)["a"].item() == 1
    assert aggregate(Median(), numbers(5, -100, 1, 2), ZERO)["a"].item() == 1.5
    states = [{"a": torch.tensor(v)} for v in ([1.0, 9.0], [2.0, 8.0], [30.0, -70.0])]
    assert aggregate(Median(), states, {"a": torch.zeros(2)})["a"].tolist() == [2, 8]


def test_trimmed_mean_by_hand() -> None:
    states = numbers(100, 1, 2, 6, -1000)
    assert aggregate(TrimmedMean(beta=0.2), states, ZERO)["a"].item() == 3
    assert aggregate(TrimmedMean(beta=0.4), states, ZERO)["a"].item() == 2
    assert [TrimmedMean(beta=0.29).cut(n) for n in (3, 4, 100)] == [0, 1, 29]


def test_too_few_replies_to_trim_change_nothing() -> None:
    """The plain mean would let one of four clients steer the result."""
    assert aggregate(TrimmedMean(beta=0.2), numbers(1, 2, 3, 1e6), ZERO) == {}
    assert aggregate(TrimmedMean(beta=0.25), numbers(1, 2, 3, 1e6), ZERO)["a"].item() == 2.5


def test_krum_by_hand() -> None:
    """With n = 5 and f = 1, a client's score sums its two smallest squared distances.

    The scores of 0, 1, 2, -1 and 100 are 1 + 1, 1 + 1, 1 + 4, 1 + 4 and 98^2 + 99^2.
    """
    states = numbers(0, 1, 2, -1, 100)
    assert Krum().select(states) == [0]  # 0 and 1 tie, and the first wins
    assert aggregate(Krum(), states, ZERO)["a"].item() == 0
    assert Krum(num_selected=3).select(states) == [0, 1, 2]
    assert aggregate(Krum(num_selected=4), states, ZERO)["a"].item() == 0.5
    # weights 10, 30, 20, 40 of 100: (30 + 40 - 40) / 100
    weighted = aggregate(Krum("examples", num_selected=4), states, ZERO)
    assert weighted["a"].item() == pytest.approx(0.3)


def test_krum_counts_all_parameters_together() -> None:
    values = [(0, 0), (0, 9), (1, 0), (0, 1), (9, 0)]
    states = [{"a": torch.tensor([float(a)]), "b": torch.tensor([float(b)])} for a, b in values]
    assert Krum().select(states) == [0]
    assert aggregate(Krum(), states, {})["b"].item() == 0


def test_krum_with_too_few_replies_changes_nothing() -> None:
    assert aggregate(Krum(), numbers(0, 1, 2, 3), ZERO) == {}
    assert aggregate(Krum(num_malicious=0), numbers(0, 1, 2), ZERO)


def test_multi_krum_selects_fewer_where_replies_are_lost() -> None:
    """Six of seven replies are selected; of five, four are, because one may be malicious."""
    assert len(Krum(num_selected=6).select(numbers(0, 1, 2, 3, 4, 5, 6))) == 6
    assert aggregate(Krum(num_selected=6), numbers(0, 1, 2, 3, 1e6), ZERO)["a"].item() == 1.5


def test_norm_clipping_by_hand() -> None:
    before = {"a": torch.tensor([1.0]), "b": torch.tensor([1.0])}
    # updates (3, 4) of norm 5 and (0, 0.5)
    states = [{"a": torch.tensor([a]), "b": torch.tensor([b])} for a, b in ((4.0, 5.0), (1.0, 1.5))]
    after = aggregate(NormClipping(max_norm=1.0), states, before)
    assert after["a"].item() == pytest.approx(1 + 0.6 / 2)
    assert after["b"].item() == pytest.approx(1 + (0.8 + 0.5) / 2)
    median = aggregate(NormClipping(max_norm=None), states, before)  # 2.75
    assert median["a"].item() == pytest.approx(1 + 3 * 0.55 / 2)
    weighted = aggregate(NormClipping("examples", 1.0), states, before)  # 10 and 30 rows
    assert weighted["b"].item() == pytest.approx(1 + 0.25 * 0.8 + 0.75 * 0.5)
    assert aggregate(NormClipping(), [before, before], before)["a"].item() == 1  # nothing moved


RULES = [Median(), TrimmedMean(), Krum(), Krum(num_selected=3), NormClipping()]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_one_attacker_of_five_steers_nothing(rule: FedAvg) -> None:
    before = {name: torch.zeros_like(v) for name, v in random_states(0, 1)[0].items()}
    states = [{n: 0.1 * v for n, v in state.items()} for state in random_states(1)]
    states[3] = {n: 1e6 * v for n, v in states[3].items()}
    robust, mean = aggregate(rule, states, before), aggregate(FedAvg(), states, before)
    assert max(float(v.abs().max()) for v in robust.values()) < 0.4
    assert max(float(v.abs().max()) for v in mean.values()) > 1e4
    assert all(robust[n].dtype == before[n].dtype for n in before)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        (Median(), flower.FedMedian()),
        (TrimmedMean(beta=0.25), flower.FedTrimmedAvg(beta=0.25)),
        (Krum("examples"), flower.Krum(num_malicious_nodes=1)),
        (
            Krum("examples", num_selected=3),
            flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3),
        ),
    ],
    ids=["median", "trimmed_mean", "krum", "multi_krum"],
)
def test_as_flower_s(rule: FedAvg, theirs: flower.FedAvg, seed: int) -> None:
    states = random_states(seed)
    values = aggregate(rule, states, states[0])
    for name, expected in aggregate_by_flower(theirs, states).items():
        torch.testing.assert_close(values[name], expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Median(weights="examples"), "weights must be uniform for Median, got examples"),
        (lambda: TrimmedMean(beta=0.5), r"beta must be in \(0, 0.5\): .* got 0.5"),
        (lambda: TrimmedMean(beta=0.0), r"beta must be in \(0, 0.5\): .* got 0.0"),
        (lambda: Krum(num_malicious=-1), "num_malicious must be >= 0, got -1"),
        (lambda: Krum(num_selected=0), "num_selected must be >= 1, got 0"),
        (lambda: NormClipping(max_norm=0.0), "max_norm must be > 0 or null, got 0.0"),
    ],
)
def test_values_outside_their_rule(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
