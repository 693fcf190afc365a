"""Freed pages go back to the system."""

import psutil
import pytest
import torch

from fedpeft.engine import cpu as memory

MIB = 2**20


def resident() -> float:
    return psutil.Process().memory_info().rss / MIB


def test_freed_pages_go_back_but_not_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(memory.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(memory, "_given_back", 100.0 - memory.GIVE_BACK_EVERY)
    assert freed_by_a_call() > 60
    assert freed_by_a_call() < 20
    clock[0] += memory.GIVE_BACK_EVERY
    assert freed_by_a_call() > 60


def freed_by_a_call() -> float:
    """MiB that a call gives back, of the 100 of small tensors below one that stays alive."""
    tensors = [torch.ones(16 * 1024) for _ in range(1600)]  # of 64 KiB, which the heap holds
    kept = tensors[-1]
    tensors.clear()
    before = resident()
    memory.give_back()
    freed = before - resident()
    assert kept.sum() == 16 * 1024
    return freed


def test_elsewhere_nothing_is_asked_of_the_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "win32")
    monkeypatch.setattr(memory, "_given_back", -memory.GIVE_BACK_EVERY)
    monkeypatch.delattr(memory.ctypes, "CDLL")
    memory.give_back()
    assert memory._given_back == -memory.GIVE_BACK_EVERY
