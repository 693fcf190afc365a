"""Memory, time and bytes of runs before they begin, from the architecture alone.

The numbers are rough: they say whether a study takes an hour or a month, and which GPU it needs.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fedpeft.config.load import load_config
from fedpeft.config.schema import Config
from fedpeft.engine.parameters import count_on_meta
from fedpeft.models.processors import image_side
from fedpeft.nn.token_loss import ROOM
from fedpeft.reporting.study import Study
from fedpeft.reporting.tables import print_table

LOGITS = 4 * ROOM["cuda"]  # most bytes of logits, their exponentials and gradients at once
ACTIVATIONS = 34  # bytes a token, block and hidden number in 16 bits (arXiv 2205.05198, Section 4)


class Estimate(NamedTuple):
    """The cost of a run.

    Attributes:
        memory: bytes of weights, gradients, AdamW's moments and activations of one client.
        operations: floating-point operations of its training.
        sent: bytes of its training's arrays, both ways, without compression.
    """

    memory: float
    operations: float
    sent: float


def estimate(config: Config) -> Estimate:
    """Estimate a run.

    Frozen weights need no gradient, so a step takes 4 operations a parameter and token: 2 forward
    and 2 backward. Rows are counted as long as they may be.

    Raises:
        ValueError: the number of steps depends on the rows (``local_epochs``), which cannot be
            read.
    """
    counts = count_on_meta(config)
    total, trained = counts["total"], counts["trained"][1]
    numbers = config.model.config(config.data.num_labels)
    parts = [getattr(numbers, part, None) for part in ("text_config", "vision_config")]
    shape = next((part for part in parts if part is not None), numbers)
    tokens = config.batch_size * _tokens(config, shape)
    width = 2 if config.model.dtype == "bfloat16" else 4
    share = 1 if config.precision == "bf16" else 2
    held = tokens / config.accumulate * shape.hidden_size * shape.num_hidden_layers
    logits = min(tokens / config.accumulate * getattr(shape, "vocab_size", 0) * 8, LOGITS)
    logits = logits if "CausalLM" in config.data.auto_class else 0
    memory = width * total + 16 * trained + share * ACTIVATIONS * held + logits
    clients = config.cohort_size() * config.num_rounds
    sent = clients * (counts["bytes_up"][1] + counts["bytes_down"][1])
    return Estimate(memory, 4 * total * tokens * _steps(config) * clients, sent)


def _tokens(config: Config, shape: Any) -> int:
    """Return the most tokens of a row."""
    if hasattr(config.data, "max_length"):
        return config.data.max_length
    return (image_side(shape, config.model.images) // shape.patch_size) ** 2 + 1


def _steps(config: Config) -> float:
    if config.local_steps is not None:
        return config.local_steps
    rows = len(config.data.split_rows("train")) / config.num_clients
    return (config.local_epochs or 1) * math.ceil(rows / config.batch_size)


def show_estimate(studies: Sequence[Study], flops: float) -> None:
    """Print what a run of each entry takes, and all runs together.

    Args:
        studies: studies whose runs are counted; an entry's first learning rate and seed stand for
            all of its runs.
        flops: operations a second that a machine reaches.
    """
    cells: list[list[str]] = []
    count, whole, texts = 0, Estimate(0, 0, 0), False
    for study in studies:
        first = replace(study, lrs=study.lrs[:1], seeds=study.seeds[:1])
        for run in first.runs():
            runs = study.count(run.entry)
            config = load_config(run.overrides)
            one, texts = estimate(config), texts or hasattr(config.data, "max_length")
            name = f"{study.folder.name} {run.entry}"
            cells.append([name, str(runs), *_cells(one, flops)])
            memory = max(whole.memory, one.memory)
            count, operations = count + runs, whole.operations + runs * one.operations
            whole = Estimate(memory, operations, whole.sent + runs * one.sent)
    header = ("table and method", "runs", "GB of memory", "hours a run", "MB a run")
    print_table("Estimate, before the first run", header, cells)
    memory, hours, sent = _cells(whole, flops)
    longest = "Texts are counted at data.max_length tokens, so short ones take less. "
    print(
        f"In all {count} runs: about {hours} hours at {flops:.0e} operations a second "
        f"(study.flops), {memory} GB of memory for one client, {sent} MB of arrays. "
        f"{longest if texts else ''}Evaluation and learning rates that are added come on top."
    )


def _cells(cost: Estimate, flops: float) -> list[str]:
    """Return gigabytes of memory, hours and megabytes sent."""
    hours = cost.operations / flops / 3600
    return [f"{cost.memory / 1e9:.1f}", f"{hours:,.2f}", f"{cost.sent / 1e6:,.1f}"]
