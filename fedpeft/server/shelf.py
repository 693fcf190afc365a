"""Holds the replies of a round until all are there, the later ones in files.

The server cannot add replies up as they arrive, for two reasons. It adds them up in the order of
clients, so that the bits of the sum do not depend on who was faster. And it leaves out a client
whose update is far larger than the median of the round, which is known at the end.

Replies beyond ``MOST_IN_MEMORY`` are held in files, so that the server's memory does not grow with
the number of clients.
"""

import logging
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch

from fedpeft.state import State, bits, payload_bytes

MOST_IN_MEMORY = 1 << 28  # bytes of a round's replies
ALIGNMENT = 64  # bytes; each tensor begins at a multiple

log = logging.getLogger(__name__)


class Shelf:
    """The replies of one round.

    Args:
        folder: takes the files, which have no name and go with the round; null keeps all in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.held = 0  # bytes in memory

    def take(self, state: State) -> State:
        """Return a state as it is while there is room, else the same values in a mapped file."""
        size = payload_bytes(state)
        if self.folder is not None and self.held + size > MOST_IN_MEMORY:
            try:
                return _mapped(state, self.folder)
            except OSError as error:
                log.warning(
                    "replies stay in memory, because %s takes no file: %s", self.folder, error
                )
                self.folder = None
        self.held += size
        return state


def _mapped(state: State, folder: Path) -> State:
    """Write tensors to a file without a name, and map it.

    Raises:
        OSError: the folder cannot be written or is full.
    """
    starts: dict[str, int] = {}
    with TemporaryFile(dir=folder) as file:
        for name, value in state.items():
            starts[name] = file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
            file.write(bits(value).contiguous().numpy().tobytes())
        file.truncate()
        file.flush()
        # "c": private, so that nothing that is written to the tensors reaches the file
        flat = torch.from_numpy(np.memmap(file, np.uint8, "c")) if file.tell() else torch.empty(0)
    return {
        name: flat[start : start + state[name].nbytes].view(state[name].dtype).view_as(state[name])
        for name, start in starts.items()
    }
