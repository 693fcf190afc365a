"""Where the apps run at one machine: Flower's simulation on Ray, or one process."""

import logging
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedpeft.schema import Runtime

Main = Callable[[Grid, Context], None]
SIMULATED = "simulated"  # in the configuration of a node in the server's own process
SETUP_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"


class InProcessGrid(Grid):
    """A Flower grid whose nodes are functions of this process; messages run when pulled.

    Args:
        node_configs: ``node_config`` of each node; nodes are numbered from 1.
    """

    def __init__(self, client_app: ClientApp, node_configs: list[dict[str, Any]]) -> None:
        self._app = client_app
        self._queue: dict[str, Message] = {}
        self._sent = 0
        self._run = Run.create_empty(run_id=1)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self._contexts = {
            node: Context(1, node, config, RecordDict(), {})
            for node, config in enumerate(node_configs, start=1)
        }

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
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queues messages."""
        ids = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = str(self._sent)
            self._queue[str(self._sent)] = message
            ids.append(str(self._sent))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Runs the oldest queued message that is asked for, and returns its reply."""
        wanted = set(message_ids)
        for message_id in self._queue:
            if message_id in wanted:
                return [self._answer(self._queue.pop(message_id))]
        return []

    def _answer(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            return self._app(message=message, context=context)
        except Exception as error:  # as on any node, the reason goes back in the reply
            return Message(Error(code=0, reason=str(error)), reply_to=message)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Runs all messages in order."""
        return [reply for i in self.push_messages(messages) for reply in self.pull_messages([i])]


def launch(
    main: Main, num_clients: int, runtime: Runtime, before: Callable[[], None] = lambda: None
) -> None:
    """Runs a server's ``main`` with ``num_clients`` virtual clients on as many nodes as workers.

    Args:
        before: called first, while Ray starts; its error ends the run.
    """
    from fedpeft.client_app import app as client_app

    logging.getLogger("flwr").setLevel(logging.ERROR)
    if runtime.kind == "inprocess":
        before()
        main(InProcessGrid(client_app, [{SIMULATED: True}]), Context(1, 0, {}, RecordDict(), {}))
        return
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(before)
        _start_ray(runtime)
        try:
            done.result()
        except BaseException:
            import ray

            ray.shutdown()
            raise
    _simulate(main, client_app, min(num_clients, workers(runtime)), runtime)


def workers(runtime: Runtime) -> int:
    """Clients that run at once, as far as cores go."""
    return max(1, int((runtime.total_cpus or os.cpu_count() or 1) / runtime.num_cpus))


def _start_ray(runtime: Runtime) -> None:
    """As Flower would, but that the workers which start with it are those of the clients.

    Flower names the paths in a runtime environment, which these workers have not, so that others
    start after them. What clients import they import at once (the variable is Ray's own name for
    its ``worker_process_setup_hook``, which would be a runtime environment too), but where Ray says
    later which GPU is theirs: an import may look for GPUs before. A Ray that runs already stays.
    """
    # Before Ray starts: its actors inherit the environment, and would run at nice 15.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.pop(SETUP_HOOK, None)
    if runtime.num_gpus == 0:
        os.environ[SETUP_HOOK] = "fedpeft.client_app.ready"
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    import ray

    if ray.is_initialized():  # as within a job of Hydra's Ray launcher
        return
    ray.init(
        num_cpus=runtime.total_cpus,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


def _simulate(main: Main, client_app: ClientApp, num_nodes: int, runtime: Runtime) -> None:
    from flwr.simulation import run_simulation

    server_app = ServerApp()
    server_app.main()(main)
    resources = {"num_cpus": runtime.num_cpus, "num_gpus": runtime.num_gpus}
    backend: dict[str, Any] = {"client_resources": resources}
    run_simulation(server_app, client_app, num_nodes, backend_config=backend)
