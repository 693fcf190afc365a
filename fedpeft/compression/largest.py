"""The largest entries of a vector on the wire, as their values and places.

The places are a bitmap, one bit an entry, where that takes fewer bytes than an int32 for each entry
sent. The choice follows from the numbers of entries and of entries sent, which both sides know.
"""

import numpy as np
import torch
from torch import Tensor

from fedpeft.state import State

BITMAP = "compression:bitmap:"
INDICES = "compression:indices:"


def check_share(name: str, share: float) -> None:
    """Raise ValueError unless a share of a vector's entries is in (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {share}")


def count(share: float, numel: int) -> int:
    """Return how many entries are sent, the number nearest to the share and at least one."""
    return min(numel, max(1, round(share * numel)))


def as_bitmap(numel: int, sent: int) -> bool:
    """Tell whether a bitmap of places takes fewer bytes than indices."""
    return _bytes(numel) < 4 * sent or numel > 2**31  # more than int32 can number


def _bytes(numel: int) -> int:
    return (numel + 7) // 8


def largest_of(flat: Tensor, sent: int) -> Tensor:
    """Return the places of the largest magnitudes, rising; of equals, the earlier entry goes."""
    return flat.abs().sort(descending=True, stable=True).indices[:sent].sort().values


def encoded(name: str, flat: Tensor, sent: int) -> State:
    """Encode the largest entries of a vector.

    Args:
        name: name of the vector, and of its values on the wire.
        flat: the vector, (n,).
        sent: number of entries that are sent.

    Returns:
        Values (sent,) in its dtype, and a uint8 bitmap (n/8 rounded up,) or int32 indices (sent,).
    """
    places = largest_of(flat, sent)
    if not as_bitmap(flat.numel(), sent):
        return {name: flat[places], INDICES + name: places.to(torch.int32)}
    bits = torch.zeros(flat.numel(), dtype=torch.bool)
    bits[places] = True
    return {name: flat[places], BITMAP + name: torch.from_numpy(np.packbits(bits.numpy()))}


def expected(name: str, numel: int, sent: int) -> State:
    """Return a state with the names, shapes and dtypes of what ``encoded`` returns.

    Args:
        name: the vector's name.
        numel: number of the vector's entries.
        sent: number of entries that are sent.
    """
    values = {name: torch.zeros(sent)}
    if as_bitmap(numel, sent):
        return values | {BITMAP + name: torch.zeros(_bytes(numel), dtype=torch.uint8)}
    return values | {INDICES + name: torch.zeros(sent, dtype=torch.int32)}


def decoded(name: str, wire: State, numel: int) -> Tensor:
    """Return the vector (numel,), float32, with zeros for what was not sent.

    Args:
        name: the vector's name.
        wire: has the names, shapes and dtypes of ``expected``.
        numel: number of the vector's entries.

    Raises:
        ValueError: ``encoded`` never returns such a bitmap or indices.
    """
    if BITMAP + name in wire:
        places = _of_bitmap(name, wire[BITMAP + name], numel, len(wire[name]))
    else:
        places = _of_indices(name, wire[INDICES + name].long(), numel)
    flat = torch.zeros(numel)
    flat[places] = wire[name]
    return flat


def _of_bitmap(name: str, bitmap: Tensor, numel: int, sent: int) -> Tensor:
    """Return the places that a bitmap sets, rising."""
    bits = torch.from_numpy(np.unpackbits(bitmap.numpy()))
    within, beyond = int(bits[:numel].sum()), int(bits[numel:].sum())
    if within != sent or beyond:
        raise ValueError(
            f"the bitmap of {name} must have {sent} of its first {numel} bits set and no bit "
            f"beyond, got {within} and {beyond}"
        )
    return bits.nonzero().reshape(-1)


def _of_indices(name: str, indices: Tensor, numel: int) -> Tensor:
    """Check indices and return them."""
    rising = bool((indices.diff() > 0).all())
    if len(indices) and not (rising and indices[0] >= 0 and indices[-1] < numel):
        raise ValueError(
            f"indices of {name} must rise within 0..{numel - 1}, got {indices.tolist()[:5]}"
        )
    return indices
