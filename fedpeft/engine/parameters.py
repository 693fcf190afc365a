"""What a method trains and sends, counted."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import nn

from fedpeft.config.schema import Config
from fedpeft.methods.base import TRAINED, Role
from fedpeft.models.precision import train_in_float32
from fedpeft.state import RoleOf, down_names, roles


def parameter_counts(
    role: RoleOf, model: nn.Module, trainable: Iterable[str], num_rounds: int
) -> dict[str, Any]:
    """Numbers of parameters, each [least, most] over the rounds 1..num_rounds.

    ``sent_down`` counts what a client that keeps nothing between rounds needs, ``bytes_up`` and
    ``bytes_down`` the arrays of what is sent, without compression and a strategy's extras;
    ``total`` the whole model with what the method added.
    """
    parameters = dict(model.named_parameters())
    sizes = {name: p.numel() for name, p in parameters.items()}
    names = list(trainable)
    seen: dict[str, list[int]] = defaultdict(list)
    for round in range(1, num_rounds + 1):
        by_name = roles(role, names, round)
        up = [name for name in names if by_name[name] is Role.SHARED]
        seen["trained"].append(sum(sizes[n] for n in names if by_name[n] in TRAINED))
        for way, sent in (("up", up), ("down", down_names(role, names, round))):
            seen[f"sent_{way}"].append(sum(sizes[n] for n in sent))
            seen[f"bytes_{way}"].append(sum(sizes[n] * parameters[n].element_size() for n in sent))
    counts: dict[str, Any] = {key: [min(v), max(v)] for key, v in seen.items()}
    return counts | {"total": sum(sizes.values())}


def count_on_meta(config: Config, rounds: int = 24) -> dict[str, Any]:
    """``parameter_counts`` of the real architecture without its weights; ``total`` is its own.

    Args:
        rounds: enough for every factor of FedTT+ to have its turn.
    """
    task = config.data
    model = config.model.build_meta(task.auto_class, task.num_labels)
    base = sum(p.numel() for p in model.parameters())
    model = config.method.inject(model)
    train_in_float32(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    counts = parameter_counts(config.method.role, model, trainable, rounds)
    return counts | {"total": base, "trained_percent": 100 * counts["trained"][1] / base}
