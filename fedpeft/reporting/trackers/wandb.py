"""Weights & Biases: offline in the run's directory, or at a server if that is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from fedpeft.reporting.saved_runs import SavedRun
from fedpeft.reporting.trackers.base import Export, Numbers, Session, Tracker, flat, settings, tags

EXIT_CODES = {"completed": 0, "failed": 1, "stopped": 255}  # 255 shows as killed
MOST_CHARACTERS = 64  # characters of a tag


@dataclass(frozen=True)
class WandB(Tracker):
    """Writes a run into the group of all runs that differ in nothing but the seed.

    Args:
        project: holds the run.
        entity: the user or team; null for the user's own.
        mode: ``offline`` writes files, which ``wandb sync`` sends later; ``online`` sends them
            while the run lasts, to the server and with the key that W&B itself is set up for.
    """

    project: str = "fedpeft"
    entity: str | None = None
    mode: str = "offline"

    name = "wandb"
    module = "wandb"

    def __post_init__(self) -> None:
        if self.mode not in ("offline", "online"):
            raise ValueError(f"mode must be offline or online, got {self.mode}")

    def open(self, run: SavedRun, folder: Path, id: str | None, done: int) -> Session:
        """Begin a run, or a further part of the run of this id; see ``Tracker.open``."""
        return _Run(self, run, folder, id or uuid4().hex[:12], new=id is None)


class _Run(Session):
    """A run of W&B, whose process ends with the session unless the program has runs of its own."""

    def __init__(self, tracker: WandB, run: SavedRun, folder: Path, id: str, new: bool) -> None:
        import wandb  # an extra

        self.id = id
        self._teardown = wandb.teardown if wandb.run is None else lambda: None
        try:
            # The mode is set before the run's process starts, which else reports to a server.
            quiet = wandb.Settings(
                mode=tracker.mode,  # pyright: ignore[reportArgumentType]
                console="off",
                silent=True,
                disable_git=True,
                x_disable_stats=True,  # these also ask the network what machine this is
                x_disable_machine_info=True,
                x_save_requirements=False,
            )
            wandb.setup(settings=quiet)
            self._run = wandb.init(
                project=tracker.project,
                entity=tracker.entity,
                dir=folder,
                id=id,
                name=run.path.resolve().name,
                group=run.hash_but_seed,
                tags=[f"{k}={v}"[:MOST_CHARACTERS] for k, v in tags(run).items()],
                config=settings(run) if new else None,
                resume=None if tracker.mode == "offline" else "allow",
                reinit="create_new",
                settings=quiet,
            )
        except BaseException:
            self._teardown()
            raise

    def write(self, round: int, numbers: Numbers) -> None:
        self._run.log(numbers, step=round)

    def end(
        self, status: str, reason: str, summary: Mapping[str, Any] | None, export: Export
    ) -> str:
        about = {"status": status} | ({"reason": reason} if reason else {})
        self._run.summary.update(about | flat(summary or {}))
        self._run.finish(EXIT_CODES[status])
        return ""

    def close(self) -> None:
        try:
            self._run.finish(1)  # does nothing after an end
        finally:
            self._teardown()
