"""Evaluation in batches of neighbouring length, in threads."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.config.schema import Config
from fedpeft.data.batching import Batch, Examples, within
from fedpeft.engine.passes import autocast, to_device

log = logging.getLogger(__name__)


def evaluate(
    model: nn.Module,
    evaluate_batch: Callable[[nn.Module, Batch], dict[str, Tensor]],
    examples: Examples,
    batch_size: int,
    max_tokens: int,
    precision: str = "fp32",
    workers: int = 1,
) -> list[dict[str, Tensor]]:
    """Evaluate every row once.

    Each batch is computed by torch's own number of threads, so the bits do not depend on workers.

    Args:
        model: the model to measure, which holds the values.
        evaluate_batch: takes the model and a batch on its device; returns tensors by name.
        examples: rows to evaluate.
        batch_size: most rows in a batch.
        max_tokens: most tokens in a batch: its sequences x its longest length.
        precision: ``fp32``, or ``bf16`` for autocast.
        workers: threads that run batches at once on a CPU.

    Returns:
        For each batch, in a fixed order, the tensors of ``evaluate_batch`` and ``row`` (B,), the
        rows' numbers in their split.
    """
    device = next(model.parameters()).device
    model.eval()

    def run(rows: np.ndarray) -> dict[str, Tensor]:
        batch = to_device(examples.batch(rows), device)
        with torch.inference_mode(), autocast(device, precision):
            return {"row": batch["row"]} | evaluate_batch(model, batch)

    lengths, sequences = examples.lengths, examples.sequences
    batches = within(lengths, batch_size, max_tokens, sequences, device.type)
    if workers == 1 or device.type != "cpu":  # a GPU would have to hold all threads' batches
        return [run(rows) for rows in batches]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, batches))


def scored(
    model: nn.Module,
    config: Config,
    processor: Any,
    examples: Examples,
    workers: int = 1,
    last: bool = False,
) -> tuple[dict[str, float], list[dict[str, str]] | None]:
    """Return the measures of a model by name, and the generated texts if the task generates.

    Args:
        model: the model to measure, which holds the values.
        config: says the task, the precision and the sizes of batches.
        processor: the model's tokenizer or image processor.
        examples: rows to measure on.
        workers: threads that run batches at once.
        last: the run's last evaluation, in which tasks may also measure generated text.
    """
    task, sizes = config.data, (config.evaluation.batch_size, config.evaluation.max_tokens)

    def outputs(function: Callable[..., dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        return evaluate(model, function, examples, *sizes, config.precision, workers)

    rows: Any = task.split_rows(examples.split) if task.reads_rows else None
    forwarded = outputs(lambda model, batch: task.evaluate_batch(task.forward(model, batch), batch))
    metrics, samples = task.score(forwarded, rows, processor), None
    if task.generates(last):
        generated = outputs(partial(task.generate_batch, processor=processor))
        more, samples = task.score_generated(generated, rows, processor)
        metrics |= more
    for name in metrics.keys() - task.ranges.keys():
        _say_unbounded(type(task).__name__, name)
    return metrics, samples


@cache
def _say_unbounded(task: str, name: str) -> None:
    """Warn, once, of a measure that a server takes from no client."""
    log.warning("%s.ranges has no bounds of %s, so clients' values of it do not count", task, name)
