"""Replies beyond what the memory may hold lie on the disk, with the same values and bits."""

import logging
import sys
from pathlib import Path

import pytest
import torch

from fedpeft.server import shelf
from fedpeft.server.shelf import Shelf
from tests.conftest import Runner, mixed

MIB = 1 << 20


def anonymous() -> float:
    """Return the MiB of this process that no file backs, which the system cannot take back."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def test_values_of_every_dtype_and_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "MOST_IN_MEMORY", 0)
    state = mixed() | {"turned": torch.arange(6.0).reshape(2, 3).T}
    taken = Shelf(tmp_path).take(state)
    assert list(taken) == list(state)
    for name, value in state.items():
        assert taken[name].dtype == value.dtype and torch.equal(taken[name], value), name
        assert not value.numel() or taken[name].data_ptr() != value.data_ptr(), name
    assert torch.signbit(taken["extremes"]).tolist() == [False, True, False, False]
    assert list(tmp_path.iterdir()) == []  # the files have no name, so a crash leaves none


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which pages are anonymous")
def test_memory_does_not_grow_with_the_replies(tmp_path: Path) -> None:
    taking = Shelf(tmp_path)
    before, states = anonymous(), []
    for number in range(16):
        states.append(taking.take({"w": torch.full((16 * MIB,), float(number))}))  # 64 MiB
    assert [float(s["w"].mean()) for s in states] == list(range(16))  # reads all
    assert anonymous() - before < (shelf.MOST_IN_MEMORY / MIB) + 100


def test_the_bits_of_a_run_are_the_same(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ("strategy=scaffold", "optimizer.name=sgd", "method=lora")
    inside = run(*overrides)
    monkeypatch.setattr(shelf, "MOST_IN_MEMORY", 0)
    outside = run(*overrides)
    assert outside["shared_state_sha256"] == inside["shared_state_sha256"]
    assert outside["final"] == inside["final"]


def test_without_room_on_the_disk_they_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shelf, "MOST_IN_MEMORY", 0)
    taking = Shelf(tmp_path / "nowhere")
    state = mixed()
    with caplog.at_level(logging.WARNING):
        assert taking.take(state) is state and taking.take(state) is state
    assert len(caplog.records) == 1 and "nowhere" in caplog.text
