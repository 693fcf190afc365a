"""Roles of a model's parameters by round: the method's, changed by configuration and strategy."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache

from torch import nn

from fedpeft.algorithms.base import RunFacts
from fedpeft.config.schema import Config
from fedpeft.methods.base import At
from fedpeft.models.sites import head_parameters
from fedpeft.state import TRAINED, Role, names_with


class Roles:
    """Answers, for one run, which parameter has which role in which round.

    Args:
        config: method, strategy, and the patterns of ``personal`` and ``frozen``.
        model: the model with the method in it.
        rounds: number of rounds; null for the run's.
    """

    def __init__(self, config: Config, model: nn.Module, rounds: int | None = None) -> None:
        self.config, self.rounds = config, rounds or config.num_rounds
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        head = head_parameters(model)
        self._personal = _matching("personal", config.personal, self.names, head)
        self._frozen = _matching("frozen", config.frozen, self.names, head)
        self._changed: list[set[str]] = [set()]  # by round
        # The cache belongs to the object: a cache of the class would keep every object alive.
        self.by_name = lru_cache(maxsize=None)(self._by_name)
        self.down = lru_cache(maxsize=None)(self._down)

    def at(self, round: int, client: int | None = None) -> At:
        """Return the ``At`` of a round and a client of this run."""
        return At(round, client, self.rounds)

    def role(self, name: str, round: int) -> Role:
        """Return a parameter's role in a round."""
        role = self.config.method.role(name, self.at(round))
        if name in self._frozen:
            role = Role.FROZEN
        elif name in self._personal and role is Role.SHARED:
            role = Role.PERSONAL
        return self.config.strategy.role(role)

    def _by_name(self, round: int) -> dict[str, Role]:
        """Return every trainable parameter's role in a round, in the model's order."""
        return {name: self.role(name, round) for name in self.names}

    def trained(self, round: int) -> list[str]:
        """Return the names that train in a round."""
        return names_with(self.by_name(round), *TRAINED)

    def shared(self, round: int) -> list[str]:
        """Return the names that clients send in a round."""
        return names_with(self.by_name(round), Role.SHARED)

    def _down(self, round: int) -> list[str]:
        """Return the names that a client needs from the server in a round.

        A client keeps nothing of the server's between rounds, so it needs everything that has left
        its seeded start: what was shared in a round so far, also if it is frozen now (FedTT+,
        RoLoRA), and what the server has changed.
        """
        sent = self._changed_before(round).union(self.shared(round))
        return [name for name in self.names if name in sent]

    def _changed_before(self, round: int) -> set[str]:
        """Return the names that rounds before this one shared or the server changed."""
        while len(self._changed) <= round:
            last = len(self._changed) - 1
            roles = self.by_name(last) if last or self.config.method.starts else {}
            kinds = (Role.RECEIVED, Role.SHARED) if last else (Role.RECEIVED,)
            self._changed.append(self._changed[last].union(names_with(roles, *kinds)))
        return self._changed[round]

    def check(self) -> None:
        """Check that ``personal``, ``frozen``, strategy and compression go with the method.

        Raises:
            ValueError: one of them does not go with the method.
        """
        for round in self._of_training(self.config.num_rounds):
            if self.shared(round):
                self.config.method.check_roles(self.by_name(round))
        facts = self._run_facts()
        self.config.strategy.check(facts)
        self.config.compression.check(facts)

    def _run_facts(self) -> RunFacts:
        config = self.config
        shares = any(self.shared(round) for round in self._of_training(config.num_rounds))
        whole, cohort = not config.method.trains_blocks(config.num_clients), config.cohort_size()
        return RunFacts(config.method, shares, whole, cohort, config.optimizer.name)

    @cached_property
    def has_personal(self) -> bool:
        """True if any parameter stays on the client in any round.

        The run is then measured on the clients in every round, because models before and after a
        parameter becomes personal could not be compared otherwise.
        """
        rounds = self._of_training(self.rounds)
        return any(Role.PERSONAL in self.by_name(round).values() for round in rounds)

    @staticmethod
    def _of_training(count: int) -> range:
        """Return the rounds; of a run without any, the one that its model would begin with."""
        return range(1, max(1, count) + 1)


def _matching(
    key: str, patterns: str | Sequence[str] | None, names: Iterable[str], head: set[str]
) -> set[str]:
    """Return the names that ``head`` or a shell pattern matches."""
    result: set[str] = set()
    listed = [patterns] if isinstance(patterns, str) else patterns or []
    for pattern in listed:
        matched = {n for n in names if n in head} if pattern == "head" else set()
        if pattern != "head":
            matched = {name for name in names if fnmatchcase(name, pattern)}
            if not matched:
                raise ValueError(
                    f"{key}={pattern} matches no trained parameter: give head, or a pattern of "
                    f"names such as {next(iter(names), '*')}"
                )
        result |= matched
    return result
