"""The best round by a measure on validation rows, and whether the run should end early."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedpeft.reporting.observer import Line


@dataclass
class Selection:
    """Chooses the best of the rounds that are evaluated; test rows never choose.

    It depends on the rounds' lines alone, so a run that goes on from a checkpoint chooses, and
    stops, as a run that was never broken.

    Args:
        name: the measure's name in a round's line, such as ``validation_accuracy``.
        sign: 1 if more of it is better, -1 if less.
        patience: evaluations in a row without a better one, after which the run ends; null if it
            never ends early.

    Attributes:
        best: line of the best round, the earlier one of equals; empty if nothing was measured.
        waited: number of evaluations since the best round.
    """

    name: str
    sign: int
    patience: int | None = None
    best: Line = field(default_factory=dict)
    waited: int = 0

    def better(self, line: Line) -> bool:
        """Tell whether a round is better than all that were added."""
        value = line.get(self.name)  # null or not finite if training diverged
        if value is None or not math.isfinite(value):
            return False
        return not self.best or self.sign * (value - self.best[self.name]) > 0

    def add(self, line: Line) -> None:
        """Take in a round that ended; a round that was not evaluated changes nothing."""
        if self.name not in line:
            return
        if self.better(line):
            self.best, self.waited = line, 0
        else:
            self.waited += 1

    def restore(self, lines: Sequence[Line], best: int | None) -> None:
        """Go on after some rounds.

        Args:
            lines: the lines of the rounds so far.
            best: number of the best round; null if there is none.
        """
        self.best = next((line for line in lines if line["round"] == best), {})
        later = lines if best is None else [line for line in lines if line["round"] > best]
        self.waited = sum(self.name in line for line in later)

    def is_last(self, line: Line) -> bool:
        """Tell whether the run ends early once a round is added."""
        if self.patience is None or self.name not in line:
            return False
        return not self.better(line) and self.waited + 1 >= self.patience

    @property
    def stopped(self) -> str:
        """Say why the run ends early; empty if it goes on."""
        if self.patience is None or self.waited < self.patience:
            return ""
        best = self.best and f"better than {self.best[self.name]:.4f} of round {self.best['round']}"
        return (
            f"in {self.waited} evaluation{'s' * (self.waited > 1)} {self.name} was not "
            f"{best or 'a finite number'} (early_stopping.patience={self.patience})"
        )
