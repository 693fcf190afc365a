"""Ditto: a global LoRA, and a personal one pulled towards it (https://arxiv.org/abs/2012.04221)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedpeft.methods.base import At, Phase, Term
from fedpeft.methods.lora import LoRA
from fedpeft.methods.parts.exported import lora_sites
from fedpeft.methods.parts.pull import ProximalPull
from fedpeft.models.sites import add_by_peft
from fedpeft.state import Role, State

GLOBAL, PERSONAL = "global", "personal"  # names of PEFT's adapters and of the settings


@dataclass(frozen=True)
class Ditto(LoRA):
    """Two LoRAs of which one is on: w, (B_w, A_w), is shared and v, (B_v, A_v), is personal.

    A client trains w with v off, as LoRA does, and then v with w off, both for the round's steps.
    ``pull`` times (v - w), entry by entry of A and B, is added to the gradient of v, where w is as
    the client received it in this round. Clients are measured with v.

    v starts from the same random values as w. The pull is a part of the gradient, so it is clipped
    and, under AdamW, scaled with it; SGD is stable where lr x ``pull`` is below 2.

    The paper leaves open who trains the head, because its models do not set one apart. Here it is
    shared and w trains it, so that v meets the client's head in training and the mean head when it
    is measured; ``personal=head`` keeps it on the client. Open too is where a client that joins
    late starts v. Here it is at w's start and not at the w that the client receives.

    Args:
        pull: lambda >= 0. With 0, every client trains v alone, but for the shared head.
    """

    common: ClassVar[str | None] = GLOBAL

    pull: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pull < 0:
            raise ValueError(f"pull must be >= 0, got {self.pull}")

    def inject(self, model: nn.Module) -> nn.Module:
        add_by_peft(model, **{name: self.config(model) for name in (GLOBAL, PERSONAL)})
        for _, module in lora_sites(model):
            module.set_adapter([GLOBAL, PERSONAL])
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                if is_personal(name):
                    parameter.copy_(parameters[twin(name)])
        self.arrange(model, "")
        return model

    def role(self, name: str, at: At) -> Role:
        return Role.PERSONAL if is_personal(name) else Role.SHARED

    def phases(self, at: At) -> Sequence[Phase]:
        shared = Phase(lambda name: not is_personal(name), setting=GLOBAL)
        return shared, Phase(is_personal, setting=PERSONAL)

    def arrange(self, model: nn.Module, setting: str) -> None:
        on = GLOBAL if setting == GLOBAL else PERSONAL
        for _, module in lora_sites(model):
            for adapter in (GLOBAL, PERSONAL):
                module.set_scale(adapter, float(adapter == on))

    def term(self, at: At, start: State, kept: State) -> Term:
        """Pull the personal adapter to the global one as received; see ``Method.term``."""
        return ProximalPull(
            self.pull, {name: start[twin(name)] for name in start if is_personal(name)}
        )

    def effective(self, module: nn.Module) -> Tensor | None:
        """Return the global adapter's product, because the personal one is not averaged."""
        return self.product(module, GLOBAL)


def is_personal(name: str) -> bool:
    """Tell whether a parameter belongs to the personal adapter."""
    return f".{PERSONAL}." in name


def twin(name: str) -> str:
    """Map the name of a personal parameter to that of its global counterpart."""
    return name.replace(f".{PERSONAL}.", f".{GLOBAL}.")
