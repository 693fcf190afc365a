"""States on the wire and their hash."""

import json
import zlib

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import nn

from fedpeft.methods.base import Role, State
from fedpeft.methods.fedtt import FedTTPlus
from fedpeft.methods.lora import FedSALoRA, LoRA
from fedpeft.state import (
    check,
    down_names,
    load_state,
    names_with,
    pack,
    payload_bytes,
    roles,
    sha256,
    snapshot,
    unpack,
    wire_bytes,
)


def mixed() -> State:
    torch.manual_seed(0)
    return {
        "b.weight": torch.randn(3, 4),
        "a.half": torch.randn(2, 5).to(torch.bfloat16),
        "count": torch.tensor([[-(2**40)], [7]]),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "a.weight": torch.randn(4).double(),
        "half": torch.randn(2).half(),
        "extremes": torch.tensor([0.0, -0.0, 3.4e38, 1e-45]),
    }


def equal(a: State, b: State) -> bool:
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )


def test_round_trip_bit_for_bit() -> None:
    state = mixed()
    arrays, index = pack(state)
    back = unpack(arrays, index)
    assert equal(back, state)
    assert torch.signbit(back["extremes"]).tolist() == [False, True, False, False]


def test_one_array_per_dtype() -> None:
    arrays, _ = pack(mixed())
    assert {name: (a.dtype, a.shape) for name, a in arrays.items()} == {
        "float32": ("float32", (3 * 4 + 1 + 4,)),
        "bfloat16": ("int16", (10,)),
        "int64": ("int64", (2,)),
        "float64": ("float64", (4,)),
        "float16": ("float16", (2,)),
    }


def test_nothing_packs_to_nothing() -> None:
    arrays, index = pack({})
    assert len(arrays) == 0 and unpack(arrays, index) == {}


def test_views_and_transposes_are_packed_by_value() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {"t": base.T, "row": base[1], "every": base[:, ::2]}
    assert equal(unpack(*pack(state)), {n: v.contiguous() for n, v in state.items()})


def test_unpacked_tensors_own_their_memory() -> None:
    state = {"a": torch.zeros(2), "b": torch.zeros(2)}
    arrays, index = pack(state)
    first, second = unpack(arrays, index), unpack(arrays, index)
    first["a"][0] = 5
    assert second["a"][0] == 0 and first["b"][0] == 0 and state["a"][0] == 0


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([["w", "float32", [5]]], r"the array of float32 is too short for w \[5\]"),
        ([["w", "float32", [3]], ["v", "float32", [2]]], "the array of float32 is too short for v"),
        ([["w", "float64", [4]]], "the array of float64 is too short for w"),
        ([["w", "float32", [3]]], "the array of float32 holds more than the index names"),
        ([], "the array of float32 holds more than the index names"),
    ],
)
def test_index_and_arrays_must_fit(index: list[object], message: str) -> None:
    arrays = ArrayRecord({"float32": Array(np.zeros(4, np.float32))})
    with pytest.raises(ValueError, match=message):
        unpack(arrays, zlib.compress(json.dumps(index).encode()))


def test_an_array_of_another_dtype_than_its_name() -> None:
    arrays = ArrayRecord({"float32": Array(np.zeros(4, np.float64))})
    with pytest.raises(ValueError, match="the array of float32 holds torch.float64"):
        unpack(arrays, zlib.compress(b'[["w", "float32", [4]]]'))


@pytest.mark.parametrize("index", [b"", b"junk", zlib.compress(b"{not json")])
def test_an_index_that_cannot_be_read(index: bytes) -> None:
    with pytest.raises(ValueError, match="the index of the arrays cannot be read"):
        unpack(ArrayRecord(), index)


# --- check --------------------------------------------------------------------------------------


def test_check_accepts_what_was_expected_in_any_order() -> None:
    expected = {"a": torch.zeros(2), "b": torch.zeros(1, 2, dtype=torch.bfloat16)}
    check({"b": torch.ones(1, 2, dtype=torch.bfloat16), "a": torch.ones(2)}, expected)
    check({}, {})
    check({"none": torch.zeros(0, 3)}, {"none": torch.ones(0, 3)})


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_wire_bytes_grow_as_the_payload_does(dtype: torch.dtype) -> None:
    sizes = [
        wire_bytes(RecordDict({"arrays": pack({"a": torch.zeros(n, 100, dtype=dtype)})[0]}))
        for n in (1000, 2000, 4000)
    ]
    each = 100 * torch.zeros((), dtype=dtype).element_size()
    assert abs(sizes[1] - sizes[0] - 1000 * each) <= 16
    assert abs(sizes[2] - sizes[1] - 2000 * each) <= 16


def test_wire_bytes_count_every_record() -> None:
    arrays, index = pack({"a": torch.zeros(100)})
    bare = wire_bytes(RecordDict({"arrays": arrays}))
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"index": index})})
    assert 400 < bare < wire_bytes(content) - len(index)
    with_metrics = RecordDict({**content, "metrics": MetricRecord({"loss": 1.0})})
    assert wire_bytes(content) < wire_bytes(with_metrics)


# --- models and roles ----------------------------------------------------------------------------


def test_snapshot_copies_and_load_state_is_in_place() -> None:
    model = nn.Linear(2, 2)
    taken = snapshot(model, ["weight"])
    before = taken["weight"].clone()
    address = model.weight.data_ptr()
    load_state(model, {"weight": torch.zeros(2, 2)}, {"weight": torch.ones(2, 2)})
    assert model.weight.data_ptr() == address
    assert torch.equal(model.weight, torch.ones(2, 2))  # the later state wins
    assert torch.equal(taken["weight"], before)
    load_state(model, taken)
    assert torch.equal(model.weight, before)


def test_roles_and_names() -> None:
    names = ["l.lora_A.w", "l.lora_B.w", "classifier.bias"]
    table = roles(FedSALoRA().role, names, 1)
    assert names_with(table, Role.SHARED) == ["l.lora_A.w"]
    assert names_with(table, Role.PERSONAL) == ["l.lora_B.w", "classifier.bias"]
    assert names_with(table, Role.FROZEN) == []
    assert down_names(FedSALoRA().role, names, 5) == ["l.lora_A.w"]
    assert down_names(LoRA().role, names, 1) == names


def test_down_names_gather_what_was_shared_so_far() -> None:
    names = [f"up.factor_{j}_of_6" for j in range(1, 7)] + ["classifier.bias"]
    numbers = [
        [int(n[10]) for n in down_names(FedTTPlus().role, names, round)[:-1]]
        for round in range(1, 6)
    ]
    # rounds train {1, m, 6} with m = 2 + t mod 4: 3, 4, 5, 2, 3
    assert numbers == [[1, 3, 6], [1, 3, 4, 6], [1, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]] + [
        [1, 2, 3, 4, 5, 6]
    ]
