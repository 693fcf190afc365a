"""One run from its first round to its summary: selects the best round, writes the directory."""

import logging
import time
from functools import cached_property
from typing import Any

from flwr.serverapp import Grid

from fedpeft.config.schema import Checkpointing
from fedpeft.reporting.observer import Line, Observer
from fedpeft.reporting.run_directory import RunDirectory
from fedpeft.reporting.run_files import CHECKPOINTS, LAST_ENTRY, METRICS, read_metrics
from fedpeft.reporting.saved_runs import diverged
from fedpeft.server.checkpoint import Checkpoint, Checkpoints
from fedpeft.server.strategy import FederatedPEFT
from fedpeft.server.summary import cut, error_at_start, of_lines, of_setup, tested
from fedpeft.state import State, save, sha256
from fedpeft.versions import commit

log = logging.getLogger(__name__)


class Run(Observer):
    """Observes a strategy's rounds, then tests its states and writes the summary.

    Args:
        strategy: runs the rounds.
        directory: takes the lines, the states and the summary.
        checkpoint: settings of checkpoints: rounds between two, and how many stay.
        observer: is told how the run goes on.
        command: starts such a run, for the summary.
    """

    def __init__(
        self,
        strategy: FederatedPEFT,
        directory: RunDirectory,
        checkpoint: Checkpointing,
        observer: Observer,
        command: str = "fedpeft run",
    ) -> None:
        self.strategy, self.engine = strategy, strategy.engine
        self.directory, self.observer, self.command = directory, observer, command
        strategy.up.folder = directory.path
        self.lines: list[Line] = []
        self.started = time.perf_counter()
        self.commit = commit()  # now, because the checkout may move on while the run goes
        self.selection = strategy.selection
        self.best_state: State = {}
        self.every = checkpoint.every
        self.checkpoints = Checkpoints(directory.path / CHECKPOINTS, checkpoint.keep)
        self._shared_rows: set[int] = set()  # clients with the server's rows, also before a resume

    @cached_property
    def data(self) -> dict[str, Any]:
        """Numbers of the server's rows and their hash."""
        return self.engine.task.fingerprint()

    @cached_property
    def weights(self) -> str | None:
        """Hash of the base model's weights."""
        return self.engine.config.model.weights_sha256()

    @property
    def partition(self) -> str | None:
        """Hash of who holds which rows; null where clients have rows of their own."""
        return None if self.strategy.nodes.own_rows else self.engine.rows.partition_sha256

    def resume(self) -> None:
        """Go on from the last checkpoint, or from the beginning if there is none.

        Raises:
            ValueError: no checkpoint can be read, or rows or weights have changed since the last
                one.
        """
        checkpoints = self.checkpoints.load()
        if not checkpoints:
            self._begin_anew()
            return
        last = checkpoints[-1]
        self._check_rows(last)
        self.engine.config.model.check_weights(last.weights, str(self.directory.path))
        self._take_lines(last.round)
        self.started -= last.seconds
        self.strategy.restore(checkpoints, self.lines)
        self._take_best(last)
        self._shared_rows.update(last.shared_rows)

    def _begin_anew(self) -> None:
        """Begin where a run was ended before its first checkpoint, which is that of round 0.

        Raises:
            ValueError: there are lines of later rounds, so its checkpoints were lost.
        """
        path = self.directory.path
        if len(lines := read_metrics(path) if (path / METRICS).exists() else []) > 1:
            raise ValueError(
                f"{path / CHECKPOINTS} has no checkpoint, although {METRICS} beside it has rounds "
                f"up to {lines[-1]['round']}: bring it back, or give another run_dir"
            )
        self.directory.keep_lines(-1)

    def _take_lines(self, last: int) -> None:
        """Read the rounds' lines.

        Raises:
            ValueError: a round's line is missing, so the summary would be wrong.
        """
        self.lines = self.directory.keep_lines(last)
        rounds = [line["round"] for line in self.lines]
        if rounds != list(range(last + 1)):
            raise ValueError(
                f"{self.directory.path / METRICS} must have a line for each round from 0 to "
                f"{last}, the checkpoint's, but has {len(rounds)}: bring it back, or give another "
                "run_dir"
            )

    def _take_best(self, last: Checkpoint) -> None:
        """Take over the best round; if its state is lost, choose from the last round on.

        The lines alone would choose a round again whose state was lost before.
        """
        if last.best_state is not None:
            self.best_state = last.best_state
            self.selection.restore(self.lines, last.best)
            return
        log.warning(
            "round %s was the best so far, but its state is lost: from now on the best one is "
            "chosen from round %s on",
            *(last.best, last.round),
        )
        self.selection.restore(self.lines, None)
        if self.selection.better(self.lines[-1]):
            self.selection.restore(self.lines, last.round)
            self.best_state = last.state
            self.strategy.down.note_best()

    def _check_rows(self, last: Checkpoint) -> None:
        """Refuse to go on with other rows, because their results would mix with the old ones'."""
        data, partition = self.data["sha256"], self.partition if last.partition else None
        for what, before, now in (
            ("the rows of the data set have", last.data, data),
            ("the partition, which says who holds which rows, has", last.partition, partition),
        ):
            if before and before != now:
                raise ValueError(
                    f"{what} changed since round {last.round} of {self.directory.path} (SHA-256 "
                    f"{before[:12]}, now {str(now)[:12]}): bring back what it was, or give another "
                    "run_dir"
                )

    def serve(self, grid: Grid) -> dict[str, Any]:
        """Run all rounds and return the summary."""
        self.strategy.observer = self
        self.strategy.start(grid)
        return self.summarize()

    def stopped(self, reason: str = "") -> str:
        """Say how far the run is and how it goes on.

        Args:
            reason: the error that stopped it.
        """
        path = self.directory.path
        done = f"after round {self.lines[-1]['round']}" if self.lines else "before round 0 ended"
        if diverged(reason):
            return (
                f"stopped {done}, and would probably diverge again: lower lr and give a new run_dir"
            )
        return f"stopped {done}: the same command with run_dir={path} resume=true goes on"

    def phase(self, name: str, clients: int) -> None:
        self.observer.phase(name, clients)

    def clients_done(self, count: int) -> None:
        self.observer.clients_done(count)

    def left_out(self, phase: str, client: int, outcome: str, reason: str) -> None:
        self.observer.left_out(phase, client, outcome, reason)

    def round_done(self, line: Line) -> None:
        """Write and show a round's line, and keep the state of the best round."""
        self.lines.append(line)
        self.directory.append(line, self.strategy.seen.rows(line["round"]))
        self.observer.round_done(line)
        if self.selection.best is line:
            self.best_state = dict(self.strategy.state)
            self.strategy.down.note_best()
        round = line["round"]
        last = round == self.engine.config.num_rounds or self.selection.stopped
        if round % self.every == 0 or last:
            self._checkpoint(round)

    def _checkpoint(self, round: int) -> None:
        """Save what the next round depends on."""
        down = self.strategy.down
        generations = down.generations
        nodes = self.strategy.nodes
        self._shared_rows |= nodes.of.keys() - nodes.own_rows
        self.checkpoints.save(
            Checkpoint(
                round=round,
                run=down.run,
                seconds=elapsed(self.started),
                best=self.selection.best.get("round"),
                accepted=generations.accepted,
                best_accepted=generations.best,
                state=down.state,
                best_state=self.best_state,
                memory=down.memory,
                method_memory=down.method_memory,
                best_method_memory=down.best_method_memory,
                data=self.data["sha256"],
                partition=self.partition,
                weights=self.weights,
                own_rows=sorted(nodes.own_rows),
                shared_rows=sorted(self._shared_rows),
                said=self.strategy.up.said,
            )
        )
        kept = [*generations.checkpoints, generations.accepted]
        generations.checkpoints = kept[-self.checkpoints.keep :]

    def summarize(self) -> dict[str, Any]:
        """Test the final and the best state, and write the summary."""
        engine, state = self.engine, self.strategy.state
        save(self.directory.path / "shared_state.safetensors", state)
        best = self.selection.best
        if not best:  # nothing was measured that selects, so the last round counts as the best
            best, self.best_state = self.lines[-1], state
        best_state = {n: self.best_state.get(n, engine.replica.initial[n]) for n in state}
        save(self.directory.path / "best_shared_state.safetensors", best_state)
        final = tested(engine, self.lines[-1], state)
        if engine.samples and not engine.replica.roles.has_personal:
            self.directory.save_samples(engine.samples)
        last_is_best = best is self.lines[-1]
        summary = {
            "method": type(engine.config.method).__name__,
            "selected_by": self.selection.name,
            "stopped_early": self._stopped_early(),
            "final": final,
            "best": final if last_is_best else tested(engine, best, self.best_state),
            **of_lines(engine, self.lines),
            "seconds": elapsed(self.started),
            "shared_state_sha256": sha256(state),
            **of_setup(engine),
            "weights_sha256": self.weights,
            "data": self.data | {"cut": cut(engine)},
            "partition_sha256": self.partition,
            "notes": self._notes(),
            "commit": self.commit,
            "command": self.command,
            "run_dir": str(self.directory.path),
        }
        self.directory.pack_clients()
        self._save_partition()
        self.directory.finish(summary)  # before the base model is built, for which memory may lack
        summary[LAST_ENTRY] = error_at_start(engine)
        self.directory.finish(summary)
        self.directory.drop_clients()
        return summary

    def _notes(self) -> list[str]:
        """Return sentences on the rows, also on those that no client held."""
        left = [] if self.strategy.nodes.own_rows else self.engine.rows.left_over()
        return [*self.engine.task.notes(), *left]

    def _save_partition(self) -> None:
        """Write the rows by label of each client that says that it trains on the server's rows."""
        nodes = self.strategy.nodes
        clients = sorted((self._shared_rows | nodes.of.keys()) - nodes.own_rows)
        if clients:
            self.directory.save_partition(self.engine.rows.held(clients))

    def _stopped_early(self) -> dict[str, Any] | None:
        """Return after which round the run ended early, and why; null if it had all rounds."""
        round, reason = self.lines[-1]["round"], self.selection.stopped
        early = reason and round < self.engine.config.num_rounds
        return {"round": round, "reason": reason} if early else None


def elapsed(begun: float) -> float:
    """Return the seconds since ``begun``, to the millisecond."""
    return float(f"{time.perf_counter() - begun:.3f}")
