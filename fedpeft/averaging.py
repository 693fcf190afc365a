"""How clients weigh in the aggregation: the ``strategy`` group of the configuration."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FedAvg:
    """Weights of the clients' states (https://arxiv.org/abs/1602.05629).

    Args:
        weights: ``examples`` (number of training rows) or ``uniform``.
    """

    weights: str = "examples"

    def __post_init__(self) -> None:
        if self.weights not in ("examples", "uniform"):
            raise ValueError(f"weights must be examples or uniform, got {self.weights}")

    def weigh(self, num_examples: Sequence[int]) -> list[float]:
        """Weights that sum to 1."""
        if self.weights == "uniform":
            return [1 / len(num_examples)] * len(num_examples)
        return [n / sum(num_examples) for n in num_examples]
