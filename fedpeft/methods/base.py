"""The seam: what a federated fine-tuning method is.

A method answers questions about parameters by name: which role one has, which block of it a client
trains. An ``At`` says for which round and client a question is asked; a ``Round`` holds what an
aggregation may look at. A later need becomes a new field of one of them and changes no method.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from fedpeft.methods.parts.exported import PeftForm, folded, of_peft_layers
from fedpeft.state import Role, State, weighted_mean

Memory = dict[str, State]  # states that a method or strategy keeps on the server between rounds


class At(NamedTuple):
    """The round and client that a question is about.

    Attributes:
        round: 1, 2, ...; 0 is before the first round, where ``Method.start`` sets parameters.
        client: the client's number; null for any client that trains whole parameters.
        rounds: number of the run's rounds; null where it is not known.
        memory: the state that ``Method.down`` gave this client.
    """

    round: int
    client: int | None = None
    rounds: int | None = None
    memory: Mapping[str, Tensor] = MappingProxyType({})


class ServerModel(Protocol):
    """The server's resident model, for aggregations and starts that need data."""

    model: nn.Module
    task: Any  # fedpeft.data.tasks.base.Task

    def load(self, *states: State) -> None:
        """Set every parameter that can change; later states win, the rest is initial."""
        ...

    def batches(self, size: int, purpose: str, *path: int) -> Iterator[Any]:
        """Yield batches of the server's validation rows without end, in a seeded order.

        Args:
            size: rows of a batch.
            purpose: sets this order apart from the orders for other purposes.
            path: further numbers that set the order apart, such as the round's.
        """
        ...

    def gradients(self, names: Sequence[str], batch: Any) -> tuple[float, State]:
        """Return the loss of the loaded model on a batch and its gradients, on the CPU.

        Args:
            names: names of parameters, which need not train in any round.
            batch: a batch of ``batches``.
        """
        ...


@dataclass(frozen=True)
class Round:
    """Everything an aggregation may look at.

    Attributes:
        number: 1, 2, ....
        ats: one ``At`` for each client whose reply is used, sorted by client. ``states``,
            ``weights``, ``steps`` and ``extras`` are in the same order.
        states: shared parameters, equal names and full shapes; filled with zeros where a client
            trains a block.
        weights: one weight a client, summing to 1.
        before: every parameter that can change, full, as the clients received it.
        steps: local steps of each client.
        extras: tensors that each client's strategy term sent beside its parameters.
        share: clients of this round / all clients.
        server: the resident model; null only in tests.
        memory: the method's memory, which lasts from round to round; empty at the beginning.
    """

    number: int
    ats: Sequence[At]
    states: Sequence[State]
    weights: Sequence[float]
    before: State
    steps: Sequence[int] = ()
    extras: Sequence[State] = ()
    share: float = 1.0
    server: ServerModel | None = None
    memory: Memory | None = None


