"""Seeded draws: each derives from (seed, purpose, round, client)."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, purpose: str, *path: int) -> int:
    """Return a 63-bit seed, e.g. ``derive(0, "batches", round, client)``.

    Args:
        seed: the run's seed.
        purpose: name of the draw.
        path: numbers that tell its repetitions apart, e.g. round and client.
    """
    text = ":".join([str(seed), purpose, *map(str, path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *path: int) -> np.random.Generator:
    """Return a NumPy generator; see ``derive`` for the arguments."""
    return np.random.default_rng(derive(seed, purpose, *path))


@contextmanager
def torch_seed(seed: int, purpose: str, *path: int) -> Iterator[None]:
    """Seed torch's global generators in the block, and restore their states after it.

    See ``derive`` for the arguments.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    value = derive(seed, purpose, *path)
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(value)  # torch.manual_seed probes every kind of device
        if devices:
            torch.cuda.manual_seed_all(value)
        yield


def rng_state(device: torch.device) -> torch.Tensor:
    """Return the state of the generator that draws on a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: torch.device) -> None:
    """Set the state of the generator that draws on a device."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
