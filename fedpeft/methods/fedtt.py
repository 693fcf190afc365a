"""FedTT and FedTT+: tensor-train adapters (https://arxiv.org/abs/2410.13097)."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from fedpeft.methods.base import At, Method, Round
from fedpeft.methods.parts.ranks import Ranks, any_below, check_ranks, mean_of_holders, rank_of
from fedpeft.models.linear import check_bottleneck, output_width, replace
from fedpeft.models.sites import (
    ADD_IN_PLACE,
    ATTENTION_OUTPUT,
    MLP_OUTPUT,
    freeze_all_but_head,
    named_sites,
    train_layernorms,
)
from fedpeft.nn.tensor_train import AdaptedOutput, TensorTrain, TTAdapter, TTLinear, tt_shape
from fedpeft.seeding import derive
from fedpeft.state import Role, State, weighted_mean

FACTOR = re.compile(r"\.factor_(\d+)_of_(\d+)$")
# The dense layer before the output layer: RoBERTa's, BERT's and DeBERTa's.
CLASSIFIER = re.compile(r"(?:^|\.)(?:classifier\.dense|pooler\.dense|pre_classifier)$")


@dataclass(frozen=True)
class FedTT(Method):
    """Two TT adapters a block and a TT classifier; every factor, TT bias and the head are shared.

    Args:
        tt_rank: inner ranks of every tensor train, >= 1.
        bottleneck: inner width of the adapters, >= 2.
        init: ``normal`` (LoRETTA's; not the identity at the start) or ``zero_last`` (identity).
        classifier: make the classifier's hidden layer, where there is one, a TT layer.
        train_layernorm: train and share LayerNorms; open in the paper, frozen here.
        shapes: TT axes by "INxOUT", in place of the papers' table and the computed ones.
        tt_ranks: inner ranks r_c by client, each <= ``tt_rank``; a list, of which client c has
            ``tt_ranks[c mod length]``, or a mapping from clients. Client c trains and sends the
            leading r_c of every inner axis, and an entry is averaged over the clients that hold it.
            The papers have equal ranks alone.
    """

    tt_rank: int = 5
    bottleneck: int = 64
    init: str = "normal"
    classifier: bool = True
    train_layernorm: bool = False
    shapes: dict[str, list[int]] = field(default_factory=dict)
    tt_ranks: Ranks = None

    def __post_init__(self) -> None:
        if self.tt_rank < 1:
            raise ValueError(f"tt_rank must be >= 1, got {self.tt_rank}")
        if self.bottleneck < 2:
            raise ValueError(f"bottleneck must be >= 2, got {self.bottleneck}")
        if self.init not in ("normal", "zero_last"):
            raise ValueError(f"init must be normal or zero_last, got {self.init}")
        check_ranks("tt_ranks", self.tt_ranks, self.tt_rank)

    def inject(self, model: nn.Module) -> nn.Module:
        freeze_all_but_head(model)
        sites = named_sites(model, ATTENTION_OUTPUT, "attention output projection")
        sites += named_sites(model, MLP_OUTPUT, "MLP output projection")
        check_bottleneck(model, sites, self.bottleneck)
        copies = getattr(model.config, "model_type", "") in ADD_IN_PLACE
        for name in sites:
            projection = model.get_submodule(name)
            self._check_rank(name, tt_shape(output_width(projection), self.bottleneck, self.shapes))
            replace(model, name, AdaptedOutput(projection, self._adapter(projection), copies))
        if self.classifier:
            self._compress_classifier(model)
        if self.train_layernorm:
            train_layernorms(model)
        return model

    def _check_rank(self, name: str, axes: Sequence[int]) -> None:
        """Raise ValueError if no tensor of these axes needs so high an inner rank."""
        cuts = range(1, len(axes))
        most = max(min(math.prod(axes[:i]), math.prod(axes[i:])) for i in cuts)
        if self.tt_rank > most:
            raise ValueError(
                f"method.tt_rank must be <= {most}, the highest rank of the axes {list(axes)} at "
                f"{name}, got {self.tt_rank}"
            )

    def _adapter(self, projection: nn.Module) -> TTAdapter:
        width, device = output_width(projection), next(projection.parameters()).device
        zero_last = self.init == "zero_last"
        return TTAdapter(width, self.bottleneck, self.tt_rank, self.shapes, zero_last, device)

    def _compress_classifier(self, model: nn.Module) -> None:
        """Replace the classifier's hidden layer by a TT layer; the output layer stays dense.

        A head of one output layer, such as Llama's ``score``, stays as it is.
        """
        for name, module in list(model.named_modules()):
            if CLASSIFIER.search(name) and isinstance(module, nn.Linear):
                i, o = module.in_features, module.out_features
                shape = tt_shape(i, o, self.shapes)
                replace(model, name, TTLinear(i, o, shape, self.tt_rank, module.weight.device))

    def block(self, name: str, shape: Sequence[int], at: At) -> Sequence[int]:
        """See ``Method.block``."""
        factor = FACTOR.search(name)
        if factor is None:
            return shape
        rank = rank_of(self.tt_ranks, at, self.tt_rank)
        number, count = map(int, factor.groups())
        return (1 if number == 1 else rank, shape[1], 1 if number == count else rank)

    def trains_blocks(self, num_clients: int) -> bool:
        """See ``Method.trains_blocks``."""
        return any_below(self.tt_ranks, self.tt_rank, num_clients)

    def aggregate(self, round: Round) -> State:
        mean = weighted_mean(round.states, round.weights)
        if not self.tt_ranks:
            return mean
        return mean | mean_of_holders(self, round, [n for n in mean if FACTOR.search(n)])

    @property
    def averages(self) -> bool:
        return not self.tt_ranks

    def effective(self, module: nn.Module) -> Tensor | None:
        return module.dense() if isinstance(module, TensorTrain) else None


@dataclass(frozen=True)
class FedTTPlus(FedTT):
    """FedTT that trains and sends few factors of every tensor train a round; the rest is frozen.

    The mean of several factors is less wrong than that of all, and not exact. With one factor a
    round it is exact.

    Args:
        schedule: chooses the middle factor m_t of round t, the same on all clients: ``cyclic``
            (2 + t mod (J-2)) or ``random`` (drawn from (schedule_seed, t)); open in the paper.
        active: ``three`` trains factors {1, m_t, J} (the paper's); ``one`` trains one of all J by
            the schedule, which the paper lacks.
        train_bias: also train and send the TT biases; open in the paper.
        schedule_seed: seeds the ``random`` schedule.
    """

    schedule: str = "cyclic"
    active: str = "three"
    train_bias: bool = False
    schedule_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule not in ("cyclic", "random"):
            raise ValueError(f"schedule must be cyclic or random, got {self.schedule}")
        if self.active not in ("three", "one"):
            raise ValueError(f"active must be three or one, got {self.active}")

    def inject(self, model: nn.Module) -> nn.Module:
        super().inject(model)
        for module in model.modules():
            if isinstance(module, TensorTrain):
                module.bias.requires_grad_(self.train_bias)
        return model

    def active_factors(self, count: int, round: int) -> set[int]:
        """Return the numbers, from 1, of a train's factors that train in a round.

        Args:
            count: number of the train's factors.
            round: 1, 2, ....
        """
        turn = round if self.schedule == "cyclic" else derive(self.schedule_seed, "factor", round)
        if self.active == "one":
            return {1 + turn % count}
        return {1, 2 + turn % (count - 2), count}

    def role(self, name: str, at: At) -> Role:
        factor = FACTOR.search(name)
        if factor is None:
            return Role.SHARED
        number, count = map(int, factor.groups())
        return Role.SHARED if number in self.active_factors(count, at.round) else Role.FROZEN
