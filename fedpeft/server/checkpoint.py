"""Checkpoints: everything that the rounds after one depend on, so that a run can go on.

All draws derive from (seed, purpose, round, client), so a run that goes on from a checkpoint ends
with the bits of a run that was never broken.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft.methods.base import Memory
from fedpeft.server.generations import Accepted
from fedpeft.state import State, read, read_with_notes, save
from fedpeft.wire import sentence

log = logging.getLogger(__name__)
NOTES = "checkpoint"


PARTS = ("state", "memory", "method_memory", "best_method_memory")  # parts of a file's tensors


@dataclass(frozen=True)
class Checkpoint:
    """The server after a round.

    Attributes:
        round: the last round that is done.
        run: the run's name, under which clients keep their states.
        seconds: seconds that the run has taken so far.
        best: the best round so far; null if nothing was measured that selects.
        accepted: each client's generation.
        best_accepted: each client's generation after the best round.
        state: every parameter that the server has set, full.
        best_state: the same after the best round; null if its file is broken or gone.
        memory: the strategy's memory.
        method_memory: the method's memory.
        best_method_memory: the method's memory after the best round; in the checkpoints of earlier
            versions, after the last round.
        data: hash of the server's rows; null in the checkpoints of earlier versions.
        weights: hash of the base model's weights; null if it is not known.
        partition: hash of who holds which rows; null where clients have rows of their own, which
            their nodes check themselves.
        own_rows: clients that have rows of their own, sorted.
        shared_rows: clients that said that they train on the server's rows, sorted; empty in the
            checkpoints of earlier versions.
        said: rows that each client with rows of its own said at its first usable reply; empty in
            the checkpoints of earlier versions.
    """

    round: int
    run: str
    seconds: float
    best: int | None
    accepted: Accepted
    best_accepted: Accepted
    state: State
    best_state: State | None
    memory: Memory
    method_memory: Memory
    best_method_memory: Memory
    data: str | None = None
    partition: str | None = None
    weights: str | None = None
    own_rows: Sequence[int] = ()
    shared_rows: Sequence[int] = ()
    said: Mapping[int, int] = field(default_factory=dict)


class Checkpoints:
    """The last checkpoints of a run, a file each, and the best state beside them.

    Args:
        folder: takes the files.
        keep: number of checkpoints that stay; older ones are deleted once a newer one is complete.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._bests: dict[int, int | None] = {}  # the best round, by checkpoint
        self._right: set[int] = set()  # best rounds whose files are here, and of this run

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, and then delete what it replaces."""
        if checkpoint.best is not None and checkpoint.best not in self._right:
            assert checkpoint.best_state is not None
            save(self._best(checkpoint.best), checkpoint.best_state)
            self._right.add(checkpoint.best)
        tensors = _named("state", {"": checkpoint.state})
        tensors |= _named("memory", checkpoint.memory)
        tensors |= _named("method_memory", checkpoint.method_memory)
        best = _named("best_method_memory", checkpoint.best_method_memory)
        # Copies, because the last round may be the best one, and a file has no tensor twice.
        tensors |= {name: value.clone() for name, value in best.items()}
        notes = {
            "round": checkpoint.round,
            "run": checkpoint.run,
            "seconds": checkpoint.seconds,
            "best": checkpoint.best,
            "accepted": list(checkpoint.accepted.items()),
            "best_accepted": list(checkpoint.best_accepted.items()),
            "data": checkpoint.data,
            "partition": checkpoint.partition,
            "weights": checkpoint.weights,
            "own_rows": list(checkpoint.own_rows),
            "shared_rows": list(checkpoint.shared_rows),
            "said": list(checkpoint.said.items()),
            "best_memory": True,
        }
        save(self._file(checkpoint.round), tensors, {NOTES: json.dumps(notes)})
        self._bests[checkpoint.round] = checkpoint.best
        self._prune()

    def load(self) -> list[Checkpoint]:
        """Return the checkpoints that can be read, oldest first; the last one is to go on from.

        Raises:
            ValueError: there are checkpoints, but all are broken.
        """
        checkpoints: list[Checkpoint] = []
        broken: list[str] = []
        for round in self._rounds("round"):
            try:
                checkpoints.append(self._read(round, {c.round: c.state for c in checkpoints}))
                self._bests[round] = checkpoints[-1].best
            except (ValueError, OSError) as error:
                broken.append(str(error))
                log.warning("%s", error)
        if broken and not checkpoints:
            raise ValueError(f"no checkpoint can be read: {broken[-1]}")
        return checkpoints

    def _read(self, round: int, states: Mapping[int, State]) -> Checkpoint:
        """Return a checkpoint.

        Args:
            round: the checkpoint's round.
            states: full states of the older checkpoints, by round.

        Raises:
            ValueError: the checkpoint is broken, or not in this version's form.
        """
        tensors, text = read_with_notes(self._file(round))
        try:
            notes: dict[str, Any] = json.loads(text[NOTES])
            parts: dict[str, Memory] = {name: {} for name in PARTS}
            for key, value in tensors.items():
                part, memory, name = json.loads(key)
                parts[part].setdefault(memory, {})[name] = value
            for key in ("accepted", "best_accepted"):
                notes[key] = dict(notes[key])
            notes["said"] = dict(notes.get("said", ()))
            of_best = notes.pop("best_memory", False)
            state = parts["state"].get("", {})
            return Checkpoint(
                **notes,
                state=state,
                best_state=self._best_state(notes["best"], {**states, round: state}),
                memory=parts["memory"],
                method_memory=parts["method_memory"],
                best_method_memory=parts["best_method_memory" if of_best else "method_memory"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            file = self._file(round)
            raise ValueError(
                f"{file} is no checkpoint of this version: {sentence(error)}"
            ) from error

    def _best_state(self, best: int | None, states: Mapping[int, State]) -> State | None:
        """Return the state after the best round; null if it is lost.

        Args:
            best: number of the best round; null if there is none.
            states: full states of the checkpoints that can be read, by round.
        """
        if best is None:
            return {}
        try:
            state = read(self._best(best))
        except (ValueError, OSError) as error:
            log.warning("the state of the best round: %s", error)
            return states.get(best)
        self._right.add(best)
        return state

    def _prune(self) -> None:
        """Delete what no kept checkpoint needs, also drafts of a run that was killed."""
        for round in sorted(self._bests)[: -self.keep]:
            del self._bests[round]
        unused = [self._file(r) for r in self._rounds("round") if r not in self._bests]
        unused += [self._best(r) for r in self._rounds("best") if r not in self._bests.values()]
        for path in [*unused, *self.folder.glob(".*.part")]:
            path.unlink()
        self._right.intersection_update(self._bests.values())

    def _rounds(self, kind: str) -> list[int]:
        names = [path.name for path in self.folder.glob(f"{kind}_*.safetensors")]
        matches = [re.fullmatch(kind + r"_(\d+)\.safetensors", name) for name in names]
        return sorted(int(match[1]) for match in matches if match)

    def _file(self, round: int) -> Path:
        return self.folder / f"round_{round:05}.safetensors"

    def _best(self, round: int) -> Path:
        return self.folder / f"best_{round:05}.safetensors"


def _named(part: str, memory: Memory) -> State:
    """Return all tensors of some states under names of their own."""
    return {
        json.dumps([part, key, name]): value
        for key, state in memory.items()
        for name, value in state.items()
    }
