"""The Flower ServerApp: one run from its configuration to its summary."""

import os
import time
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import nn

from fedpeft.config import load as configuration
from fedpeft.data.batching import REPORTED
from fedpeft.data.rows.source import SPLITS
from fedpeft.engine.parameters import parameter_counts
from fedpeft.engine.passes import autocast
from fedpeft.engine.session import Session, open_session
from fedpeft.methods.base import State
from fedpeft.models.pretrained import weights_sha256
from fedpeft.reporting.progress import Display
from fedpeft.reporting.run_directory import RunDirectory, versions
from fedpeft.server.diagnostics import initial_error
from fedpeft.server.nodes import prepare
from fedpeft.server.strategy import RoleStrategy
from fedpeft.state import sha256

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """``flwr run``: the configuration comes as the run configuration's ``overrides``."""
    overrides = str(context.run_config.get("overrides", ""))
    serve(grid, configuration.split(overrides))


def serve(
    grid: Grid, overrides: list[str], display: Display | None = None, simulated: bool = False
) -> dict[str, Any]:
    """Runs all rounds of one configuration and returns its summary.

    Args:
        simulated: the clients hold parts of the server's own rows, any node can stand for any of
            them, and a partition that is not to be had can end the run before it begins.
    """
    display = display or Display()
    # Where results go is the server's own affair: clients get the rest.
    sent = configuration.join([o for o in overrides if not o.startswith("run_dir=")])
    tree = configuration.composed(overrides)
    if simulated:
        prepare(grid, sent)
    session = open_session(sent, None)  # in one process the clients' very session
    session.examples("validation")
    if simulated:
        session.client_rows  # noqa: B018  # computed here, its errors come early
    label = type(session.config.method).__name__
    directory = RunDirectory(tree.run_dir, tree, label)
    folder = str(directory.path.resolve() / "clients") if simulated else None
    run = _Run(session, RoleStrategy(session, sent, folder), directory, display)
    weights = " (RANDOM WEIGHTS)" if session.config.model.random else ""
    display.start(f"{label}{weights}: {directory.path}", session.config.num_rounds)
    try:
        run.strategy.hosts.join(grid)
        for round in range(session.config.num_rounds + 1):
            run.round(grid, round)
        return run.summarize()
    finally:
        display.stop()


