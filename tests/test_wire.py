"""States as Flower's records, their bytes, and Flower's private names that fedpeft needs."""

import importlib
import io
import json
import zlib
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedpeft.state import State
from fedpeft.wire import (
    arrays_of_at_most,
    empty_run,
    from_named_arrays,
    identify,
    named_arrays,
    number,
    pack,
    raised,
    unpack,
    wire_bytes,
)
from tests.conftest import mixed


def equal(a: State, b: State) -> bool:
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )


def test_round_trip_bit_for_bit() -> None:
    state = mixed()
    arrays, index = pack(state)
    back = unpack(arrays, index, 9)
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
    assert len(arrays) == 0 and unpack(arrays, index, 0) == {}


def test_views_and_transposes_are_packed_by_value() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {"t": base.T, "row": base[1], "every": base[:, ::2]}
    assert equal(unpack(*pack(state), len(state)), {n: v.contiguous() for n, v in state.items()})


@pytest.mark.parametrize("said", ["as it is", "float32"])
@pytest.mark.parametrize("kind", ["|V0", "|S0", "<U0"])
def test_items_of_no_bytes_are_not_copied(kind: str, said: str) -> None:
    """A short message can hold any number of them, whatever it says that they are."""
    many, file = 10**12, io.BytesIO()
    header = {"descr": kind, "fortran_order": False, "shape": (many,)}
    np.lib.format.write_array_header_1_0(file, header)
    dtype = kind if said == "as it is" else said
    array = Array(dtype=dtype, shape=(many,), stype="numpy.ndarray", data=file.getvalue())
    index = zlib.compress(json.dumps([["w", "float32", [many]]]).encode())
    with pytest.raises(ValueError, match="^the array of float32 holds "):
        unpack(ArrayRecord({"float32": array}), index, 1)


@pytest.mark.parametrize("shape", [3, "3", [-1], [2.0], [True], [1 << 48], [1] * 65, [[2]]])
def test_a_shape_is_a_list_of_a_few_whole_numbers(shape: Any) -> None:
    arrays, _ = pack({"w": torch.zeros(2)})
    index = zlib.compress(json.dumps([["w", "float32", shape]]).encode())
    with pytest.raises(ValueError, match="^a shape must be a list of whole numbers >= 0, got "):
        unpack(arrays, index, 1)


def test_unpacked_tensors_own_their_memory() -> None:
    state = {"a": torch.zeros(2), "b": torch.zeros(2)}
    arrays, index = pack(state)
    first, second = unpack(arrays, index, 2), unpack(arrays, index, 2)
    first["a"][0] = 5
    assert second["a"][0] == 0 and first["b"][0] == 0 and state["a"][0] == 0


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([["w", "float32", [5]]], r"the array of float32 is too short for w \[5\]"),
        ([["w", "float32", [3]], ["v", "float32", [2]]], "the array of float32 is too short for v"),
        ([["w", "float64", [4]]], "the array of float32 holds more than the index names"),
        ([["w", "float32", [4]], ["v", "float64", [4]]], "the array of float64 is too short for v"),
        ([["w", "float32", [3]]], "the array of float32 holds more than the index names"),
        ([], "the array of float32 holds more than the index names"),
    ],
)
def test_index_and_arrays_must_fit(index: list[object], message: str) -> None:
    arrays = ArrayRecord({"float32": Array(np.zeros(4, np.float32))})
    with pytest.raises(ValueError, match=message):
        unpack(arrays, zlib.compress(json.dumps(index).encode()), 2)


@pytest.mark.parametrize(("count", "fits"), [(4, True), (5, False)])
def test_an_index_has_two_tensors_for_each_expected_one(count: int, fits: bool) -> None:
    """Tensors without numbers take nothing of the arrays, and a kilobyte of memory each."""
    arrays = ArrayRecord({"float32": Array(np.zeros(0, np.float32))})
    index = zlib.compress(json.dumps([[str(i), "float32", [0]] for i in range(count)]).encode())
    if fits:
        assert len(unpack(arrays, index, 1)) == count
        return
    with pytest.raises(ValueError, match="the index must be a list of at most 4 tensors$"):
        unpack(arrays, index, 1)


def test_an_index_takes_a_bounded_room() -> None:
    index = zlib.compress(json.dumps([["x" * 8192, "float32", [0]]]).encode())
    with pytest.raises(ValueError, match="cannot be read: it takes more than 8192 bytes$"):
        unpack(ArrayRecord(), index, 1)


