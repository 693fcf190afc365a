"""Bounds of a reply: norms against the round's median, and weights against a share."""

import pytest
import torch

from fedpeft.server.limits import capped, lower_median, norms_per_step, too_far, update_norms


def test_norms_are_of_updates_and_of_blocks() -> None:
    before = {"a": torch.ones(2, 2), "b": torch.zeros(3)}
    whole = {"a": torch.tensor([[4.0, 1.0], [1.0, 5.0]]), "b": torch.zeros(3)}
    block = {"a": torch.tensor([[1.0, 3.0]]), "b": torch.zeros(3)}
    assert update_norms(before, [whole, block]) == [5.0, 2.0]


def test_a_norm_of_the_largest_float_does_not_overflow() -> None:
    norms = update_norms({"a": torch.zeros(2)}, [{"a": torch.full((2,), 3e38)}])
    assert norms == [pytest.approx(3e38 * 2**0.5, rel=1e-6)]


@pytest.mark.parametrize(
    ("norms", "left_out"),
    [
        ({0: 1.0, 1: 1e30, 2: 2.0}, [1]),
        ({0: 1.0, 1: 150.0}, [1]),  # of two, the smaller is the median
        ({0: 1.0, 1: 100.0, 2: 1.0}, []),
        ({0: 1.0, 1: 1e3, 2: 1e4, 3: 1.0}, [1, 2]),
        ({0: 5.0}, []),
        ({0: 0.0, 1: 0.0, 2: 7.0}, []),  # nobody moved: no scale to compare with
    ],
)
def test_who_is_left_out(norms: dict[int, float], left_out: list[int]) -> None:
    assert sorted(too_far(norms, 100.0)) == left_out


def test_the_reason_names_norm_rule_and_median() -> None:
    (reason,) = too_far({0: 1.0, 1: 1e30, 2: 2.0}, 100.0).values()
    assert reason == (
        "its update's norm a step is 1e+30, more than strategy.max_norm_ratio=100 times the "
        "round's median 2"
    )


@pytest.mark.parametrize(
    ("norms", "left_out"),
    [
        ({0: 0.5, 1: 1e-9}, []),  # the second hardly moves, which leaves the first one in
        ({0: 0.5, 1: 1e-9, 2: 0.6, 3: 1e-9}, []),
        ({0: 0.0, 1: 0.0, 2: 1e30}, [2]),
        ({0: 0.5, 1: 51.0}, [1]),
        ({0: 90.0, 1: 80.0, 2: 70.0}, []),  # the round's median is larger
    ],
)
def test_the_largest_median_so_far_is_a_measure_too(
    norms: dict[int, float], left_out: list[int]
) -> None:
    assert sorted(too_far(norms, 100.0, before=0.5)) == left_out


def test_the_reason_names_the_largest_median_so_far() -> None:
    (reason,) = too_far({0: 0.0, 1: 1e30}, 100.0, before=2.0).values()
    assert reason.endswith("times the largest median so far, 2")


def test_steps_that_a_client_says_divide_its_norm_to_a_bound() -> None:
    steps = {0: 4, 1: 5, 2: 6 * 10**16}
    norms = {0: 8.0, 1: 5.0, 2: 1e6}
    assert norms_per_step(norms, steps, {2}) == {0: 2.0, 1: 1.0, 2: 1e6 / 500}
    assert norms_per_step(norms, steps, set())[2] == 1e6 / steps[2]  # the server knows its steps


def test_the_lower_median() -> None:
    assert lower_median([]) == 0
    assert lower_median([3.0, 1.0]) == 1 and lower_median([5.0, 1.0, 3.0]) == 3


@pytest.mark.parametrize(
    ("weights", "most", "expected"),
    [
        ([0.2, 0.3, 0.5], 1.0, [0.2, 0.3, 0.5]),
        ([0.1, 0.1, 0.8], 0.5, [0.25, 0.25, 0.5]),
        ([0.05, 0.35, 0.6], 0.4, [0.2, 0.4, 0.4]),  # the second grows beyond it, and is cut too
        ([0.9, 0.1], 0.5, [0.5, 0.5]),
        ([0.0, 0.0, 1.0], 0.2, [1 / 3] * 3),
        ([1.0], 0.5, [1.0]),
    ],
)
def test_weights_are_cut_to_a_share(
    weights: list[float], most: float, expected: list[float]
) -> None:
    assert capped(weights, most) == pytest.approx(expected)
