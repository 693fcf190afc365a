"""The messages that a SuperNode holds for its ClientApp.

A SuperNode that is started with ``--isolation process`` runs no app itself. It hands each message,
a *task*, to a program that asks at its runtime API. Flower's own program starts a process a task,
which imports torch and builds the model each time, and runs the code that came with the run.

The private names of Flower that this takes stand here; ``tests/test_wire.py`` says which one an
upgrade has removed.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedpeft.errors import public_text

App = Callable[[Message, Context], Message]
log = logging.getLogger(__name__)


class Tasks:
    """Takes tasks from the SuperNode on this machine.

    Args:
        address: host:port of the SuperNode's runtime API.
        secret: content of ``--superexec-auth-secret-file``; without it the SuperNode gives no task.
    """

    def __init__(self, address: str, secret: bytes) -> None:
        self.address = address
        protected = frozenset({"/flwr.proto.Runtime/AcquireTask"})
        signed = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=protected)
        self.client = _client(address, signed, retry=False)
        self.waiting: list[NodeTask] = []  # tasks whose messages have not come yet

    def answer(self, app: App) -> bool:
        """Answer the oldest message that is here; return false if there is none."""
        if task := self._next():
            self.waiting.append(task)
        ready = next((task for task in self.waiting if task.is_here()), None)
        if ready is not None:
            self.waiting.remove(ready)
            ready.answer(app)
        return ready is not None

    def _next(self) -> "NodeTask | None":
        """Return the oldest task that nobody has taken; null if there is none, or no SuperNode."""
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        try:
            answer = self.client.AcquireTask(request)
        except httpx.TransportError:
            return None
        return (
            NodeTask(self.address, answer.token)
            if answer.HasField("task") and answer.token
            else None
        )


class NodeTask:
    """One message to answer, which is fetched in the background from now on.

    A SuperNode makes the task before it has the message. If the run ends in between, the message
    never comes, and whoever waited for it here would answer no later one.

    Args:
        address: host:port of the SuperNode's runtime API.
        token: the right to this task.
    """

    def __init__(self, address: str, token: str) -> None:
        self.client = _client(address, RuntimeTokenHttpInterceptor(token))
        self._heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(self.client))
        self._heartbeat.start()
        self._input: Future[Any] = Future()
        Thread(target=self._fetch, daemon=True).start()

    def _fetch(self) -> None:
        try:
            self._input.set_result(pull_task_input(self.client))
        except Exception as error:
            self._input.set_exception(error)

    def is_here(self) -> bool:
        """Return true when the message has come, or cannot come."""
        return self._input.done()

    def answer(self, app: App) -> None:
        """Answer the message by an app; its error becomes the reply.

        A message that cannot be fetched or read has no reply; its task fails at the SuperNode.

        Raises:
            KeyboardInterrupt: the server no longer waits for the reply.
        """
        context, status, details = None, SubStatus.FAILED, "the message could not be read"
        try:
            try:
                message, context, *_ = self._input.result()
            except Exception as error:
                log.error(details, exc_info=error)
                return
            try:
                reply, status, details = app(message, context), SubStatus.COMPLETED, ""
            except Exception as error:
                details = public_text(error)
                reply = Message(
                    Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, details), reply_to=message
                )
            push_message(self.client, reply, context)
        finally:
            push_task_output(self.client, context, status, details)
            self._heartbeat.stop()
            self.client.close()


def _client(address: str, credential: object, retry: bool = True) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        address,
        insecure=True,  # it stays on this machine
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="fedpeft"), credential],  # type: ignore[list-item]
        retry_invoker=make_simple_http_retry_invoker() if retry else None,
    )
