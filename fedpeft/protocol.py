"""The record beside the arrays of a message to a client: written by the server, read by clients.

A new entry is a field of ``ToClient``. What comes back is written by ``client/client.py`` and read
by ``server/replies.py`` (training) and ``server/evaluation.py`` (measures).
"""

from dataclasses import asdict, dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict


@dataclass(frozen=True)
class ToClient:
    """Everything that a client is told beside its arrays.

    Args:
        overrides: the configuration, as on the command line.
        run: the run's name, under which clients keep their states, 16 hexadecimal digits.
        round: 1, 2, ...; the last message to evaluate carries the round after the last one, because
            clients measure what the next round would start from.
        index: names, dtypes and shapes of the arrays, see ``wire.pack``.
        generation: round whose kept state the client goes on from; 0 if it kept none.
        oldest: first round whose kept state it must not delete.
        best: round whose kept state belongs to the best round so far, and must stay too.
        last: the run's last evaluation, although ``round`` does not say so.
    """

    overrides: str
    run: str
    round: int
    index: bytes
    generation: int
    oldest: int
    best: int
    last: bool

    def content(self, arrays: ArrayRecord) -> RecordDict:
        """Return a message's content; ``last`` is in it only where it is true."""
        said = {key: value for key, value in asdict(self).items() if value is not False}
        return RecordDict({"arrays": arrays, "config": ConfigRecord(said)})

    @classmethod
    def of(cls, message: Message, num_rounds: int | None = None) -> "ToClient":
        """Read a message.

        Args:
            message: a message to train or to evaluate.
            num_rounds: number of the run's rounds. It bounds the numbers, because roles are worked
                out round by round, so a round far beyond the run's would keep the node busy and
                fill its memory. Null where the message is this process's own.

        Raises:
            ValueError: an entry is missing or is not what it must be.
        """
        said = message.content.config_records["config"]
        most = 2**31 if num_rounds is None else num_rounds + 1
        round = _whole(said, "round", most)
        index: Any = said.get("index")
        if not isinstance(index, bytes):
            raise ValueError(f"index in a message must be bytes, got {index!r:.40}")
        return cls(
            overrides=overrides_of(message),
            run=str(said.get("run", "")),
            round=round,
            index=index,
            generation=_whole(said, "generation", round),
            oldest=_whole(said, "oldest", round),
            best=_whole(said, "best", round),
            last=said.get("last") is True,
        )


def overrides_of(message: Message) -> str:
    """Return the configuration in a message, also in one of ``fedpeft check``."""
    return str(message.content.config_records["config"]["overrides"])


def _whole(said: ConfigRecord, key: str, most: int) -> int:
    """Return a number of a message.

    Raises:
        ValueError: the entry is no whole number from 0 to ``most``.
    """
    value = said.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{key} in a message must be from 0 to {most}, got {value!r:.40}")
    return value
