"""Where the apps run at one machine: workers of Ray, or one process."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedpeft.config.schema import Runtime

Main = Callable[[Grid, Context], None]
SIMULATED = "simulated"  # in the configuration of this machine's nodes, told what clients they are
SETUP_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"


class LocalGrid(Grid):
    """A Flower grid of this machine.

    Args:
        nodes: how many; they are numbered from 1.
    """

    def __init__(self, nodes: int) -> None:
        self._nodes = range(1, nodes + 1)
        self._queue: dict[str, Message] = {}
        self._sent = 0
        self._run = Run.create_empty(run_id=1)
        identify()

    def set_run(self, run: Run) -> None:
        """Sets the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Messages are made by their constructor."""
        return Message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queues messages, and forgets those that are too late to be answered."""
        self._queue = in_time(self._queue)
        ids = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = str(self._sent)
            self._queue[str(self._sent)] = message
            ids.append(str(self._sent))
        return ids

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Runs all messages, however long it takes."""
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        while waiting:
            arrived = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
        return replies


class InProcessGrid(LocalGrid):
    """Its nodes are functions of this process; messages run when pulled.

    Args:
        node_configs: ``node_config`` of each node.
    """

    def __init__(self, client_app: ClientApp, node_configs: list[dict[str, Any]]) -> None:
        super().__init__(len(node_configs))
        self._app = client_app
        self._contexts = {
            node: context_of(node, config)
            for node, config in zip(self._nodes, node_configs, strict=True)
        }

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Runs the oldest queued message that is asked for, and returns its reply."""
        wanted = set(message_ids)
        for message_id in self._queue:
            if message_id in wanted:
                return [self._answer(self._queue.pop(message_id))]
        return []

    def _answer(self, message: Message) -> Message:
        return answer(self._app, message, self._contexts[message.metadata.dst_node_id])


def identify() -> None:
    """Without it a process outside Flower's own engines may make no messages."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def in_time(messages: dict[str, Message]) -> dict[str, Message]:
    """Of messages or replies by name, those that somebody still waits for."""
    now = time.time()
    return {
        name: message
        for name, message in messages.items()
        if message.metadata.created_at + message.metadata.ttl > now
    }


def context_of(node: int, config: dict[str, Any]) -> Context:
    """A node's, at its start."""
    return Context(1, node, config, RecordDict(), {})


def answer(app: ClientApp, message: Message, context: Context) -> Message:
    """An app's reply, which as on any node is an error with its reason where the app fails."""
    try:
        return app(message=message, context=context)
    except Exception as error:
        return Message(Error(code=0, reason=str(error)), reply_to=message)


def launch(
    main: Main, num_clients: int, runtime: Runtime, before: Callable[[], None] = lambda: None
) -> None:
    """Runs a server's ``main`` with ``num_clients`` virtual clients on as many nodes as workers.

    Args:
        before: called first, while Ray starts; its error ends the run.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    context = context_of(0, {})
    if runtime.kind == "inprocess":
        from fedpeft.client.app import app

        before()
        main(InProcessGrid(app, [{SIMULATED: True}]), context)
        return
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(before)
        ours = start_ray(runtime)
    import ray

    try:
        done.result()
        from fedpeft.simulation.ray import RayGrid

        with RayGrid(num_clients, runtime.num_cpus, runtime.num_gpus) as grid:
            main(grid, context)
    finally:
        if ours:
            ray.shutdown()


def start_ray(runtime: Runtime) -> bool:
    """Whether Ray had to be started; one that runs already stays.

    The workers that start with it import at once what clients import (the variable is Ray's own
    name for its ``worker_process_setup_hook``, which would be a runtime environment, and workers
    for that start later), but where Ray says later which GPU is theirs: an import may look for
    GPUs before.
    """
    # Before Ray starts: its actors inherit the environment, and would run at nice 15.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.pop(SETUP_HOOK, None)
    if runtime.num_gpus == 0:
        os.environ[SETUP_HOOK] = "fedpeft.client.app.ready"
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    import ray

    if ray.is_initialized():  # as within a job of Hydra's Ray launcher
        return False
    ray.init(
        num_cpus=runtime.total_cpus,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    return True
