"""States: named tensors of a model by role, their hash, and their form on the wire."""

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from torch import Tensor, nn

from fedpeft.methods.base import Method, Role, State

EXTRA = "strategy:"  # what a strategy sends beside parameters
RoleOf = Callable[[str, int], Role]  # of a parameter's name in a round
# What numpy cannot hold goes as a view of its bits, with the torch dtype named in the index.
BITS = {torch.bfloat16: torch.int16}


def roles(role: RoleOf, names: Iterable[str], round: int) -> dict[str, Role]:
    """Role of each trainable parameter in a round."""
    return {name: role(name, round) for name in names}


def names_with(roles: Mapping[str, Role], role: Role) -> list[str]:
    """Names that have a role, in the model's order."""
    return [name for name, has in roles.items() if has is role]


def down_names(role: RoleOf, names: Iterable[str], round: int) -> list[str]:
    """What a client needs of the server in a round: all that has left its seeded start.

    That is what was shared in a round so far, also if it is frozen now (FedTT+, RoLoRA), since a
    client keeps nothing between rounds; and, after the first round, what the server changes.
    """
    return [
        name
        for name in names
        if any(role(name, r) is Role.SHARED for r in range(1, round + 1))
        or any(role(name, r) is Role.RECEIVED for r in range(1, round))
    ]


def snapshot(model: nn.Module, names: Iterable[str]) -> State:
    """Copies of named parameters, on the CPU."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().to("cpu", copy=True) for name in names}


@torch.no_grad()
def load_state(model: nn.Module, *states: State) -> None:
    """Copies states into the model in place; later ones win."""
    parameters = dict(model.named_parameters())
    for state in states:
        for name, value in state.items():
            parameters[name].copy_(value)


def with_extras(state: State, extras: State, prefix: str = EXTRA) -> State:
    """Parameters and a strategy's extras as one state."""
    return state | {prefix + name: value for name, value in extras.items()}


def split_extras(state: State, prefix: str = EXTRA) -> tuple[State, State]:
    """What ``with_extras`` joined."""
    extras = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    return {n: v for n, v in state.items() if not n.startswith(prefix)}, extras


def zeros(state: State) -> State:
    """Zeros of the same names, shapes and dtypes."""
    return {name: torch.zeros_like(value) for name, value in state.items()}


def blocks(method: Method, state: State, client: int) -> State:
    """The leading blocks of a state that a client trains."""
    return {
        name: value[tuple(slice(n) for n in method.block(name, value.shape, client))]
        for name, value in state.items()
    }


def filled(state: State, like: Mapping[str, Tensor]) -> State:
    """Blocks filled up with zeros to the shapes of ``like``."""
    full: State = {}
    for name, value in state.items():
        full[name] = value
        if value.shape != like[name].shape:
            full[name] = torch.zeros_like(like[name])
            full[name][tuple(slice(n) for n in value.shape)] = value
    return full


def sha256(state: State) -> str:
    """Of names, dtypes, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(_bits(value).numpy().tobytes())
    return digest.hexdigest()


def _bits(value: Tensor) -> Tensor:
    return value.view(BITS[value.dtype]) if value.dtype in BITS else value


def pack(state: State) -> tuple[ArrayRecord, bytes]:
    """One flat array per dtype, and a compressed index of names, dtypes and shapes.

    A deployment's cost grows with the number of arrays, so there are as few as can be.
    """
    by_dtype: dict[str, list[Tensor]] = {}
    index: list[list[object]] = []
    for name, value in state.items():
        dtype = str(value.dtype).removeprefix("torch.")
        index.append([name, dtype, list(value.shape)])
        by_dtype.setdefault(dtype, []).append(_bits(value.detach().cpu()).reshape(-1))
    arrays = ArrayRecord({k: Array(torch.cat(v).numpy()) for k, v in by_dtype.items()})
    return arrays, zlib.compress(json.dumps(index, separators=(",", ":")).encode(), 9)


def unpack(arrays: ArrayRecord, index: bytes) -> State:
    """The state that was packed.

    Raises:
        ValueError: index and arrays do not fit together.
    """
    flat = {dtype: array.numpy() for dtype, array in arrays.items()}
    used = dict.fromkeys(flat, 0)
    state: State = {}
    try:
        entries = json.loads(zlib.decompress(index))
    except (zlib.error, ValueError) as error:
        raise ValueError(f"the index of the arrays cannot be read: {error}") from error
    for name, dtype, shape in entries:
        size = int(np.prod(shape))
        if dtype not in flat or used[dtype] + size > flat[dtype].size:
            raise ValueError(f"the array of {dtype} is too short for {name} {shape}")
        part = torch.from_numpy(flat[dtype][used[dtype] : used[dtype] + size].copy())
        used[dtype] += size
        wanted = getattr(torch, dtype)
        if part.dtype != BITS.get(wanted, wanted):
            raise ValueError(f"the array of {dtype} holds {part.dtype}")
        state[name] = part.view(wanted).reshape(shape)
    if longer := [dtype for dtype in flat if used[dtype] < flat[dtype].size]:
        raise ValueError(f"the array of {longer[0]} holds more than the index names")
    return state


def check(state: State, expected: Mapping[str, Tensor]) -> None:
    """Compares a received state with what the role table says.

    Raises:
        ValueError: a key is missing or unknown, a shape or dtype differs, a value is not finite.
    """
    if missing := sorted(expected.keys() - state.keys()):
        raise ValueError(f"{len(missing)} keys are missing, first {missing[0]}")
    if unknown := sorted(state.keys() - expected.keys()):
        raise ValueError(f"{len(unknown)} keys are unknown, first {unknown[0]}")
    for name, value in state.items():
        want = expected[name]
        if value.shape != want.shape or value.dtype != want.dtype:
            raise ValueError(
                f"{name} is {value.dtype} {tuple(value.shape)}, "
                f"expected {want.dtype} {tuple(want.shape)}"
            )
        if not _is_finite(value):
            raise ValueError(f"{name} holds values that are not finite")


def _is_finite(value: Tensor) -> bool:
    """In one pass and without a copy, unlike ``torch.isfinite``: NaN is both least and greatest."""
    return not value.numel() or all(math.isfinite(end) for end in value.aminmax())


def wire_bytes(content: RecordDict) -> int:
    """Bytes of a message's content as Flower's transport serialises it."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(content).values())


def payload_bytes(state: State) -> int:
    """Bytes of the arrays alone."""
    return sum(value.numel() * value.element_size() for value in state.values())
