"""Broken, stale and foreign files in the folder of checkpoints."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.server.checkpoint import NOTES, Checkpoint, Checkpoints
from fedpeft.state import State, read_with_notes, save
from tests.conftest import cut


def one(value: float) -> State:
    return {"w": torch.tensor([value])}


def checkpoint(round: int, best: int, value: float | None = None) -> Checkpoint:
    """Return a checkpoint in whose states each round's value is its number, or a value of ours."""
    value = round if value is None else value
    best_state = one(value if best == round else best)
    return Checkpoint(round, "0" * 16, 1.0, best, {}, {}, one(value), best_state, {}, {}, {})


def saved(folder: Path, *rounds: tuple[int, int]) -> Checkpoints:
    """Save checkpoints, each a round and the best one so far."""
    checkpoints = Checkpoints(folder, 2)
    for round, best in rounds:
        checkpoints.save(checkpoint(round, best))
    return checkpoints


def values(folder: Path) -> list[tuple[int, float, float | None]]:
    """Return round, state and best state of each checkpoint that can be read."""
    return [
        (c.round, c.state["w"].item(), None if c.best_state is None else c.best_state["w"].item())
        for c in Checkpoints(folder, 2).load()
    ]


def test_states_come_back(tmp_path: Path) -> None:
    saved(tmp_path, (3, 3), (4, 3), (5, 3))
    assert values(tmp_path) == [(4, 4, 3), (5, 5, 3)]


def test_the_best_round_s_memory_comes_back_even_if_it_is_empty_or_the_last_one_s(
    tmp_path: Path,
) -> None:
    last = {"ranks": one(2)}
    for round, best in ((3, {}), (4, last), (5, {"ranks": one(4)})):
        whole = replace(checkpoint(round, 3), method_memory=last, best_method_memory=best)
        Checkpoints(tmp_path, 1).save(whole)
        (found,) = Checkpoints(tmp_path, 1).load()[-1:]
        assert (found.method_memory, found.best_method_memory) == (last, best)


def test_a_checkpoint_of_an_earlier_version_has_the_last_memory_for_the_best(
    tmp_path: Path,
) -> None:
    saved(tmp_path, (3, 3))
    (file,) = tmp_path.glob("round_00003*")
    whole = replace(checkpoint(3, 3), method_memory={"ranks": one(2)})
    Checkpoints(tmp_path, 1).save(whole)
    tensors, text = read_with_notes(file)
    notes = json.loads(text[NOTES])
    assert notes.pop("best_memory") is True
    save(file, tensors, {NOTES: json.dumps(notes)})
    (found,) = Checkpoints(tmp_path, 1).load()
    assert found.best_method_memory == {"ranks": one(2)}


@pytest.mark.parametrize("lose", [cut, Path.unlink])
def test_a_lost_best_state_loses_no_checkpoint(
    lose: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, (3, 3), (4, 3), (5, 3))
    lose(tmp_path / "best_00003.safetensors")
    with caplog.at_level(logging.WARNING):
        assert values(tmp_path) == [(4, 4, None), (5, 5, None)]
    assert caplog.messages[0].startswith("the state of the best round: ")
    assert "best_00003.safetensors" in caplog.messages[0]


def test_the_best_round_s_own_checkpoint_has_its_state_too(tmp_path: Path) -> None:
    saved(tmp_path, (3, 3), (4, 4), (5, 4))
    cut(tmp_path / "best_00004.safetensors")
    checkpoints = Checkpoints(tmp_path, 2)
    assert values(tmp_path) == [(4, 4, 4), (5, 5, 4)]
    checkpoints.load()
    checkpoints.save(checkpoint(6, 4))  # this writes the file again
    assert values(tmp_path) == [(5, 5, 4), (6, 6, 4)]


@pytest.mark.parametrize("round", [7, 8])
def test_a_best_state_of_a_round_that_is_done_again(round: int, tmp_path: Path) -> None:
    """Round 7 had another result the first time; its next checkpoint is of round 7 or of 8."""
    saved(tmp_path, (6, 6), (7, 7))
    cut(tmp_path / "round_00007.safetensors")
    checkpoints = Checkpoints(tmp_path, 2)
    (last,) = checkpoints.load()
    assert last.round == 6
    again = Checkpoint(round, "0" * 16, 1.0, 7, {}, {}, one(round), one(70), {}, {}, {})
    checkpoints.save(again)
    assert values(tmp_path)[-1] == (round, round, 70)


NOTED: dict[str, Any] = {"round": 9, "accepted": [], "best_accepted": [], "best": None}


@pytest.mark.parametrize(
    ("state", "notes", "reason"),
    [
        ({}, {}, "KeyError('checkpoint')"),
        ({}, {NOTES: "{"}, "Expecting property name"),
        ({}, {NOTES: "[]"}, "list indices must be integers"),
        ({}, {NOTES: json.dumps({"round": 9})}, "KeyError('accepted')"),
        ({}, {NOTES: json.dumps(NOTED | {"new": 1})}, "unexpected keyword argument 'new'"),
        (one(1), {NOTES: json.dumps(NOTED)}, "Expecting value"),
        ({'["other", "", "w"]': torch.zeros(1)}, {NOTES: json.dumps(NOTED)}, "KeyError('other')"),
    ],
)
def test_a_file_that_is_no_checkpoint_gives_way(
    state: State,
    notes: dict[str, str],
    reason: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved(tmp_path, (7, 7), (8, 8))
    foreign = tmp_path / "round_00009.safetensors"
    save(foreign, state, notes)
    with caplog.at_level(logging.WARNING):
        assert values(tmp_path) == [(7, 7, 7), (8, 8, 8)]
    (said,) = caplog.messages
    assert said.startswith(f"{foreign} is no checkpoint of this version: ") and reason in said
    for path in tmp_path.glob("round_0000[78]*"):
        path.unlink()
    with pytest.raises(ValueError, match="^no checkpoint can be read: .*of this version"):
        Checkpoints(tmp_path, 2).load()
