"""The two ends of every table: each client alone, and all data in one place."""

from dataclasses import dataclass

from fedpeft.algorithms.base import FedAvg
from fedpeft.methods.base import Role


@dataclass(frozen=True)
class LocalOnly(FedAvg):
    """Every client trains alone: what the method shares stays personal, nothing is sent."""

    def role(self, role: Role) -> Role:
        alone = {Role.SHARED: Role.PERSONAL, Role.RECEIVED: Role.FROZEN}
        return alone.get(role, role)


@dataclass(frozen=True)
class Centralized(FedAvg):
    """One model on all clients' training rows, for as many steps a round as the cohort's together.

    It is measured as the others are, on each client's own rows. Only simulation has all rows.
    """

    pooled = True
