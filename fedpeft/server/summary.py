"""Parts of a run's ``summary.json``, and notes on its rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fedpeft.data.batching import REPORTED
from fedpeft.engine.engine import Engine
from fedpeft.engine.parameters import parameter_counts
from fedpeft.engine.passes import autocast
from fedpeft.reporting.observer import Line
from fedpeft.server.diagnostics import initial_error
from fedpeft.server.evaluation import measure
from fedpeft.state import State
from fedpeft.versions import installed


def of_lines(engine: Engine, lines: Sequence[Line]) -> dict[str, Any]:
    """Return the summary of a run's rounds, without the measures on test rows.

    Args:
        engine: the server's engine.
        lines: one line a round, round 0 first.
    """
    return {
        "initial": _measures_in(lines[0]),
        "baseline": _baseline(engine, lines[-1]),
        "bytes": _summed_bytes(lines),
        "interference": [line.get("interference") for line in lines[1:]],
        "refused": _by_round(lines, "refused"),
        "restarted": _by_round(lines, "restarted"),
    }


def of_setup(engine: Engine) -> dict[str, Any]:
    """Return what was known of a run before its first round."""
    replica, task, model = engine.replica, engine.task, engine.config.model
    return {
        "headline": task.headline,
        "higher_is_better": task.sign(task.headline) > 0,
        "parameters": parameter_counts(replica.roles, replica.model),
        "weights": "RANDOM" if model.random else "pretrained",
        "labels": task.label_names,
        "seed": engine.config.seed,
        "versions": installed(),
        "working_directory": str(Path.cwd()),  # relative paths of the configuration start there
    }


def _measures_in(line: Line) -> dict[str, Any]:
    """Return the measures in a round's line."""
    wanted = ("validation_", "client_", "train_loss")
    return {k: v for k, v in line.items() if k.startswith(wanted)}


def _by_round(lines: Sequence[Line], key: str) -> dict[str, Any]:
    """Return an entry of the lines that have it, by round."""
    return {str(line["round"]): line[key] for line in lines if key in line}


def _summed_bytes(lines: Sequence[Line]) -> dict[str, int]:
    """Sum up the rounds' bytes by direction, apart for training and evaluation."""
    ways = {"uplink_bytes", "downlink_bytes"}  # 0 in a run that only measures
    keys = sorted(ways | {k for line in lines for k in line if k.endswith("_bytes")})
    return {key: sum(line.get(key, 0) for line in lines) for key in keys}


def tested(engine: Engine, line: Line, state: State) -> dict[str, Any]:
    """Return a round's measures, with measures on test rows unless parameters are personal.

    Args:
        engine: computes the measures.
        line: the round's line.
        state: parameters that the server had set after the round, full.
    """
    measures = {"round": line["round"]} | _measures_in(line)
    if not engine.replica.roles.has_personal:
        for split in engine.task.test_splits:
            measures |= measure(engine, split, state, line["round"], last=True)
    return measures


def _baseline(engine: Engine, last: Line) -> dict[str, float]:
    """Return the score of one answer for all rows, on test rows and on the clients' own.

    Args:
        engine: has the rows.
        last: line of the last round, with the clients' scores.
    """
    measures = {k: v for k, v in last.items() if k.endswith("_baseline")}
    score = engine.baseline(engine.rows.examples("train"), engine.rows.examples("test"))
    return measures if score is None else measures | {"test_baseline": score}


def cut(engine: Engine) -> dict[str, dict[str, int]]:
    """Count rows whose prompt or answer was longer than its room, by split."""
    by_split: dict[str, dict[str, int]] = {}
    for split in engine.task.splits:
        arrays = engine.rows.examples(split).arrays
        counts = {n: int(arrays[n].sum()) for n in REPORTED if n in arrays}
        by_split |= {split: counts} if counts else {}
    return by_split


def row_notes(engine: Engine) -> list[str]:
    """Return sentences on the rows that somebody should know before round 0."""
    parts: list[str] = []
    for split, counts in cut(engine).items():
        rows = len(engine.rows.examples(split).rows)
        parts += [
            f"{count} of {rows} {key.removeprefix('cut_')}s in {split} ({count / rows:.1%})"
            for key, count in counts.items()
            if count
        ]
    said = f"cut, because they are longer than data.max_length allows: {', '.join(parts)}"
    return [*engine.task.notes(), *([said] if parts else [])]


def error_at_start(engine: Engine) -> dict[str, float]:
    """Measure how far each replaced module starts from the original, on one batch."""
    examples = engine.rows.examples("validation")
    device = engine.replica.device
    batch = examples.batch(np.arange(min(32, len(examples))))
    batch = {key: value.to(device) for key, value in batch.items()}
    engine.replica.load()

    def forward(model: nn.Module) -> None:
        with autocast(device, engine.config.precision):
            engine.task.forward(model, batch)

    original = engine.replica.base_model().to(device)
    return initial_error(original, engine.replica.model, forward)
