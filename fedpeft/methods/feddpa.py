"""FedDPA: a global and a local LoRA on every target (https://arxiv.org/abs/2403.19211)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fedpeft.methods.base import At, Phase
from fedpeft.methods.lora import LoRA
from fedpeft.methods.parts.exported import lora_sites
from fedpeft.models.sites import add_by_peft
from fedpeft.state import Role

GLOBAL, LOCAL = "shared", "own"  # names of PEFT's adapters
ALONE = "global alone"  # the setting in which the local adapter is off


@dataclass(frozen=True)
class FedDPA(LoRA):
    """W0 + (alpha/r) ((1 - w) B_g A_g + w B_l A_l): g and the head are shared, l is personal.

    As in the authors' code, the two never train at once. The local adapter trains with the global
    one frozen and both mixed as above. The global one and the head train with the local one off and
    at full scale, W0 + (alpha/r) B_g A_g. Clients are measured with both mixed.

    The paper weighs the adapters anew for each test instance, by its likeness to the client's
    rows; w is fixed here. The paper leaves open whether the head is shared: ``personal=head`` keeps
    it on the client.

    Args:
        local_weight: w in (0, 1); the official code's start is 0.5.
        variant: ``turns`` (FedDPA-T) trains the local adapter and then the global one in every
            round, each for the round's steps. ``after`` (FedDPA-F) trains the global one in all
            rounds but the last, in which the clients of its cohort train the local one alone.
    """

    common: ClassVar[str | None] = ALONE

    local_weight: float = 0.5
    variant: str = "turns"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.local_weight < 1:
            raise ValueError(f"local_weight must be in (0, 1), got {self.local_weight}")
        if self.variant not in ("turns", "after"):
            raise ValueError(f"variant must be turns or after, got {self.variant}")

    def check(self, num_rounds: int) -> None:
        if self.variant == "after" and num_rounds < 2:
            raise ValueError(
                "variant=after trains the local adapter in the last round and the global one "
                f"before, so num_rounds must be >= 2, got {num_rounds}"
            )

    def can_end_early(self) -> bool:
        return self.variant != "after"

    def inject(self, model: nn.Module) -> nn.Module:
        configs = {name: self.config(model) for name in (GLOBAL, LOCAL)}
        add_by_peft(model, **configs)
        for _, module in lora_sites(model):
            module.set_adapter([GLOBAL, LOCAL])
        self.arrange(model, "")
        return model

    def role(self, name: str, at: At) -> Role:
        local = f".{LOCAL}." in name
        if self.variant == "turns":
            return Role.PERSONAL if local else Role.SHARED
        last = at.round == at.rounds
        if local:
            return Role.PERSONAL if last else Role.FROZEN
        return Role.FROZEN if last else Role.SHARED

    def phases(self, at: At) -> Sequence[Phase]:
        local = Phase(lambda name: f".{LOCAL}." in name)
        return local, Phase(lambda name: f".{LOCAL}." not in name, setting=ALONE)

    def arrange(self, model: nn.Module, setting: str) -> None:
        weight = 0.0 if setting == ALONE else self.local_weight
        for _, module in lora_sites(model):
            for adapter, share in ((GLOBAL, 1 - weight), (LOCAL, weight)):
                module.set_scale(adapter, share)

    def effective(self, module: nn.Module) -> Tensor | None:
        """Return the global adapter's product, because the local one is not averaged."""
        return self.product(module, GLOBAL)
