"""Asks a grid for replies so that one client's reply can neither end nor hold up the others'."""

import threading
import time
from collections.abc import Collection
from queue import Empty, SimpleQueue

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from fedpeft.wire import arrays_of_at_most

STALLED = 5.0  # seconds of one question after which the other clients are asked beside it
Answer = tuple[str, Message | Exception]  # id of the message, and its reply


class Pull:
    """Takes the replies of one grid.

    A grid that answers here, as this package's grids do, is asked for all replies at once. Any
    other grid is asked for one reply after another in a thread, because a question for several
    loses all of them if one cannot be read, and waits as long as one of them is still being
    uploaded. A question that lasts longer than ``STALLED`` keeps its thread, and another thread
    goes on.

    Args:
        grid: the grid to ask for replies.
        most: bytes that the arrays of a reply may take.
    """

    def __init__(self, grid: Grid, most: int) -> None:
        self._grid, self._most = grid, most
        # Answers, and the number of each thread that has asked for all.
        self._answers: SimpleQueue[tuple[str, Message | BaseException] | int] = SimpleQueue()
        self._lock = threading.Lock()  # guards all below
        self._asking: dict[str, float] = {}  # times of questions without an answer, by id
        self._last: dict[str, float] = {}  # time of the last question, by id
        self._thread = 0  # number of the thread that asks for one reply after another
        self._question: str | None = None  # id for which it asks now; null if it has asked for all

    def __call__(self, ids: Collection[str], wait: float = STALLED) -> list[Answer]:
        """Return the answers that have come since the last call.

        Args:
            ids: ids of the messages that have no reply yet.
            wait: seconds to wait for a reply at most.

        Raises:
            httpx.HTTPError: the grid is out of reach.
        """
        if getattr(self._grid, "answers_here", False):
            return [(m.metadata.reply_to_message_id, m) for m in self._grid.pull_messages(ids)]
        with self._lock:
            if not self._goes_on():
                self._begin(ids)
        return self._arrived(min(wait, STALLED))

    def _goes_on(self) -> bool:
        """Tell whether the thread has questions left, and does not stand still at one."""
        if self._question is None:
            return False
        return time.monotonic() - self._asking.get(self._question, time.monotonic()) < STALLED

    def _begin(self, ids: Collection[str]) -> None:
        """Start a thread that asks for all that no other waits for, the longest ago first."""
        left = [i for i in ids if i not in self._asking]
        left.sort(key=lambda message_id: self._last.get(message_id, 0.0))
        self._question, self._thread = left[0] if left else None, self._thread + 1
        if left:
            threading.Thread(target=self._ask, args=(left, self._thread), daemon=True).start()

    def _ask(self, ids: Collection[str], number: int) -> None:
        """Ask for one reply after another, until a later thread does.

        Args:
            ids: ids of the messages to ask for, in order.
            number: this thread's number.
        """
        for message_id in ids:
            with self._lock:
                if self._thread != number:  # this one stood still
                    return
                self._question = message_id
                self._asking[message_id] = self._last[message_id] = time.monotonic()
            try:
                with arrays_of_at_most(self._most):
                    replies = list(self._grid.pull_messages([message_id]))
            except BaseException as error:  # Flower's "the run has ended" is no Exception
                self._answers.put((message_id, error))
            else:
                # Whatever else a site pushes comes along with any question.
                of_this = [m for m in replies if m.metadata.reply_to_message_id == message_id]
                if of_this:
                    self._answers.put((message_id, of_this[0]))
            with self._lock:
                del self._asking[message_id]
        with self._lock:
            if self._thread == number:
                self._question = None
                self._answers.put(number)

    def _arrived(self, wait: float) -> list[Answer]:
        """Wait until an answer is there or all have been asked; return all that are there then."""
        arrived: list[Answer] = []
        until = time.monotonic() + wait
        while True:
            try:
                answer = self._answers.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                return arrived
            if isinstance(answer, int):
                until = 0.0 if answer == self._thread else until
                continue
            message_id, reply = answer
            if isinstance(reply, BaseException) and not _of_client(reply):
                raise reply
            arrived.append((message_id, reply))  # type: ignore[arg-type]
            until = 0.0


def _of_client(error: BaseException) -> bool:
    """Tell whether a client's reply is at fault, and not the way to the grid or the run."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code == 400
    return isinstance(error, Exception) and not isinstance(error, httpx.HTTPError)
