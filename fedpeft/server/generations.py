"""The server's memory of which kept state of each client it counts on; see ``client/store.py``."""

from collections.abc import Iterable

Accepted = dict[int, int]  # by client, the round of the last reply that said it kept something


class Generations:
    """Remembers each client's generation, also of earlier rounds that may be gone back to.

    Attributes:
        accepted: each client's generation now; a client that kept nothing is missing, meaning 0.
        best: each client's generation after the best round so far.
        checkpoints: each client's generation at each checkpoint that is kept, oldest first.
    """

    def __init__(self) -> None:
        self.accepted: Accepted = {}
        self.best: Accepted = {}
        self.checkpoints: list[Accepted] = []

    def accept(self, round: int, clients: Iterable[int]) -> None:
        """Count on what clients kept in a round whose aggregate is the server's."""
        self.accepted = self.accepted | dict.fromkeys(clients, round)

    def told(self, client: int) -> tuple[int, int, int]:
        """Return ``generation``, ``oldest`` and ``best`` of the message to a client."""
        generation = self.accepted.get(client, 0)
        oldest = min([generation, *(kept.get(client, 0) for kept in self.checkpoints)])
        return generation, oldest, self.best.get(client, 0)
