"""The kept state of a client: with its node, or in a folder that the node names."""

import hashlib
from pathlib import Path

from flwr.app import ConfigRecord, Context

from fedpeft.state import State, read, save
from fedpeft.wire import pack, unpack


class Store:
    """One client's kept state for one configuration.

    A node whose ``node_config`` has a ``state-folder`` keeps a safetensors file there. Any other
    node keeps the state in Flower's context, which lives as long as the node.

    Args:
        context: of the client's node.
        client: the client's number.
        overrides: the configuration, because a context may serve several, one after another.
    """

    def __init__(self, context: Context, client: int, overrides: str) -> None:
        self.context = context
        folder = context.node_config.get("state-folder")
        self._file = None if folder is None else Path(str(folder)) / f"client_{client}.safetensors"
        self._key = "personal-" + hashlib.sha256(overrides.encode()).hexdigest()[:16]

    def load(self) -> State:
        """Return the state that was kept last; empty if there is none."""
        if self._file is not None:
            return read(self._file) if self._file.exists() else {}
        state, key = self.context.state, self._key
        if key not in state.array_records:
            return {}
        index = state.config_records[key + "-index"]["index"]
        assert isinstance(index, bytes)
        return unpack(state.array_records[key], index)

    def keep(self, state: State) -> None:
        """Replace the kept state, unless the new one is empty."""
        if not state:
            return
        if self._file is not None:
            save(self._file, state)
            return
        self.context.state[self._key], index = pack(state)
        self.context.state[self._key + "-index"] = ConfigRecord({"index": index})
