"""Freed pages go back to the system."""

import psutil
import pytest
import torch

from fedpeft.engine import cpu

MIB = 2**20


def resident() -> float:
    return psutil.Process().memory_info().rss / MIB


def test_freed_pages_go_back_but_not_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(cpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(cpu, "_given_back", 100.0 - cpu.GIVE_BACK_EVERY)
    assert freed_by_a_call() > 60
    assert freed_by_a_call() < 20
    clock[0] += cpu.GIVE_BACK_EVERY
    assert freed_by_a_call() > 60


def freed_by_a_call() -> float:
    """Free 100 MiB of small tensors below one that stays alive; return the MiB given back."""
    tensors = [torch.ones(16 * 1024) for _ in range(1600)]  # 64 KiB each, so they lie in the heap
    last = tensors[-1]
    tensors.clear()
    before = resident()
    cpu.give_back()
    freed = before - resident()
    assert last.sum() == 16 * 1024
    return freed


def test_other_platforms_call_no_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.sys, "platform", "win32")
    monkeypatch.setattr(cpu, "_given_back", -cpu.GIVE_BACK_EVERY)
    monkeypatch.delattr(cpu.ctypes, "CDLL")
    cpu.give_back()
    assert cpu._given_back == -cpu.GIVE_BACK_EVERY
