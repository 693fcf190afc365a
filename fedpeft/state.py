"""States, which are named tensors, and the roles of parameters.

A state is a dictionary from parameter names to tensors. Four kinds occur, and every function says
which it takes:

- full: whole parameters.
- block: the leading blocks that one client trains, where ranks differ by client.
- update: differences of two states.
- wire: what a codec makes of a state; names and shapes may be others.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedpeft.files import replacing

State = dict[str, Tensor]

# Prefixes of what a strategy and a method send or keep beside parameters.
STRATEGY, METHOD = "strategy:", "method:"
# In a saved file's metadata: names in order, and a hash of names, values and notes.
ORDER, CHECKSUM = "order", "sha256"
# NumPy lacks these dtypes, so a view of the bits stands for the values.
_BITS = {torch.bfloat16: torch.int16}


class Role(Enum):
    """Tells what happens to a parameter in one round."""

    SHARED = "shared"  # trained, sent, aggregated
    PERSONAL = "personal"  # trained, never leaves the client
    RECEIVED = "received"  # changed by the server, sent down, not trained
    FROZEN = "frozen"  # neither trained nor sent this round


TRAINED = (Role.SHARED, Role.PERSONAL)


def names_with(roles: Mapping[str, Role], *wanted: Role) -> list[str]:
    """Return the names that have one of the wanted roles, in their order."""
    return [name for name, role in roles.items() if role in wanted]


def snapshot(model: nn.Module, names: Iterable[str]) -> State:
    """Copy named parameters to the CPU."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().to("cpu", copy=True) for name in names}


@torch.no_grad()
def load_state(model: nn.Module, *states: State) -> None:
    """Copy full states into the model in place; later ones win."""
    parameters = dict(model.named_parameters())
    for state in states:
        for name, value in state.items():
            parameters[name].copy_(value)


def weighted_mean(states: Sequence[State], weights: Sequence[float]) -> State:
    """Return sum of w_i theta_i by name.

    Args:
        states: equal names and shapes, one state a client.
        weights: one weight a state; they should sum to 1.

    Returns:
        Each mean in its parameter's dtype; sums are accumulated in float64.

    Raises:
        ValueError: no states, a weight too many or too few, or unequal names.
    """
    if not states or len(states) != len(weights):
        raise ValueError(f"need one weight per state, got {len(states)} and {len(weights)}")
    if any(state.keys() != states[0].keys() for state in states):
        raise ValueError("states must have equal keys to be averaged")
    mean: State = {}
    for name, first in states[0].items():
        total = torch.zeros(first.shape, dtype=torch.float64)
        for state, weight in zip(states, weights, strict=True):
            total.add_(state[name], alpha=weight)  # adds in float64 without a float64 copy
        mean[name] = total.to(first.dtype)
    return mean


def prefixed(state: State, prefix: str) -> State:
    """Put a prefix in front of every name."""
    return {prefix + name: value for name, value in state.items()}


def split_prefixed(state: State, prefix: str = STRATEGY) -> tuple[State, State]:
    """Split a state by a prefix: first the names without it, then the others, without it."""
    inside = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    return {n: v for n, v in state.items() if not n.startswith(prefix)}, inside


def zeros(state: State) -> State:
    """Return zeros of the same names, shapes and dtypes."""
    return {name: torch.zeros_like(value) for name, value in state.items()}


def leading(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the leading block of a shape, as a view."""
    return value[tuple(slice(n) for n in shape)]


def filled(state: State, like: Mapping[str, Tensor]) -> State:
    """Pad blocks with zeros to the shapes of ``like``."""
    full: State = {}
    for name, value in state.items():
        full[name] = value
        if value.shape != like[name].shape:
            full[name] = torch.zeros_like(like[name])
            leading(full[name], value.shape).copy_(value)
    return full


def bits(value: Tensor) -> Tensor:
    """Return the tensor, or a view of its bits where NumPy lacks the dtype."""
    return value.view(_BITS[value.dtype]) if value.dtype in _BITS else value


def bits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that ``bits`` gives."""
    return _BITS.get(dtype, dtype)


def sha256(state: State) -> str:
    """Hash names, dtypes, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(bits(value).numpy().tobytes())
    return digest.hexdigest()


def payload_bytes(state: State) -> int:
    """Count the bytes of a state's arrays, without names and shapes."""
    return sum(value.numel() * value.element_size() for value in state.values())


def check(state: State, expected: Mapping[str, Tensor]) -> None:
    """Compare a received state with the expected names, shapes and dtypes.

    Raises:
        ValueError: a name is missing or unknown, a shape or dtype differs, a value is not finite.
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
        if not is_finite(value):
            raise ValueError(f"{name} holds values that are not finite")


def is_finite(value: Tensor) -> bool:
    """Tell whether all entries are finite, in one pass and without a copy.

    ``torch.isfinite`` would make a mask. NaN is both least and greatest for ``aminmax``.
    """
    return not value.numel() or all(math.isfinite(end) for end in value.aminmax())


def save(path: Path, state: State, notes: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write a state as safetensors with a checksum; the file is complete or not there.

    It is on the disk when this returns, so that it survives a loss of power.

    Args:
        path: the file's path; its folder is made.
        state: a state of any kind.
        notes: text that ``read_with_notes`` gives back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in state.items()}
    metadata = {**notes, ORDER: json.dumps(list(state)), CHECKSUM: _checksum(state, notes)}
    with replacing(path) as draft:
        save_file(tensors, draft, metadata)


def read(path: Path) -> State:
    """Read what ``save`` wrote; see ``read_with_notes``."""
    return read_with_notes(path)[0]


def read_with_notes(path: Path) -> tuple[State, dict[str, str]]:
    """Read what ``save`` wrote: the state and the notes.

    Raises:
        ValueError: the file was cut or changed.
    """
    try:
        with safe_open(path, "pt") as file:
            notes = dict(file.metadata() or {})
            names = json.loads(notes.pop(ORDER, "[]"))
            state = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is broken: {error}") from error
    if notes.pop(CHECKSUM, None) != _checksum(state, notes):
        raise ValueError(f"{path} is broken: its checksum differs")
    return state, notes


def _checksum(state: State, notes: Mapping[str, str]) -> str:
    text = json.dumps(sorted(notes.items()))
    return hashlib.sha256((text + sha256(state)).encode()).hexdigest()
