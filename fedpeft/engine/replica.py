"""The one model that a process keeps, with a method in it, for one configuration."""

import logging

import torch
from torch import nn

from fedpeft.config.schema import Config
from fedpeft.engine.cpu import checkpoint_blocks
from fedpeft.engine.roles import Roles
from fedpeft.methods.base import At, Method
from fedpeft.models.precision import halve_frozen, train_in_float32
from fedpeft.models.sites import hidden_blocks
from fedpeft.seeding import generator, torch_seed
from fedpeft.state import State, filled, leading, load_state, snapshot

log = logging.getLogger(__name__)


class Replica:
    """A configuration's injected model, its tokenizer or image processor, and its roles.

    All clients of a process share the model. So every use begins with ``load``, which sets every
    parameter that can change and leaves nothing of the client before.

    Args:
        config: the run.

    Attributes:
        initial: seeded values of all parameters that can change, full, on the CPU.
    """

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(config.runtime.threads)
        check_choices(config)
        self.config, self.task = config, config.data
        self.processor = getattr(config.model, self.task.needs)()
        with torch_seed(config.seed, "method"):
            model = injected(config, self.base_model())
        train_in_float32(model)
        if config.precision == "bf16":
            halve_frozen(model)
        self.model: nn.Module = model.to(_device(config.runtime.device))
        self.device = next(self.model.parameters()).device
        self.roles = Roles(config, self.model)
        self.roles.check()
        self.initial = snapshot(self.model, self.roles.names)

    def base_model(self) -> nn.Module:
        """Return the model before the method touches it."""
        model = self.config.model.build(
            self.task.auto_class, self.task.num_labels, self.config.seed
        )
        if self.config.model.gradient_checkpointing:
            checkpoint_blocks(model)
        if self.task.needs == "tokenizer":
            model.config.pad_token_id = self.processor.pad_token_id
        return model

    def shared(self, round: int) -> State:
        """Return initial values of what is shared in a round: the names, shapes and dtypes."""
        return {name: self.initial[name] for name in self.roles.shared(round)}

    def blocks(self, state: State, at: At) -> State:
        """Cut a full state to the blocks that one client trains."""
        if type(self.config.method).block is Method.block:
            return dict(state)
        return {
            name: leading(value, self.config.method.block(name, value.shape, at))
            for name, value in state.items()
        }

    def values(self, *states: State, at: At | None = None) -> State:
        """Return every parameter that can change, full.

        Args:
            states: full or block states; the last state that has a name wins, else the value is
                initial.
            at: client whose blocks they are, the rest being zero; null for whole parameters.
        """
        initial = self.initial
        if at is not None:
            initial = filled(self.blocks(initial, at), initial)
        for state in states:
            initial = initial | filled(state, self.initial)
        return initial

    def load(self, *states: State, at: At | None = None) -> None:
        """Set every parameter that can change to ``values``, and arrange the model to measure."""
        load_state(self.model, self.values(*states, at=at))
        self.config.method.arrange(self.model, "")

    def received(self, state: State, round: int) -> State:
        """Return the server's values as clients get them, because models are measured with these.

        Args:
            state: every parameter that the server has set, full.
            round: the round that has ended. The next one says which parameters go down, and a
                compression may take them as one vector.
        """
        values = self.values(state)
        sent = {name: values[name] for name in self.roles.down(round + 1)}
        codec = self.config.compression.down
        draws = generator(self.config.seed, "compression down", 0)  # the same for every call
        return values | codec.decode(codec.encode(sent, sent, draws), sent)

    def set_trainable(self, names: set[str]) -> None:
        """Let exactly these parameters require gradients."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in names)


def check_choices(config: Config) -> None:
    """Check, before a model is built, that the number of rounds and the precision are possible.

    Raises:
        ValueError: the number of rounds or the precision is not possible.
    """
    config.method.check(config.num_rounds)
    config.model.check_precision(config.precision)


def injected(config: Config, model: nn.Module) -> nn.Module:
    """Put the method into the blocks that ``layers`` chooses, and return the model.

    Raises:
        ValueError: ``layers`` leaves blocks out, but the method trains nothing inside of blocks.
    """
    if config.layers == "all":
        return config.method.inject(model)
    with hidden_blocks(model, config.layers) as chosen:
        model = config.method.inject(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if not any(f"{block}." in name for name in trained for block in chosen):
        raise ValueError(
            f"layers={config.layers} chooses blocks, but method {type(config.method).__name__} "
            "trains nothing inside of blocks: set layers=all"
        )
    return model


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("runtime.device=cuda, but torch sees no GPU in this process")
    return torch.device(name)
