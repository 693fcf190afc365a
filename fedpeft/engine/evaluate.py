"""Evaluation in batches of neighbouring length, in threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from fedpeft.data.batching import Batch, Examples, within
from fedpeft.engine.passes import autocast, to_device


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
        model: with the values to measure.
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

    def run(batch: Batch) -> dict[str, Tensor]:
        batch = to_device(batch, device)
        with torch.inference_mode(), autocast(device, precision):
            return {"row": batch["row"]} | evaluate_batch(model, batch)

    batches = (
        examples.batch(rows)
        for rows in within(
            examples.lengths, batch_size, max_tokens, examples.sequences, device.type
        )
    )
    if workers == 1 or device.type != "cpu":  # a GPU would have to hold all threads' batches
        return [run(batch) for batch in batches]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, batches))
