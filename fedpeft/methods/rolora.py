"""RoLoRA: LoRA that trains B in odd rounds and A in even ones (https://arxiv.org/abs/2409.02346)."""

from dataclasses import dataclass

from fedpeft.methods.base import At
from fedpeft.methods.lora import LoRA
from fedpeft.state import Role


@dataclass(frozen=True)
class RoLoRA(LoRA):
    """One of A and B is frozen each round, so the aggregation is exact.

    The paper leaves open which trains first. Here it is B, because A has no gradient while B is
    zero.
    """

    def role(self, name: str, at: At) -> Role:
        frozen = ".lora_A." if at.round % 2 else ".lora_B."
        return Role.FROZEN if frozen in name else Role.SHARED