@pytest.mark.parametrize("name", ["int8", "int16", "Tensor", "w"])
def test_an_array_that_is_too_long_or_not_named_is_not_loaded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One array of a message takes its room there once, but loaded for each of its names."""
    index = zlib.compress(json.dumps([[n, n, [1]] for n in ("int8", "Tensor", "w")]).encode())
    monkeypatch.setattr(Array, "numpy", lambda _: pytest.fail("it is loaded"))
    with pytest.raises(ValueError, match=f"^the array of {name} holds more than the index names"):
        unpack(ArrayRecord({name: Array(np.zeros(5000, np.int8))}), index, 2)


def test_arrays_of_one_chunk_without_end_are_not_put_together() -> None:
    """The object of the array names its only chunk 500 times."""
    array = Array(np.zeros(1000, np.float32))
    parts: dict[str, Any] = dict(array.children or {})
    (chunk,) = parts.values()
    body = {"dtype": "float32", "shape": [1000], "stype": "numpy.ndarray"}
    head = array.deflate().partition(b"\x00")[0].split(b" ")
    text = json.dumps(body | {"arraychunk_ids": [0] * 500}).encode()
    content = b" ".join([*head[:-1], str(len(text)).encode()]) + b"\x00" + text
    with arrays_of_at_most(10_000):
        assert len(Array.inflate(array.deflate(), parts).data) == len(chunk.data)
        with pytest.raises(ValueError, match="larger than they may be"):
            Array.inflate(content, parts)
    assert len(Array.inflate(content, parts).data) == 500 * len(chunk.data)
    with arrays_of_at_most(2 * len(chunk.data) - 1):  # bytes of all arrays of a message together
        Array.inflate(array.deflate(), parts)
        with pytest.raises(ValueError, match="larger than they may be"):
            Array.inflate(array.deflate(), parts)


def test_an_array_of_another_dtype_than_its_name() -> None:
    arrays = ArrayRecord({"float32": Array(np.zeros(4, np.float64))})
    with pytest.raises(ValueError, match="the array of float32 holds float64"):
        unpack(arrays, zlib.compress(b'[["w", "float32", [4]]]'), 1)


@pytest.mark.parametrize("index", [b"", b"junk", zlib.compress(b"{not json")])
def test_an_index_that_cannot_be_read(index: bytes) -> None:
    with pytest.raises(ValueError, match="the index of the arrays cannot be read"):
        unpack(ArrayRecord(), index, 1)


def test_one_array_per_parameter_and_back() -> None:
    state = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(2.5)}
    arrays = named_arrays(state)
    assert {name: array.shape for name, array in arrays.items()} == {"b": (2, 3), "a": ()}
    back = from_named_arrays(arrays)
    assert equal(back, state)
    back["b"].zero_()
    assert state["b"].any() and equal(from_named_arrays(arrays), state)


# --- bytes --------------------------------------------------------------------------------------


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


# --- Flower's private names and its sentences -----------------------------------------------------

INFLATABLE = "flwr.supercore.inflatable.inflatable_object"
IDENTITY, RUN = "flwr.supercore.task_identity", "flwr.supercore.run"


def flower(path: str) -> ModuleType:
    """Import a private module of Flower; one sentence says that an upgrade has moved it."""
    try:
        return importlib.import_module(path)
    except ImportError:
        raise AssertionError(f"Flower has no module {path} any more: see fedpeft/wire.py") from None


def test_flower_counts_the_parts_of_a_message() -> None:
    module: Any = flower(INFLATABLE)
    name = "get_all_nested_objects"
    assert hasattr(module, name), f"{INFLATABLE} has no {name}: wire_bytes needs it"
    parts = module.get_all_nested_objects(
        RecordDict({"config": ConfigRecord({"index": b"0123456789"})})
    )
    assert all(isinstance(part.deflate(), bytes) for part in parts.values()), (
        f"{name} gives no objects that deflate to bytes: wire_bytes needs them"
    )


def test_flower_puts_a_message_s_arrays_together_by_array_inflate() -> None:
    module: Any = flower(INFLATABLE)
    for name in ("get_object_body", "get_object_children_ids_from_object_content"):
        assert hasattr(module, name), f"{INFLATABLE} has no {name}: arrays_of_at_most needs it"
    inflate = flower("flwr.supercore.inflatable.inflatable_utils").inflate_object_from_contents
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(1000, np.float32))})})
    parts = {i: part.deflate() for i, part in module.get_all_nested_objects(content).items()}
    with arrays_of_at_most(5000):
        assert inflate(content.object_id, dict(parts)) == content
    with arrays_of_at_most(4000), pytest.raises(ValueError, match="larger than they may be"):
        inflate(content.object_id, dict(parts))


def test_flower_knows_who_makes_messages() -> None:
    identity = getattr(flower(IDENTITY), "TaskIdentity", None)
    assert identity is not None, f"{IDENTITY} has no TaskIdentity: identify needs it"
    for field in ("task_id", "run_id", "node_id"):
        # a property of its metaclass, which raises while it is not set
        assert hasattr(type(identity), field), f"TaskIdentity has no {field}: identify sets it"
    identify()
    new = Message(RecordDict(), 5, "train").metadata
    assert (new.run_id, new.src_node_id) == (1, 1), "messages do not read TaskIdentity any more"


def test_flower_makes_an_empty_run() -> None:
    run = getattr(flower(RUN), "Run", None)
    assert run is not None, f"{RUN} has no Run: empty_run needs it"
    assert hasattr(run, "create_empty"), "Run has no create_empty: empty_run needs it"
    assert empty_run().run_id == 1, "Run.create_empty takes no run_id: empty_run gives 1"


def test_flower_keeps_a_message_s_id() -> None:
    identify()
    message = Message(RecordDict(), 5, "train")
    assert "_message_id" in message.metadata.__dict__, "Metadata has no _message_id: number sets it"
    number(message, "17")
    assert message.metadata.message_id == "17", "Metadata.message_id is not _message_id any more"
    reply = Message(RecordDict(), reply_to=message)
    assert reply.metadata.reply_to_message_id == "17", "a reply does not name its message's id"


@pytest.mark.parametrize("form", ["{error}", "{type}:<'{error}'>"])
def test_flower_puts_what_a_client_raised_at_the_end_of_its_reason(form: str) -> None:
    module: Any = flower("flwr.clientapp.client_app")
    error = module.ClientAppException("rank is 0,\nnot 1")
    reason = form.format(error=error, type=type(error))
    assert raised(reason) == "rank is 0,\nnot 1", f"Flower says {reason!r} now: see WRAPPED"
    assert raised("no reason of Flower's form") == "no reason of Flower's form"


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("flwr.proto.runtime_pb2", ["AcquireTaskRequest"]),
        ("flwr.supercore.constant", ["TaskType"]),
        ("flwr.supercore.heartbeat", ["HeartbeatSender", "make_task_heartbeat_fn_http"]),
        (
            "flwr.supercore.interceptors",
            [
                "RuntimeTokenHttpInterceptor",
                "RuntimeVersionHttpInterceptor",
                "SuperExecAuthHttpInterceptor",
            ],
        ),
        ("flwr.supercore.retry", ["make_simple_http_retry_invoker"]),
        ("flwr.supercore.runtime", ["RuntimeHttpClient"]),
        (
            "flwr.supernode.runtime.run_clientapp",
            ["pull_task_input", "push_message", "push_task_output"],
        ),
    ],
)
def test_flower_has_what_a_node_takes_its_tasks_by(path: str, names: list[str]) -> None:
    missing = [name for name in names if not hasattr(flower(path), name)]
    assert not missing, f"{path} has no {missing} any more: see fedpeft/deployment/tasks.py"


def test_flower_names_the_ends_of_a_reply() -> None:
    request = getattr(flower("flwr.proto.fleet_pb2"), "PushMessagesRequest", None)
    advice = ": see fedpeft/deployment/gateway.py"
    assert request is not None, f"flwr.proto.fleet_pb2 has no PushMessagesRequest{advice}"
    names = request.DESCRIPTOR.fields_by_name
    assert {"node", "messages_list"} <= {*names}, f"PushMessagesRequest differs{advice}"
    metadata = names["messages_list"].message_type.fields_by_name["metadata"].message_type
    fields = {"src_node_id", "dst_node_id", "reply_to_message_id"}
    assert fields <= {*metadata.fields_by_name}, f"a message's metadata differs{advice}"
