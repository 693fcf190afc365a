"""A node's worker answers each message that has come, also while another one never comes."""

import threading
from typing import Any

import pytest

from fedpeft.deployment import tasks as module
from fedpeft.deployment.tasks import Task, Tasks


class Quiet:
    """Stands in for what speaks to the SuperNode."""

    def __init__(self, *arguments: Any, **_: Any) -> None:
        self.token = arguments[-1]

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Put others in the place of Flower's names; the list takes what is pushed and how it ends."""
    said: list[Any] = []
    monkeypatch.setattr(module, "_client", Quiet)
    monkeypatch.setattr(module, "RuntimeTokenHttpInterceptor", str)
    monkeypatch.setattr(module, "HeartbeatSender", Quiet)
    monkeypatch.setattr(module, "make_task_heartbeat_fn_http", lambda client: None)
    monkeypatch.setattr(module, "push_message", lambda c, reply, _: said.append(("pushed", reply)))
    monkeypatch.setattr(module, "push_task_output", lambda c, *a: said.append(("finished", *a)))
    return said


def test_a_message_that_never_comes_stops_no_later_one(
    stand_ins: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A SuperNode makes a task before it has the message, and keeps it if the run has ended."""
    never = threading.Event()

    def pull(client: Quiet) -> Any:
        return never.wait() if client.token == "lost" else ("message", "context")

    def echo(message: Any, context: Any) -> Any:
        return message

    monkeypatch.setattr(module, "pull_task_input", pull)
    waiting: list[Any] = [Task("", "lost"), None, Task("", "here")]
    tasks = Tasks("", b"secret")
    monkeypatch.setattr(tasks, "_next", lambda: waiting.pop(0) if waiting else None)
    answers = [tasks.answer(echo) for _ in range(2)]
    assert answers == [False, False] and stand_ins == []
    waiting[0]._input.result(timeout=9)  # it has come
    assert tasks.answer(echo)
    assert stand_ins == [("pushed", "message"), ("finished", "context", "completed", "")]
    assert len(tasks.waiting) == 1 and not tasks.answer(echo)
    never.set()


def test_a_message_that_cannot_be_read_stops_no_later_one(
    stand_ins: list[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is the server can send one."""

    def pull(client: Quiet) -> Any:
        if client.token == "broken":
            raise ValueError("no such object type")
        return "message", "context"

    monkeypatch.setattr(module, "pull_task_input", pull)
    for token in ("broken", "here"):
        task = Task("", token)
        task._input.exception(timeout=9)  # it has come
        task.answer(lambda message, context: message)
    failed = ("finished", None, "failed", "the message could not be read")
    done = ("finished", "context", "completed", "")
    assert stand_ins == [failed, ("pushed", "message"), done]
    assert [(r.message, str(r.exc_info[1])) for r in caplog.records if r.exc_info] == [
        ("the message could not be read", "no such object type")
    ]