class Term:
    """A correction of one client's training in one round; the base corrects nothing."""

    def correct(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Change the gradients of the parameters that train, before they are clipped."""

    def finish(self, trained: State, steps: int, lr: float) -> tuple[State, State]:
        """Return what goes to the server beside the parameters, and what the client keeps.

        Args:
            trained: shared parameters after the last step, full.
            steps: number of steps taken.
            lr: mean learning rate of these steps.
        """
        return {}, {}


def every(name: str) -> bool:
    """Select every parameter."""
    return True


@dataclass(frozen=True)
class Phase:
    """A part of a client's training in a round, with batches of its own.

    Its optimizer is fresh unless ``optimizer.keep_state``.

    Args:
        trains: selects, by name, among the parameters that train in this round by their role.
        setting: passed to ``Method.arrange`` before the phase begins.
    """

    trains: Callable[[str], bool] = every
    setting: str = ""


class Method(ABC):
    """Base of methods: a method is a frozen dataclass whose fields are its hyperparameters.

    Attributes:
        common: setting, for ``arrange``, of a model that all clients share although the method has
            personal parameters, because it does without them; null if there is none.
    """

    common: ClassVar[str | None] = None

    def check(self, num_rounds: int) -> None:  # noqa: B027
        """Raise ValueError if the method makes no sense in a run of so many rounds."""

    def check_roles(self, roles: Mapping[str, Role]) -> None:  # noqa: B027
        """Raise ValueError if ``aggregate`` cannot do with the roles of a round.

        ``personal`` and ``frozen`` may keep back parameters that it needs, or that it changes. The
        check is made before round 1, but not where nothing is shared.

        Args:
            roles: each parameter's role, by name, for all that left ``inject`` with a gradient.
        """

    @abstractmethod
    def inject(self, model: nn.Module) -> nn.Module:
        """Add the method's parameters to a transformers model and freeze the rest.

        Exactly the parameters that train in some round, or that the server changes, leave with
        ``requires_grad``. All draws come from torch's global generator, which the caller seeds: a
        frozen random part is then the same on every client.
        """

    def role(self, name: str, at: At) -> Role:
        """Return the role of a parameter that left ``inject`` with a gradient."""
        return Role.SHARED

    def block(self, name: str, shape: Sequence[int], at: At) -> Sequence[int]:
        """Return the shape of the leading block of a parameter that a client trains and sends.

        The rest of the parameter is zero on that client.

        Args:
            name: the parameter's name.
            shape: the whole parameter's shape.
            at: the round and the client.
        """
        return shape

    def trains_blocks(self, num_clients: int) -> bool:
        """Return true if any of so many clients may train less than whole parameters in a round.

        A method with a ``block`` of its own does, unless it knows better, because ranks may differ
        by client and shrink from round to round.
        """
        return type(self).block is not Method.block

    def phases(self, at: At) -> Sequence[Phase]:
        """Return the parts of a client's training, in order; the base has one for everything.

        They must be the same for every client of a round, because clients may train in one pass.
        """
        return (Phase(),)

    def can_end_early(self) -> bool:
        """Return false if the last round, by its number, does what no other round does."""
        return True

    def arrange(self, model: nn.Module, setting: str) -> None:  # noqa: B027
        """Prepare the model for a phase's setting; ``""`` is also evaluation's setting."""

    def term(self, at: At, start: State, kept: State) -> Term:
        """Return a correction of the client's gradients.

        Args:
            at: the round and the client.
            start: every parameter that can change, full, as the client starts the round.
            kept: the state that ``Term.finish`` last kept on this client; empty the first time. The
                state that ``finish`` sends is not used: a method sends such values as shared
                parameters.
        """
        return Term()

    @property
    def starts(self) -> bool:
        """True if ``start`` sets parameters before round 1."""
        return False

    def start(self, server: ServerModel) -> State:
        """Return values to set before round 1; only called where ``starts`` is true.

        ``role`` must answer RECEIVED for these parameters at round 0; only then do clients get
        them from round 1 on.
        """
        return {}

    def down(self, memory: Memory, at: At) -> State:
        """Return what a client gets beside its parameters, as ``At.memory``.

        Names, shapes and dtypes must not depend on ``memory``, because the client checks them
        against the result for an empty memory.
        """
        return {}

    def aggregate(self, round: Round) -> State:
        """Return new values, by name, of what was shared, and of anything else that changes."""
        return weighted_mean(round.states, round.weights)

    @property
    def averages(self) -> bool:
        """True if ``aggregate`` is the weighted mean and nothing else."""
        return type(self).aggregate is Method.aggregate

    def effective(self, module: nn.Module) -> Tensor | None:
        """Return the dense matrix that a module's trained factors stand for, or null.

        Examples are B A alpha/r, W2' C, and a TT's product. The interference diagnostic reads it.
        """
        return None

    # --- what leaves fedpeft -------------------------------------------------------------------

    def peft_form(self, model: nn.Module, start: State) -> PeftForm | None:
        """Return the trained method as HF PEFT saves it; null if PEFT cannot represent it.

        The base knows a model with one adapter of PEFT.

        Args:
            model: the model with the method and the trained values in it, arranged to measure.
            start: initial values of all parameters that can change, full.
        """
        return of_peft_layers(model, start)

    def folded(self, model: nn.Module) -> nn.Module:
        """Fold the trained method into the base model's weights, as far as that goes.

        Layers that cannot be folded into the base stay; a plain folder is then refused.
        """
        return folded(model)
