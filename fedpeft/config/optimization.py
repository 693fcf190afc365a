"""A client's optimizer, clipping and schedules.

Functions import torch, because the configuration is read before it, in processes without it.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

SCHEDULES = ("constant", "linear", "cosine")


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value}")


@dataclass(frozen=True)
class Optimization:
    """A client's optimizer and schedules.

    Args:
        name: ``adamw`` or ``sgd``.
        weight_decay: >= 0; decoupled for AdamW.
        momentum: SGD's momentum, in [0, 1); 0 for AdamW, which has its own.
        max_grad_norm: the norm of all gradients together is clipped to it; null for no clipping.
        schedule: the learning rate's schedule within a round: constant, linear or cosine to 0.
        warmup: share of a round's steps in which the rate climbs from 0, in [0, 1).
        round_schedule: the learning rate's schedule across rounds: constant, linear or cosine to 0.
        keep_state: the client keeps the optimizer's moments from round to round. Without it they
            are fresh each round, so that AdamW with one local step moves by the gradient's sign.
    """

    name: str = "adamw"
    weight_decay: float = 0.0
    momentum: float = 0.0
    max_grad_norm: float | None = 1.0
    schedule: str = "constant"
    warmup: float = 0.0
    round_schedule: str = "constant"
    keep_state: bool = False

    def __post_init__(self) -> None:
        _one_of("optimizer.name", self.name, ("adamw", "sgd"))
        _one_of("optimizer.schedule", self.schedule, SCHEDULES)
        _one_of("optimizer.round_schedule", self.round_schedule, SCHEDULES)
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"optimizer.max_grad_norm must be > 0, got {self.max_grad_norm}")
        if self.weight_decay < 0 or not 0 <= self.momentum < 1:
            raise ValueError(
                "optimizer.weight_decay must be >= 0 and optimizer.momentum in [0, 1), got "
                f"{self.weight_decay} and {self.momentum}"
            )
        if self.momentum and self.name != "sgd":
            raise ValueError(
                f"optimizer.momentum={self.momentum} is for optimizer.name=sgd, got {self.name}"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"optimizer.warmup must be in [0, 1), got {self.warmup}")

    def build(self, parameters: "list[nn.Parameter]", lr: float) -> "torch.optim.Optimizer":
        """Return a fresh optimizer."""
        import torch

        if self.name == "adamw":
            return torch.optim.AdamW(  # fused: one pass over the numbers in place of ten
                parameters, lr=lr, weight_decay=self.weight_decay, fused=True
            )
        return torch.optim.SGD(
            parameters, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay
        )

    def rate(self, lr: float, round: int, num_rounds: int, step: int, num_steps: int) -> float:
        """Return the learning rate of one step.

        Args:
            lr: the configured rate.
            round: 1, 2, ....
            num_rounds: rounds of the run.
            step: 0, 1, ....
            num_steps: steps of the client in this round.
        """
        lr *= _decay(self.round_schedule, (round - 1) / num_rounds)
        warm = math.ceil(self.warmup * num_steps)
        if step < warm:
            return lr * (step + 1) / warm
        return lr * _decay(self.schedule, (step - warm) / max(1, num_steps - warm))


def _decay(schedule: str, progress: float) -> float:
    if schedule == "linear":
        return 1 - progress
    return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0
