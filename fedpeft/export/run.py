"""A finished run, opened again: its model with the values of the last or of the best round."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from fedpeft.client.store import Store
from fedpeft.config.compose import changed
from fedpeft.config.load import PATHS, typed
from fedpeft.config.schema import Config
from fedpeft.engine.replica import Replica
from fedpeft.export.folder import with_labels
from fedpeft.files import read_json
from fedpeft.methods.base import At
from fedpeft.reporting.run_files import CHECKPOINTS, CONFIG, SUMMARY
from fedpeft.server.checkpoint import Checkpoints
from fedpeft.state import Role, State, read


class ReplicaWithBase(Replica):
    """A replica that remembers which parameters are the base model's."""

    def base_model(self) -> nn.Module:
        """Return the model before the method touches it."""
        model = super().base_model()
        # The tensors are held, so that no new parameter takes the place of one that was replaced.
        self.of_base = {p.data_ptr(): p.data for p in model.parameters()}
        return model

    def added(self) -> State:
        """Return all that differs from the base model: what can change, and what was added."""
        names = set(self.roles.names)
        return {
            name: p.detach()
            for name, p in self.model.named_parameters()
            if name in names or p.data_ptr() not in self.of_base
        }


@dataclass(frozen=True)
class FinishedRun:
    """A run's directory, and the model of one of its rounds.

    Attributes:
        folder: the directory.
        tree: the run's composed configuration.
        config: the run's typed configuration.
        summary: the run's summary, as ``summary.json`` has it.
        best: true for the best round, false for the last one.
        client: the client whose model it is; null for the model that all clients share.
        replica: holds the model with its values.
        setting: the method's setting in which the model is measured.
    """

    folder: Path
    tree: DictConfig
    config: Config
    summary: dict[str, Any]
    best: bool
    client: int | None
    replica: ReplicaWithBase
    setting: str

    @property
    def measures(self) -> dict[str, Any]:
        """Measures of the round whose model this is."""
        return self.summary["best" if self.best else "final"]


def is_run(folder: Path) -> bool:
    """Tell whether a folder is the directory of a finished run."""
    return all((folder / name).is_file() for name in (SUMMARY, CONFIG))


def open_run(
    folder: Path,
    overrides: Sequence[str] = (),
    best: bool = False,
    client: int | None = None,
    whole: bool = True,
    states: Path | None = None,
) -> FinishedRun:
    """Build the model of a finished run.

    Args:
        folder: the run's directory.
        overrides: overrides of the run's configuration, such as ``model.path=...`` after a move.
        best: take the best round, not the last one.
        client: give the model of this client, with what it keeps; null for the shared one.
        whole: load the base model on the CPU in its files' precision, as files need it; else on the
            device and in the precision of the run.
        states: folder of what clients keep, at a site its node's; null for the run's own.

    Raises:
        ValueError: this is no finished run, its base model has other weights now, the model needs a
            client, or the client's state is not here.
    """
    if not is_run(folder):
        raise ValueError(
            f"{folder} holds neither a finished run (summary.json, config.yaml) nor an exported "
            "folder (fedpeft.json)"
        )
    if states is not None and client is None:
        raise ValueError("--state-folder holds what clients keep: choose one with --client")
    summary = read_json(folder / SUMMARY)
    saved = _located(OmegaConf.load(folder / CONFIG), summary.get("working_directory"))
    tree: Any = changed(saved, overrides)
    config = typed(with_labels(tree, summary.get("labels")))
    config.model.check_weights(summary.get("weights_sha256"), str(folder))
    replica = ReplicaWithBase(_whole(config) if whole else config)
    saved_state = read(folder / f"{'best_' if best else ''}shared_state.safetensors")
    state = replica.received(saved_state, summary["best" if best else "final"]["round"])
    setting = ""
    if client is None:
        setting = _common(replica)
        replica.load(state)
    else:
        at, kept = _of_client(folder, replica, best, client, states or folder / "clients")
        replica.load(replica.blocks(state, at), kept, at=at)
    config.method.arrange(replica.model, setting)
    replica.model.eval()
    return FinishedRun(folder, tree, config, summary, best, client, replica, setting)


def _located(tree: Any, working_directory: str | None) -> Any:
    """Make a run's relative paths absolute, if the files or folders that they name still exist.

    Args:
        tree: the run's configuration.
        working_directory: folder in which the run was started; null if its summary names none.
    """
    for key in PATHS if working_directory else ():
        value = OmegaConf.select(tree, key)
        if isinstance(value, str) and (path := Path(working_directory or "", value)).exists():
            OmegaConf.update(tree, key, str(path))
    return tree


def _whole(config: Config) -> Config:
    """Return the configuration of a base model on the CPU, in its files' precision."""
    precision = "bf16" if config.model.dtype == "bfloat16" else "fp32"
    model = replace(config.model, gradient_checkpointing=False, load_in=None)
    runtime = replace(config.runtime, device="cpu")
    return replace(config, precision=precision, model=model, runtime=runtime)


def _common(replica: Replica) -> str:
    """Return the setting of the model that all clients share.

    Raises:
        ValueError: there is no such model, because parameters that it needs stay on the clients.
    """
    roles, method = replica.roles, replica.config.method
    if not roles.has_personal:
        return ""
    rounds = range(1, roles.rounds + 1)
    left = {n for r in rounds for n, role in roles.by_name(r).items() if role is Role.PERSONAL}
    if method.common is not None:
        left -= {n for r in rounds for n in left if method.role(n, roles.at(r)) is Role.PERSONAL}
    if left:
        last = replica.config.num_clients - 1
        raise ValueError(
            f"{len(left)} parameters stay on the clients in this run, such as {min(left)}, so "
            f"there is no model of all: choose one with --client, 0 to {last}"
        )
    return method.common or ""


def _of_client(
    folder: Path, replica: Replica, best: bool, client: int, states: Path
) -> tuple[At, State]:
    """Return a client's ``At`` after the last round, and the parameters that it keeps.

    Raises:
        ValueError: there is no such client, or what it keeps is not here.
    """
    config, checkpoints = replica.config, Checkpoints(folder / CHECKPOINTS, 1).load()
    if not 0 <= client < config.num_clients:
        raise ValueError(f"--client must be from 0 to {config.num_clients - 1}, got {client}")
    if not checkpoints:
        raise ValueError(f"{folder} has no checkpoint, which says what each client keeps")
    last = checkpoints[-1]
    round, memory, accepted = last.round, last.method_memory, last.accepted
    if best and last.best is not None:  # else the last round counts as the best
        round, memory, accepted = last.best, last.best_method_memory, last.best_accepted
    at = replica.roles.at(round + 1, client)
    at = at._replace(memory=config.method.down(memory, at))
    store = Store(states / last.run / f"client_{client}")
    return at, _kept(store, replica, accepted.get(client, 0), client)


def _kept(store: Store, replica: Replica, generation: int, client: int) -> State:
    # A client that had not trained yet, of generation 0, was measured with the seeded start.
    if not replica.roles.has_personal or generation == 0:
        return {}
    if generation not in store.generations:
        raise ValueError(
            f"{store.folder} lacks {generation:05}.safetensors, which client {client} keeps: in a "
            "deployment it lies at its site, so give the node's --state-folder there"
        )
    return {n: v for n, v in store.load(generation).items() if n in replica.initial}