class _Run:
    """The rounds of one run, in the order of Flower's ``Strategy.start``."""

    def __init__(
        self, session: Session, strategy: RoleStrategy, directory: RunDirectory, display: Display
    ) -> None:
        self.session, self.strategy = session, strategy
        self.directory, self.display = directory, display
        self.lines: list[dict[str, Any]] = []
        self.started = time.perf_counter()
        metric, self.sign = session.task.selects
        self.selects = (
            f"client_validation_{metric}" if session.has_personal else f"validation_{metric}"
        )
        self.best_state: State = {}
        self.best: dict[str, Any] = {}

    def round(self, grid: Grid, round: int) -> None:
        """Trains (not in round 0), evaluates when it is time, and writes the line."""
        begun = time.perf_counter()
        line: dict[str, Any] = {"round": round}
        if round:
            self._train(grid, round)
            seen = self.strategy.round
            line |= {"cohort": seen.cohort} | seen.metrics
        if self.session.config.evaluates(round):
            line |= self._evaluate(grid, round)
        seen = self.strategy.round
        line |= seen.traffic
        if seen.refused:
            line["refused"] = {str(client): reason for client, reason in seen.refused.items()}
        line["seconds"] = round_seconds(begun)
        self.lines.append(line)
        self.directory.append(line)
        self.display.round_done(line)
        self._select(line)

    def _train(self, grid: Grid, round: int) -> None:
        strategy, timeout = self.strategy, self.session.config.runtime.round_timeout
        messages = strategy.configure_train(round, *strategy.packed(round), grid)
        cohort = strategy.round.cohort
        self.display.phase("train", len(cohort))
        strategy.aggregate_train(
            round, strategy.hosts.exchange(grid, messages, timeout, self.display.clients_done)
        )

    def _evaluate(self, grid: Grid, round: int) -> dict[str, Any]:
        """The server's model where there is one, and each client's own where asked."""
        session, strategy = self.session, self.strategy
        line: dict[str, Any] = {}
        if not session.has_personal:
            line |= self._server_metrics("validation", self.strategy.state)
        choice = session.config.evaluation.clients
        if choice == "always" or (choice == "auto" and session.has_personal):
            # What the next round would send: also what the server has set that none sent yet.
            messages = strategy.configure_evaluate(round, *strategy.packed(round + 1), grid)
            self.display.phase("evaluate", session.config.num_clients)
            timeout = session.config.runtime.round_timeout
            hosts, done = strategy.hosts, self.display.clients_done
            replies = hosts.exchange(grid, messages, timeout, done)
            line |= strategy.aggregate_evaluate(round, replies) or {}
        return line

    def _server_metrics(self, split: str, state: State, last: bool = False) -> dict[str, float]:
        compression = self.session.config.compression  # the model is what clients would get
        self.session.load(compression.received(compression.down(state), state))
        workers = os.cpu_count() or 1
        metrics = self.session.evaluate(self.session.examples(split), workers, last)
        prefix = split if split in SPLITS else f"test_{split}"
        return {f"{prefix}_{key}": value for key, value in metrics.items()}

    def _select(self, line: dict[str, Any]) -> None:
        """Keeps the best round by validation, the earlier one of equals; test rows never select."""
        value, best = line.get(self.selects), self.best.get(self.selects)
        if value is not None and (best is None or self.sign * (value - best) > 0):
            self.best, self.best_state = line, dict(self.strategy.state)

    def summarize(self) -> dict[str, Any]:
        """Tests the final and the best state, and writes the summary."""
        session, state = self.session, self.strategy.state
        self.directory.save_state("shared_state", state)
        if not self.best:  # nothing that selects was measured: the last round stands for the best
            self.best, self.best_state = self.lines[-1], state
        best_state = {n: self.best_state.get(n, session.initial[n]) for n in state}
        self.directory.save_state("best_shared_state", best_state)
        final = self._tested(self.lines[-1], state)
        if session.samples and not session.has_personal:
            self.directory.save_samples(session.samples)
        last_is_best = self.best is self.lines[-1]
        summary = {
            "method": type(session.config.method).__name__,
            "selected_by": self.selects,
            "final": final,
            "best": final if last_is_best else self._tested(self.best, self.best_state),
            "initial": _measures(self.lines[0]),
            "baseline": self._baseline(),
            "parameters": parameter_counts(
                session.role, session.model, session.trainable, session.config.num_rounds
            ),
            "bytes": self._bytes(),
            "interference": [line.get("interference") for line in self.lines[1:]],
            "initial_error": self._initial_error(),
            "refused": {
                str(line["round"]): line["refused"] for line in self.lines if "refused" in line
            },
            "seconds": round_seconds(self.started),
            "shared_state_sha256": sha256(state),
            "weights_sha256": self._weights_hash(),
            "weights": "RANDOM" if session.config.model.random else "pretrained",
            "data": session.task.fingerprint() | {"cut": self._cut()},
            "seed": session.config.seed,
            "versions": versions(),
            "run_dir": str(self.directory.path),
        }
        self.directory.finish(summary)
        return summary

    def _cut(self) -> dict[str, dict[str, int]]:
        """Rows whose prompt or answer was longer than its room, by split."""
        found: dict[str, dict[str, int]] = {}
        for split in (*SPLITS, *self.session.task.extra_tests):
            arrays = self.session.examples(split).arrays
            counts = {n: int(arrays[n].sum()) for n in REPORTED if n in arrays}
            found |= {split: counts} if counts else {}
        return found

    def _weights_hash(self) -> str | None:
        model = self.session.config.model
        return None if model.random else weights_sha256(model.source())

    def _tested(self, line: dict[str, Any], state: State) -> dict[str, Any]:
        """A round's measures, with the server's model on the test rows where it has one."""
        measures = {"round": line["round"]} | _measures(line)
        if not self.session.has_personal:
            # test comes last: its generated texts stay as the samples
            for split in (*self.session.task.extra_tests, "test"):
                measures |= self._server_metrics(split, state, last=True)
        return measures

    def _baseline(self) -> dict[str, float]:
        """Always answering the commonest label: on the test rows, and on the clients' own."""
        session = self.session
        found = {k: v for k, v in self.lines[-1].items() if k.endswith("_baseline")}
        baseline = session.baseline(session.examples("train"), session.examples("test"))
        return found if baseline is None else found | {"test_baseline": baseline}

    def _bytes(self) -> dict[str, int]:
        """Sums over the rounds, by direction; the evaluation's apart."""
        keys = sorted({k for line in self.lines for k in line if k.endswith("_bytes")})
        return {key: sum(line.get(key, 0) for line in self.lines) for key in keys}

    def _initial_error(self) -> dict[str, float]:
        """Of every replaced module, on one batch of validation rows."""
        session = self.session
        examples = session.examples("validation")
        device = next(session.model.parameters()).device
        batch = examples.batch(torch.arange(min(32, len(examples))).numpy())
        batch = {key: value.to(device) for key, value in batch.items()}
        session.load()

        def forward(model: nn.Module) -> None:
            with autocast(device, session.config.precision):
                session.task.evaluate_batch(model, batch)

        return initial_error(
            session.base_model().to(device),
            session.model,
            forward,
        )


def _measures(line: dict[str, Any]) -> dict[str, Any]:
    wanted = ("validation_", "client_", "train_loss")
    return {k: v for k, v in line.items() if k.startswith(wanted)}


def round_seconds(begun: float) -> float:
    """Seconds since, to the millisecond."""
    return float(f"{time.perf_counter() - begun:.3f}")
