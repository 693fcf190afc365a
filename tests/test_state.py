"""States: the check of what arrives, their hash and size, and a model's values."""

import pytest
import torch
from torch import nn

from fedpeft.state import State, check, load_state, payload_bytes, sha256, snapshot
from tests.conftest import mixed

# --- check --------------------------------------------------------------------------------------


def problem(state: State, expected: State) -> str | None:
    """Return the sentence by which a state is refused; null if it is accepted."""
    try:
        check(state, expected)
    except ValueError as error:
        return str(error)
    return None


def test_check_accepts_what_was_expected_in_any_order() -> None:
    expected = {"a": torch.zeros(2), "b": torch.zeros(1, 2, dtype=torch.bfloat16)}
    state = {"b": torch.ones(1, 2, dtype=torch.bfloat16), "a": torch.ones(2)}
    assert problem(state, expected) is None
    assert problem({}, {}) is None
    assert problem({"none": torch.zeros(0, 3)}, {"none": torch.ones(0, 3)}) is None


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"b": torch.zeros(2)}, "1 keys are missing, first a"),
        ({}, "2 keys are missing, first a"),
        (
            {"a": torch.zeros(2), "b": torch.zeros(2), "d": torch.zeros(1), "c": torch.zeros(1)},
            "2 keys are unknown, first c",
        ),
        (
            {"a": torch.zeros(2), "b": torch.zeros(2, 1)},
            r"b is torch.float32 \(2, 1\), expected torch.float32 \(2,\)",
        ),
        (
            {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float16)},
            r"b is torch.float16 \(2,\), expected torch.float32 \(2,\)",
        ),
        ({"a": torch.tensor([0.0, float("nan")]), "b": torch.zeros(2)}, "a holds values that are"),
        ({"a": torch.zeros(2), "b": torch.tensor([-float("inf"), 0.0])}, "b holds values that are"),
        ({"a": torch.tensor([0.0, float("inf")]), "b": torch.zeros(2)}, "a holds values that are"),
    ],
)
def test_check_names_what_differs(state: State, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(state, {"a": torch.zeros(2), "b": torch.zeros(2)})


# --- hash ---------------------------------------------------------------------------------------


def test_sha256_depends_on_all_but_the_order() -> None:
    state = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([1, 2])}
    first = sha256(state)
    assert first == sha256({"b": state["b"].clone(), "a": state["a"].clone()})
    assert len(first) == 64 and first != sha256({})
    different = [
        {"a": state["a"]},
        {"c": state["a"], "b": state["b"]},
        {"a": torch.tensor([1.0, 2.0, 3.0, 4.0000005]), "b": state["b"]},
        {"a": torch.tensor([2.0, 1.0, 3.0, 4.0]), "b": state["b"]},
        {"a": state["a"].reshape(2, 2), "b": state["b"]},
        {"a": state["a"].double(), "b": state["b"]},
        {"a": state["a"].view(torch.int32), "b": state["b"]},
        {"a": state["a"], "b": state["b"].int()},
    ]
    hashes = [sha256(s) for s in different]
    assert len({first, *hashes}) == 1 + len(different)


def test_sha256_tells_zero_from_minus_zero_and_reads_bfloat16() -> None:
    assert sha256({"a": torch.tensor([0.0])}) != sha256({"a": torch.tensor([-0.0])})
    half = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert sha256({"a": half}) == sha256({"a": half.clone()})
    assert sha256({"a": half}) != sha256({"a": half * 2})
    assert sha256({"a": half}) != sha256({"a": half.view(torch.int16)})


def test_sha256_of_a_transpose_is_that_of_its_values() -> None:
    base = torch.arange(6.0).reshape(2, 3)
    assert sha256({"a": base.T}) == sha256({"a": base.T.contiguous()})
    assert sha256({"a": base.T}) != sha256({"a": base.reshape(3, 2)})


# --- bytes --------------------------------------------------------------------------------------


def test_payload_bytes() -> None:
    assert payload_bytes({}) == 0
    assert payload_bytes(mixed()) == 4 * 12 + 2 * 10 + 8 * 2 + 4 + 0 + 8 * 4 + 2 * 2 + 4 * 4
    assert payload_bytes({"a": torch.zeros(3, 5)}) * 2 == payload_bytes({"a": torch.zeros(6, 5)})


# --- models ---------------------------------------------------------------------------------------


def test_snapshot_copies_and_load_state_is_in_place() -> None:
    model = nn.Linear(2, 2)
    copy = snapshot(model, ["weight"])
    before = copy["weight"].clone()
    address = model.weight.data_ptr()
    load_state(model, {"weight": torch.zeros(2, 2)}, {"weight": torch.ones(2, 2)})
    assert model.weight.data_ptr() == address
    assert torch.equal(model.weight, torch.ones(2, 2))  # the later state wins
    assert torch.equal(copy["weight"], before)
    load_state(model, copy)
    assert torch.equal(model.weight, before)
