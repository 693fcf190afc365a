"""Every draw of a run derives from (seed, purpose, round, client): nothing else is random."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, purpose: str, *path: int) -> int:
    """A 63-bit seed for one purpose and place, e.g. ``derive(0, "batches", round, client)``."""
    text = ":".join([str(seed), purpose, *map(str, path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *path: int) -> np.random.Generator:
    """A NumPy generator for one purpose and place."""
    return np.random.default_rng(derive(seed, purpose, *path))


@contextmanager
def torch_seed(seed: int, purpose: str, *path: int) -> Iterator[None]:
    """Seeds torch's global generators inside the block and puts the old state back after it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    value = derive(seed, purpose, *path)
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(value)  # torch.manual_seed asks every kind of device
        if devices:
            torch.cuda.manual_seed_all(value)
        yield


def rng_state(device: torch.device) -> torch.Tensor:
    """State of the generator that draws on a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: torch.device) -> None:
    """Puts a state back."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
