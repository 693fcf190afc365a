"""A grid whose messages are answered by Ray's worker processes."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from flwr.app import Context, Message, RecordDict
from ray.exceptions import RayError, RayTaskError

from fedpeft.simulation.grid import LocalGrid
from fedpeft.wire import identify, sentence

WAIT_SECONDS = 0.2
START_SECONDS = 60


class Worker:
    """A worker process; the engine's module keeps model and rows between messages."""

    def __init__(self) -> None:
        identify()

    def prepare(self, overrides: str) -> None:
        """Load model and rows; the server reports what is wrong with them."""
        from fedpeft.engine.engine import open_engine  # torch comes with it

        with suppress(Exception):
            engine = open_engine(overrides, None)
            engine.rows.by_client  # noqa: B018  # computed here
            engine.rows.examples("train")

    def answer(
        self, messages: Sequence[Message], configs: Sequence[dict[str, Any]]
    ) -> Sequence[Message | Exception]:
        """Answer the messages of a pass, whose nodes have these configurations."""
        from fedpeft.client.client import answer_all

        contexts = [
            Context(1, message.metadata.dst_node_id, config, RecordDict(), {})
            for message, config in zip(messages, configs, strict=True)
        ]
        return [_portable(answer) for answer in answer_all(messages, contexts)]


def _portable(answer: Message | Exception) -> Message | Exception:
    """Return an answer that another process can read, whatever class an error has."""
    return ValueError(sentence(answer)) if isinstance(answer, Exception) else answer


class RayGrid(LocalGrid):
    """Hands passes to Ray's workers; whichever is free takes the next one.

    A worker gets its next pass before it has answered the last one, unless few are left. If a
    worker dies, another takes its place, and errors answer the pass that it was working on.

    Args:
        num_clients: one node each.
        num_cpus: cores of a worker.
        num_gpus: share of a GPU of a worker.

    Raises:
        ValueError: Ray's machines have no room for one worker.
    """

    def __init__(self, num_clients: int, num_cpus: float, num_gpus: float) -> None:
        super().__init__(num_clients)
        count = min(num_clients, _room(num_cpus, num_gpus))
        self._kind: Any = ray.remote(Worker).options(num_cpus=num_cpus, num_gpus=num_gpus)
        self._started: list[Any] = []  # Ray's futures
        self._workers: list[Any] = [self._start() for _ in range(count)]
        # Worker and pass, by Ray's future of the answers.
        self._running: dict[Any, tuple[Any, list[Message]]] = {}

    def __enter__(self) -> "RayGrid":
        return self

    def __exit__(self, *_: object) -> None:
        # Ray may lose track of a worker killed as it starts, which lives on and keeps its cores.
        ray.wait(self._started, num_returns=len(self._started), timeout=START_SECONDS)
        for worker in self._workers:
            ray.kill(worker)

    def prepare(self, overrides: str) -> None:
        for worker in self._workers:
            worker.prepare.remote(overrides)

    def _start(self) -> Any:
        worker = self._kind.remote()
        self._started.append(worker.__ray_ready__.remote())
        return worker

    def _hand_out(self) -> None:
        while self._queue:
            busy = [worker for worker, _ in self._running.values()]
            worker = min(self._workers, key=busy.count)
            if busy.count(worker) >= (2 if len(self._queue) > len(self._workers) else 1):
                return
            group = self._queue.popleft()
            configs = [self.node_config(message.metadata.dst_node_id) for message in group]
            self._running[worker.answer.remote(group, configs)] = (worker, group)

    def _work(self) -> None:
        futures = list(self._running)
        if not futures:
            return
        ray.wait(futures, timeout=WAIT_SECONDS)
        for future in ray.wait(futures, num_returns=len(futures), timeout=0)[0]:
            if future not in self._running:  # its worker was found dead
                continue
            try:
                self._done(future, ray.get(future))
            except RayTaskError as error:
                self._failed(future, ValueError(str(error.cause or error)))
            except RayError as error:
                self._replace(self._running[future][0], error)
        self._hand_out()

    def _done(self, future: Any, answers: Sequence[Message | Exception]) -> None:
        _, group = self._running.pop(future)
        for message, answer in zip(group, answers, strict=True):
            self._reply(message, answer)

    def _failed(self, future: Any, error: Exception) -> None:
        self._done(future, [error] * len(self._running[future][1]))

    def _replace(self, dead: Any, error: RayError) -> None:
        """Fail the pass that a dead worker was working on; queue those behind it again."""
        first, *waiting = [f for f, (worker, _) in self._running.items() if worker is dead]
        reason = f"the worker that was at it died, perhaps for want of memory: {error}"
        self._failed(first, ValueError(reason))
        self._queue.extendleft(reversed([self._running.pop(future)[1] for future in waiting]))
        ray.kill(dead)  # it may only be out of reach, and would keep its cores
        self._workers[self._workers.index(dead)] = self._start()


def _room(num_cpus: float, num_gpus: float) -> int:
    """Return how many workers Ray's machines can hold at once."""
    room = 0
    for node in ray.nodes():
        free = node["Resources"] if node["Alive"] else {}
        by_gpus = [free.get("GPU", 0) / num_gpus] if num_gpus else []
        room += int(min(free.get("CPU", 0) / num_cpus, *by_gpus, float("inf")))
    if room == 0:
        raise ValueError(
            f"Ray has no machine with runtime.num_cpus={num_cpus:g} cores and "
            f"runtime.num_gpus={num_gpus:g} GPUs"
        )
    return room
