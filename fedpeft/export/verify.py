"""The check that an exported folder gives the run's logits, on made-up rows."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft.engine.passes import autocast
from fedpeft.export.run import FinishedRun

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}  # shares of the largest logit


def made_up(run: FinishedRun) -> dict[str, Tensor]:
    """Return inputs of two rows, drawn alike each time; the second row of a text is shorter."""
    draws = torch.Generator().manual_seed(0)
    config: Any = run.replica.model.config
    if run.config.data.needs != "tokenizer":
        side = np.zeros((8, 8, 3), np.uint8)
        shape = run.replica.processor([side], return_tensors="pt")["pixel_values"].shape
        return {"pixel_values": torch.randn(2, *shape[1:], generator=draws)}
    count, pad = min(config.vocab_size, len(run.replica.processor)), config.pad_token_id or 0
    ids = torch.randint(count, (2, 8), generator=draws)
    ids[ids == pad] = (pad + 1) % count
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {
        "input_ids": ids.masked_fill(mask == 0, pad),
        "attention_mask": mask,
    }


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor], precision: str) -> Tensor:
    """Return a model's logits in float32, without the logits of padding.

    Args:
        model: the model, on the CPU and in evaluation mode.
        inputs: see ``made_up``.
        precision: ``bf16`` if weights are in bfloat16 and what was trained is not.
    """
    with autocast(torch.device("cpu"), precision):
        values = model(**inputs).logits.float()
    return values[inputs["attention_mask"] == 1] if values.dim() == 3 else values


def difference(actual: Tensor, expected: Tensor, run: FinishedRun) -> float:
    """Return the largest difference of two models' logits.

    Args:
        actual: logits of the exported folder's model.
        expected: logits of the run's model.
        run: says the precision of the weights.

    Raises:
        ValueError: the difference is larger than rounding.
    """
    largest = float((actual - expected).abs().max())
    most = TOLERANCE[run.config.model.dtype] * max(1.0, float(expected.abs().max()))
    if not largest <= most:
        raise ValueError(
            f"the folder would give other logits than the run, by {largest:.2g} where {most:.2g} "
            "is rounding, because the base model as others load it differs from the run's, for "
            "example by a layer that its files lack: try --as fedpeft"
        )
    return largest
