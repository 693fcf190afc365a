"""Counts what a method trains and sends."""

from typing import Any

import torch
from torch import nn

from fedpeft.config.schema import Config
from fedpeft.engine.replica import check_choices, injected
from fedpeft.engine.roles import Roles
from fedpeft.models.precision import train_in_float32

FEWEST_ROUNDS = 24  # so that every factor of FedTT+ has its turn
COUNTED = ("trained", "sent_up", "sent_down", "bytes_up", "bytes_down")


def parameter_counts(roles: Roles, model: nn.Module) -> dict[str, Any]:
    """Count parameters and bytes of one client, each as [least, most] over the rounds.

    Args:
        roles: the parameters' roles in the rounds to count.
        model: the model with the method in it.

    Returns:
        ``trained``, ``sent_up`` and ``sent_down`` parameters; ``bytes_up`` and ``bytes_down`` of
        their arrays, without compression and a strategy's extras; ``total``, the parameters of the
        whole model. Without rounds each is [0, 0].
    """
    parameters = dict(model.named_parameters())
    sizes = {name: p.numel() for name, p in parameters.items()}
    seen: dict[str, list[int]] = {key: [] for key in COUNTED}
    for round in range(1, roles.rounds + 1):
        seen["trained"].append(sum(sizes[n] for n in roles.trained(round)))
        for way, sent in (("up", roles.shared(round)), ("down", roles.down(round))):
            seen[f"sent_{way}"].append(sum(sizes[n] for n in sent))
            seen[f"bytes_{way}"].append(sum(sizes[n] * parameters[n].element_size() for n in sent))
    counts: dict[str, Any] = {
        key: [min(v, default=0), max(v, default=0)] for key, v in seen.items()
    }
    return counts | {"total": sum(sizes.values())}


def count_on_meta(config: Config) -> dict[str, Any]:
    """Count the real architecture's parameters without its weights.

    Args:
        config: the run; at least ``FEWEST_ROUNDS`` rounds are counted.

    Returns:
        ``parameter_counts``, with ``total`` without the method's parameters, and
        ``trained_percent``.
    """
    model = _on_meta(config)
    base = sum(p.numel() for p in model.parameters())
    model = _injected_on_meta(config, model)
    rounds = max(config.num_rounds, FEWEST_ROUNDS)
    counts = parameter_counts(Roles(config, model, rounds), model)
    return counts | {"total": base, "trained_percent": 100 * counts["trained"][1] / base}


def check_on_meta(config: Config) -> None:
    """Check, without weights, that a method fits model, strategy, compression and rounds.

    Raises:
        ValueError: the method does not fit one of them.
    """
    check_choices(config)
    Roles(config, _injected_on_meta(config, _on_meta(config))).check()


def _on_meta(config: Config) -> nn.Module:
    task = config.data
    return config.model.build_meta(task.auto_class, task.num_labels)


def _injected_on_meta(config: Config, model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        model = injected(config, model)
    return train_in_float32(model)
