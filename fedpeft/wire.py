"""States as Flower records, and the byte counts of messages.

The private names of Flower that fedpeft needs stand in this file, those by which a node takes its
messages in ``deployment/tasks.py``, and the request that the server's door reads in
``deployment/gateway.py``; ``tests/test_wire.py`` says which one an upgrade removed.
"""

import json
import math
import re
import zlib
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedpeft.state import State, bits, bits_dtype

MOST_DIMENSIONS = 64  # of a tensor of torch
INDEX_ENTRY = 1 << 12  # bytes of a tensor in the index, whatever a codec makes of it, at most
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
        arrays: by dtype.
        index: of names, dtypes and shapes, compressed.
        expected: number of tensors before a codec made more of them. It bounds the index unpacked,
            because a tensor without numbers takes little of a message and much memory.

    Raises:
        ValueError: index and arrays do not fit together.
    """
    most = INDEX_ENTRY * (1 + expected)
    flat = {dtype: array.numpy() for dtype, array in arrays.items()}
    used = dict.fromkeys(flat, 0)
    state: State = {}
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(index, most)
        if unpacker.unconsumed_tail:
            raise ValueError(f"it takes more than {most} bytes")
        entries = json.loads(text)
    except (zlib.error, ValueError) as error:
        raise ValueError(f"the index of the arrays cannot be read: {error}") from error
    for name, dtype, shape in entries:
        _check_shape(shape)
        size = math.prod(shape)
        if dtype not in flat or used[dtype] + size > flat[dtype].size:
            raise ValueError(f"the array of {dtype} is too short for {name} {shape}")
        wanted = getattr(torch, dtype)
        # Before the copy, because items of no bytes can be without number in a short message.
        if (held := flat[dtype].dtype) != torch.empty(0, dtype=bits_dtype(wanted)).numpy().dtype:
            raise ValueError(f"the array of {dtype} holds {held}")
        part = torch.from_numpy(flat[dtype][used[dtype] : used[dtype] + size].copy())
        used[dtype] += size
        state[name] = part.view(wanted).reshape(shape)
    if longer := [dtype for dtype in flat if used[dtype] < flat[dtype].size]:
        raise ValueError(f"the array of {longer[0]} holds more than the index names")
    return state


def _check_shape(shape: Any) -> None:
    """Check that a shape is one, because numbers without a bound keep their product busy.

    Raises:
        ValueError: it is no list of a few whole numbers.
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


def number(message: Message, identifier: str) -> None:
    """Give a message its id, as every grid of Flower does when it is pushed."""
    message.metadata.__dict__["_message_id"] = identifier


def empty_run() -> Run:
    """Return the run that a grid of this process belongs to."""
    return Run.create_empty(run_id=1)
