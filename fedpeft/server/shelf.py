"""Replies that wait on the disk for the end of their round.

A round's sums go by client, whatever the order of arrival, so that their bits do not depend on it,
and whose update is too large is known when all are here. Adding up what arrives would allow
neither. So replies beyond a few hundred MiB lie in a file until the round is summed, for every
method, and the memory of the server does not grow with the number of clients.
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
