"""States as Flower records, and the byte counts of messages.

The private names of Flower that fedpeft needs stand in this file, those by which a node takes its
messages in ``deployment/tasks.py``, and the request that the server's door reads in
``deployment/gateway.py``; ``tests/test_wire.py`` says which one an upgrade removed.
"""

import json
import math
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_body,
    get_object_children_ids_from_object_content,
)
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedpeft.state import State, bits, bits_dtype

MOST_DIMENSIONS = 64  # dimensions of torch's tensors
MOST_PARTS = 2  # tensors that a codec makes of one, at most
INDEX_ENTRY = 1 << 12  # bytes of a tensor in the index, whatever a codec makes of it, at most
NPY_HEADER = 1 << 12  # bytes of an array beside its numbers, at most
WRAPPED = re.compile(r"Message: (.*?)(?:'>)?$", re.DOTALL)  # in Flower's reason of an error


def pack(state: State) -> tuple[ArrayRecord, bytes]:
    """Pack a state into one flat array per dtype.

    There are as few arrays as possible, because each one costs time in a deployment.

    Returns:
        The arrays by dtype, and a compressed index of names, dtypes and shapes.
    """
    by_dtype: dict[str, list[Tensor]] = {}
    index: list[list[object]] = []
    for name, value in state.items():
        dtype = str(value.dtype).removeprefix("torch.")
        index.append([name, dtype, list(value.shape)])
        by_dtype.setdefault(dtype, []).append(bits(value.detach().cpu()).reshape(-1))
    arrays = ArrayRecord({k: Array(torch.cat(v).numpy()) for k, v in by_dtype.items()})
    return arrays, zlib.compress(json.dumps(index, separators=(",", ":")).encode(), 9)


def unpack(arrays: ArrayRecord, index: bytes, expected: int) -> State:
    """Return the state that was packed.

    Args:
        arrays: one flat array for each dtype.
        index: the tensors' names, dtypes and shapes, compressed.
        expected: number of tensors before a codec made more of them. It bounds the index unpacked,
            because a tensor without numbers takes little of a message and much memory.

    Raises:
        ValueError: index and arrays do not fit together.
    """
    entries = _entries(index, 1 + expected)
    sizes: dict[str, int] = {}
    for _, dtype, shape in entries:
        _check_shape(shape)
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
    flat = {dtype: _flat(array, dtype, sizes.get(dtype)) for dtype, array in arrays.items()}
    used = dict.fromkeys(flat, 0)
    state: State = {}
    for name, dtype, shape in entries:
        size = math.prod(shape)
        if dtype not in flat or used[dtype] + size > flat[dtype].size:
            raise ValueError(f"the array of {dtype} is too short for {name} {shape}")
        part = torch.from_numpy(flat[dtype][used[dtype] : used[dtype] + size].copy())
        used[dtype] += size
        state[name] = part.view(getattr(torch, dtype)).reshape(shape)
    if longer := [dtype for dtype in flat if used[dtype] < flat[dtype].size]:
        raise ValueError(f"the array of {longer[0]} holds more than the index names")
    return state


def _entries(index: bytes, expected: int) -> list[Any]:
    """Return the entries of an index, whose number and bytes are bounded before they are read.

    Raises:
        ValueError: the index cannot be read, or is too long.
    """
    most = INDEX_ENTRY * expected
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(index, most)
        if unpacker.unconsumed_tail:
            raise ValueError(f"it takes more than {most} bytes")
        entries = json.loads(text)
    except (zlib.error, ValueError) as error:
        raise ValueError(f"the index of the arrays cannot be read: {error}") from error
    if not isinstance(entries, list) or len(entries) > MOST_PARTS * expected:
        raise ValueError(f"the index must be a list of at most {MOST_PARTS * expected} tensors")
    return entries


def _flat(array: Array, dtype: str, size: int | None) -> Any:
    """Return an array's numbers, after its bytes have been compared with what the index names.

    Several names can stand for one array of a message, so the message's bytes bound nothing.

    Args:
        array: a flat array.
        dtype: name of the array's dtype.
        size: numbers that the index names; null for none.

    Raises:
        ValueError: the array is longer, or holds another dtype.
    """
    wanted = getattr(torch, dtype, None)
    if size is None or not isinstance(wanted, torch.dtype):
        raise ValueError(f"the array of {dtype:.20} holds more than the index names")
    like = torch.empty(0, dtype=bits_dtype(wanted)).numpy().dtype
    if array.dtype != str(like):
        raise ValueError(f"the array of {dtype} holds {array.dtype:.20}")
    if len(array.data) > size * like.itemsize + NPY_HEADER:
        raise ValueError(f"the array of {dtype} holds more than the index names")
    numbers = array.numpy()
    if numbers.dtype != like:  # the dtype that the array names was wrong
        raise ValueError(f"the array of {dtype} holds {numbers.dtype}")
    return numbers


def _check_shape(shape: Any) -> None:
    """Check that a shape is one, because numbers without a bound keep their product busy.

    Raises:
        ValueError: the shape is no list of a few whole numbers.
    """
    few = isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS
    if not few or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise ValueError(f"a shape must be a list of whole numbers >= 0, got {shape!r:.60}")


def named_arrays(state: State) -> ArrayRecord:
    """Return one array per parameter, as Flower's own strategies hand them around."""
    return ArrayRecord({name: Array(value.numpy()) for name, value in state.items()})


def from_named_arrays(arrays: ArrayRecord) -> State:
    """Return the state that ``named_arrays`` packed."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}


def wire_bytes(content: RecordDict) -> int:
    """Count the bytes of a message's content as Flower's transport serialises it."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(content).values())


def sentence(error: Exception) -> str:
    """Return an error's text, or its name too where the text alone says nothing."""
    alone = str(error) and not isinstance(error, LookupError)
    return str(error) if alone else repr(error)


# --- Flower's private names and its sentences ----------------------------------------------------


def raised(reason: str) -> str:
    """Return the text of what a client raised, out of the sentence that Flower puts around it."""
    wrapped = WRAPPED.search(reason)
    return wrapped.group(1) if wrapped else reason


def identify() -> None:
    """Give this process the identity that making messages needs, as Flower's engines do."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


class _Room(threading.local):
    """Bytes that arrays may still take in this thread."""

    left = math.inf


_ROOM, _INFLATE = _Room(), Array.inflate.__func__  # type: ignore[attr-defined]


@contextmanager
def arrays_of_at_most(size: float) -> Iterator[None]:
    """Let the arrays that Flower puts together in this thread take so many bytes in all.

    An array of a message is a list of chunks, and a short list can name one chunk without end.
    Flower joins them before anybody sees the message.
    """
    _ROOM.left = size
    try:
        yield
    finally:
        _ROOM.left = math.inf


def _inflate(cls: Any, object_content: bytes, children: Any = None) -> Array:
    chunks = json.loads(get_object_body(object_content, cls))["arraychunk_ids"]
    names = get_object_children_ids_from_object_content(object_content)
    _ROOM.left -= sum(len((children or {})[names[i]].data) for i in chunks)
    if _ROOM.left < 0:
        raise ValueError("the arrays of a message are larger than they may be")
    return _INFLATE(cls, object_content, children)


Array.inflate = classmethod(_inflate)  # type: ignore[method-assign]


def number(message: Message, identifier: str) -> None:
    """Give a message its id, as every grid of Flower does when it is pushed."""
    message.metadata.__dict__["_message_id"] = identifier


def empty_run() -> Run:
    """Return the run that a grid of this process belongs to."""
    return Run.create_empty(run_id=1)
