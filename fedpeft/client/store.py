"""The kept states of a client, a file a generation.

A generation is the round whose training made the state; 0 is the seeded start, of which nothing is
kept. The server says which generation a message goes on from. A reply that was lost or refused
therefore never happened on the client either, and a node that lacks the state refuses instead of
beginning anew in silence.
"""

import logging
import os
import re
from pathlib import Path

from flwr.app import Context
from platformdirs import user_state_path

from fedpeft.files import replacing
from fedpeft.state import State, is_finite, read, save

log = logging.getLogger(__name__)
ROWS = "rows.sha256"


class Lost(ValueError):
    """The generation that the server counts on is not here, or its file is broken."""


class Store:
    """One client's kept states for one run.

    Args:
        folder: folder of this client and run; made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def generations(self) -> list[int]:
        """The generations that are here, sorted."""
        matches = [re.fullmatch(r"(\d+)\.safetensors", path.name) for path in self._files()]
        return sorted(int(match[1]) for match in matches if match)

    def load(self, generation: int) -> State:
        """Return the state that was kept in a round; empty for generation 0.

        Raises:
            Lost: the generation is not here, or its file is broken.
        """
        if generation == 0:
            return {}
        if generation not in self.generations:
            here = ", ".join(map(str, self.generations)) or "none"
            raise Lost(
                f"the server goes on from generation {generation} of this client's kept state, "
                f"but here is {here}: start its node with the state-folder that it had, or set "
                "runtime.lost_state=restart"
            )
        try:
            return read(self._file(generation))
        except (ValueError, OSError) as error:
            raise Lost(f"generation {generation} of this client's kept state: {error}") from error

    def keep(self, generation: int, state: State) -> None:
        """Write a generation.

        Raises:
            ValueError: the state holds something that is not finite.
            OSError: the file cannot be written.
        """
        broken = [name for name, value in state.items() if not is_finite(value)]
        if broken:
            raise ValueError(
                f"{broken[0]} holds values that are not finite after training: lower lr"
            )
        save(self._file(generation), state)

    def check_rows(self, sha256: str) -> None:
        """Check that a client's own rows are those with which it first took part in the run.

        Args:
            sha256: hash of the rows that are here now; it is kept the first time.

        Raises:
            ValueError: the rows have changed since.
        """
        file = self.folder / ROWS
        if not file.exists():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with replacing(file) as draft:
                    draft.write_text(sha256)
            except OSError as error:  # a method that keeps nothing needs no folder
                log.warning("%s: a change of this client's rows would not be seen", error)
        elif file.read_text() != sha256:
            raise ValueError(
                "this client's rows have changed since it first took part in this run: give its "
                "node the rows that it had, or begin another run"
            )

    def file(self, generation: int) -> bytes | None:
        """Return the file of a generation, to send to another machine; null if it is not here."""
        path = self._file(generation)
        return path.read_bytes() if path.is_file() else None

    def put(self, generation: int, file: bytes) -> None:
        """Write the file of a generation that came from another machine, see ``file``.

        Raises:
            OSError: the file cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._file(generation)) as draft:
            draft.write_bytes(file)

    def forget(self, generation: int, oldest: int, best: int) -> None:
        """Delete the generations that nobody needs any more.

        Args:
            generation: generation that the server goes on from; later ones never happened.
            oldest: oldest generation that a checkpoint of the server may still go on from.
            best: generation that belongs to the best round so far.
        """
        for other in self.generations:
            if other > generation or (other < oldest and other != best):
                self._file(other).unlink(missing_ok=True)

    def _file(self, generation: int) -> Path:
        return self.folder / f"{generation:05}.safetensors"

    def _files(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.is_dir() else []


def store_of(context: Context, run: str, client: int) -> Store:
    """Return the store of a run and a client on a node.

    It lies in the node's ``state-folder``. Where no one names one, it lies in the folder
    $FEDPEFT_STATE, or else in the user's own for states, such as ~/.local/state/fedpeft.

    Args:
        context: the node's context.
        run: the run's name in messages.
        client: number of the client.

    Raises:
        ValueError: the run has no such name.
    """
    if not re.fullmatch(r"[0-9a-f]{16}", run):
        raise ValueError(f"run must be 16 hexadecimal digits, got {run[:40]!r}")
    default = os.environ.get("FEDPEFT_STATE") or user_state_path("fedpeft")
    folder = Path(str(context.node_config.get("state-folder", default)))
    return Store(folder / run / f"client_{client}")
