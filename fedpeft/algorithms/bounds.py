"""The two bounds of a comparison: each client alone, and all data in one place."""

from dataclasses import dataclass

from fedpeft.algorithms.base import FedAvg, RunFacts
from fedpeft.state import Role


@dataclass(frozen=True)
class LocalOnly(FedAvg):
    """Every client trains alone: the method's shared parameters are personal, nothing is sent."""

    def check(self, facts: RunFacts) -> None:
        if facts.method.starts:
            raise ValueError(
                "strategy LocalOnly sends nothing, but method "
                f"{type(facts.method).__name__} starts from values that the server sets and "
                "sends: choose a start of the method that every client has by itself"
            )

    def role(self, role: Role) -> Role:
        alone = {Role.SHARED: Role.PERSONAL, Role.RECEIVED: Role.FROZEN}
        return alone.get(role, role)


@dataclass(frozen=True)
class Centralized(FedAvg):
    """One model on all clients' training rows, for as many steps a round as the cohort's together.

    With ``local_epochs`` that is the mean over cohorts: epochs x batches x share of the clients.
    The method's personal parameters belong to the one model too. The model is measured on each
    client's rows, as those of other algorithms are. Only simulation has all rows.
    """

    pooled = True

    def check(self, facts: RunFacts) -> None:
        if not facts.whole:
            raise ValueError(
                "strategy Centralized trains one whole model, but with method "
                f"{type(facts.method).__name__} some clients train only a block: use equal ranks"
            )

    def role(self, role: Role) -> Role:
        return Role.SHARED if role is Role.PERSONAL else role
