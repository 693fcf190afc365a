"""Asks a grid for replies so that one client's reply can neither end nor hold up the others'."""

import threading
import time
from collections.abc import Collection
from queue import Empty, SimpleQueue

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

STALLED = 5.0  # seconds of one question after which the other clients are asked beside it
Answer = tuple[str, Message | Exception]  # id of the message, and its reply


class Pull:
    """Takes the replies of one grid.

    A grid that answers here, as those of this package do, is asked for all replies at once. Any
    other grid is asked for one reply at a time in threads, because a question for several loses all
    of them if one cannot be read, and waits as long as one of them is still being uploaded.

    Args:
        grid: to ask.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._answers: SimpleQueue[Answer | None] = SimpleQueue()  # null: all have been asked
        self._asking: set[str] = set()  # ids of questions that a thread waits for
        self._current = 0  # number of the thread that asks for one reply after another
        self._lock = threading.Lock()  # for both

    def __call__(self, ids: Collection[str], wait: float = STALLED) -> list[Answer]:
        """Return what has come since the last call.

        Args:
            ids: of messages without a reply.
            wait: seconds for which a question may keep the caller.

        Raises:
            httpx.HTTPError: the grid is out of reach.
        """
        if getattr(self._grid, "answers_here", False):
            return [(m.metadata.reply_to_message_id, m) for m in self._grid.pull_messages(ids)]
        with self._lock:
            self._current += 1
            left = [i for i in ids if i not in self._asking]
        if not left:
            return self._arrived(0)
        threading.Thread(target=self._ask, args=(left, self._current), daemon=True).start()
        return self._arrived(min(wait, STALLED))

    def _arrived(self, wait: float) -> list[Answer]:
        """Return the answers that are there once all have been asked, or after ``wait`` seconds."""
        arrived: list[Answer] = []
        until = time.monotonic() + wait
        while True:
            try:
                answer = self._answers.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                return arrived
            if answer is None:
                until = 0.0  # take what is left without waiting
            elif isinstance(answer[1], httpx.HTTPError) and not _refused(answer[1]):
                raise answer[1]
            else:
                arrived.append(answer)

    def _ask(self, ids: Collection[str], number: int) -> None:
        """Ask for one reply after another, until a later thread does.

        Args:
            ids: of the messages.
            number: of this thread.
        """
        for message_id in ids:
            with self._lock:
                if self._current != number:  # this one stood still
                    return
                self._asking.add(message_id)
            try:
                replies = list(self._grid.pull_messages([message_id]))
            except Exception as error:
                self._answers.put((message_id, error))
            else:
                # Whatever else a site pushes comes along with any question.
                of_this = [m for m in replies if m.metadata.reply_to_message_id == message_id]
                if of_this:
                    self._answers.put((message_id, of_this[0]))
            with self._lock:
                self._asking.discard(message_id)
        self._answers.put(None)


def _refused(error: Exception) -> bool:
    """Tell whether a grid was reached and could not use what it has for this one message."""
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 400
