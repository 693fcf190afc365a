"""A node's worker answers each message that has come, also while another one never comes."""

import threading
from typing import Any

import pytest

from fedpeft.deployment import tasks as module
from fedpeft.deployment.tasks import NodeTask, Tasks


class Quiet:
    """Stands in for what speaks to the SuperNode."""

    def __init__(self, *arguments: Any, **_: Any) -> None:
        self.token = arguments[-1]

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


def test_a_message_that_never_comes_stops_no_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SuperNode makes a task before it has the message, and keeps it if the run has ended."""
    never = threading.Event()
    pushed: list[Any] = []
    finished: list[Any] = []

    def pull(client: Quiet) -> Any:
        return never.wait() if client.token == "lost" else ("message", "context")

    def echo(message: Any, context: Any) -> Any:
        return message

    monkeypatch.setattr(module, "_client", Quiet)
    monkeypatch.setattr(module, "RuntimeTokenHttpInterceptor", str)
    monkeypatch.setattr(module, "HeartbeatSender", Quiet)
    monkeypatch.setattr(module, "make_task_heartbeat_fn_http", lambda client: None)
    monkeypatch.setattr(module, "pull_task_input", pull)
    monkeypatch.setattr(module, "push_message", lambda client, reply, context: pushed.append(reply))
    monkeypatch.setattr(module, "push_task_output", lambda *a: finished.append(a[2]))
    waiting: list[Any] = [NodeTask("", "lost"), None, NodeTask("", "here")]
    tasks = Tasks("", b"secret")
    monkeypatch.setattr(tasks, "_next", lambda: waiting.pop(0) if waiting else None)
    answers = [tasks.answer(echo) for _ in range(2)]
    assert answers == [False, False] and pushed == []
    waiting[0]._input.result(timeout=9)  # it has come
    assert tasks.answer(echo)
    assert pushed == ["message"] and finished == ["completed"]
    assert len(tasks.waiting) == 1 and not tasks.answer(echo)
    never.set()
