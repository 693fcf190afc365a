"""Freed pages go back to the system."""

import time
from itertools import count

import psutil
import pytest
import torch

from fedpeft.engine import cpu

MIB = 2**20
TESTS = count(1)


def resident() -> float:
    return psutil.Process().memory_info().rss / MIB


def test_freed_pages_go_back_but_not_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = after_the_pause(monkeypatch)
    assert freed_by_a_call() > 60
    assert freed_by_a_call() < 20
    clock[0] += cpu.GIVE_BACK_EVERY
    assert freed_by_a_call() > 60


def after_the_pause(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Set the clock, which the list holds, to a time at which a call gives pages back.

    The time is later than in the test before, because the module remembers its last call.
    """
    clock = [time.monotonic() + 3 * cpu.GIVE_BACK_EVERY * next(TESTS)]
    monkeypatch.setattr(cpu.time, "monotonic", lambda: clock[0])
    return clock


def freed_by_a_call() -> float:
    """Free 100 MiB of small tensors below a tensor that stays alive; return the MiB given back."""
    tensors = [torch.ones(16 * 1024) for _ in range(1600)]  # 64 KiB each, so they lie in the heap
    last = tensors[-1]
    tensors.clear()
    before = resident()
    cpu.give_back()
    freed = before - resident()
    assert last.sum() == 16 * 1024
    return freed


def test_other_platforms_call_no_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str | None] = []
    after_the_pause(monkeypatch)
    monkeypatch.setattr(cpu.ctypes, "CDLL", loaded.append)
    monkeypatch.setattr(cpu.sys, "platform", "win32")
    cpu.give_back()
    assert loaded == []
    monkeypatch.setattr(cpu.sys, "platform", "linux")
    cpu.give_back()
    assert loaded == [None]
