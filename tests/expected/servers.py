"""Servers' rules by the papers' formulas, in numpy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass
class Given:
    """One round at the server; all shared parameters stand in a row of n numbers.

    Attributes:
        fields: fields of the strategy's YAML.
        start: the values that the clients received, (n,).
        states: the values that the clients sent, (clients, n).
        shares: each client's share of the rows, (clients,).
        m: first moments, (n,); a rule sets them anew.
        v: second moments, which start at tau^2.
    """

    fields: dict[str, Any]
    start: Array
    states: Array
    shares: Array
    m: Array
    v: Array

    @property
    def step(self) -> Array:
        """Step from ``start`` to the mean, as far as float32 holds the mean."""
        mean = (self.shares @ self.states).astype(np.float32)
        return mean.astype(np.float64) - self.start


Rule = Callable[[Given], Array]


def by_rows(given: Given) -> Array:
    return given.shares @ given.states


def uniform(given: Given) -> Array:
    return given.states.mean(axis=0)


def momentum(given: Given) -> Array:
    given.m = given.fields["server_momentum"] * given.m + given.step
    return given.start + given.fields["server_lr"] * given.m


def adagrad(given: Given) -> Array:
    given.m, given.v = given.step, given.v + given.step**2
    return _adapted(given)


def adam(given: Given) -> Array:
    one, two = given.fields["beta_1"], given.fields["beta_2"]
    given.m = one * given.m + (1 - one) * given.step
    given.v = two * given.v + (1 - two) * given.step**2
    return _adapted(given)


def yogi(given: Given) -> Array:
    one, square = given.fields["beta_1"], given.step**2
    given.m = one * given.m + (1 - one) * given.step
    given.v = given.v - (1 - given.fields["beta_2"]) * square * np.sign(given.v - square)
    return _adapted(given)


def _adapted(given: Given) -> Array:
    scale = given.fields["server_lr"] / (np.sqrt(given.v) + given.fields["tau"])
    return given.start + scale * given.m


def median(given: Given) -> Array:
    return np.median(given.states, axis=0)


def trimmed(given: Given) -> Array:
    """Leave out one of three at each end."""
    assert len(given.states) == 3 and given.fields["beta"] > 1 / 3
    return np.sort(given.states, axis=0)[1]


def krum(given: Given) -> Array:
    """Score each of three states, none malicious, by the state that is nearest to it."""
    states = given.states
    assert len(states) == 3 and given.fields["num_malicious"] == 0
    squares = ((states[:, None] - states[None]) ** 2).sum(axis=2)
    scores = np.sort(squares, axis=1)[:, 1]
    best = np.argsort(scores, kind="stable")[: given.fields["num_selected"]]
    return states[best].mean(axis=0)


def clipped(given: Given) -> Array:
    updates, limit = given.states - given.start, given.fields["max_norm"]
    norms = np.linalg.norm(updates, axis=1, keepdims=True)
    return given.start + (updates * np.minimum(1, limit / norms.clip(1e-30))).mean(axis=0)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("fedavg", "fedprox", "centralized"), by_rows),
    "fednova": by_rows,  # all clients take equally many steps here
    "scaffold": uniform,
    "fedavgm": momentum,
    "fedadagrad": adagrad,
    "fedadam": adam,
    "fedyogi": yogi,
    "median": median,
    "trimmed_mean": trimmed,
    "krum": krum,
    "multi_krum": krum,
    "norm_clipping": clipped,
}
