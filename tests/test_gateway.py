"""The gateway lets through what SuperNodes ask, within bounds."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.node_pb2 import Node

from fedpeft.deployment import gateway as module
from fedpeft.deployment.gateway import gateway
from fedpeft.deployment.keys import write_certificate
from fedpeft.deployment.processes import free_ports
from fedpeft.wire import identify, number


@pytest.fixture
def app(tmp_path: Path) -> httpx.ASGITransport:
    """A gateway before a SuperLink that is not there."""
    (port,) = free_ports(1)
    return httpx.ASGITransport(
        gateway(f"https://127.0.0.1:{port}", str(write_certificate(tmp_path)[0]))
    )


def status(app: httpx.ASGITransport, path: str, content: bytes | AsyncIterator[bytes]) -> int:
    async def ask() -> int:
        async with httpx.AsyncClient(transport=app, base_url="http://gateway") as client:
            return (await client.post(path, content=content)).status_code

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("path", "size", "answer"),
    [
        ("/v1/fleet/pull-messages", 9, 503),  # let through, to nobody
        ("/v1/fleet/push-object", 1 << 25, 503),
        ("/v1/fleet/push-object", (1 << 26) + 1, 413),
        ("/v1/fleet/pull-messages", 1 << 25, 413),
        ("/v1/fleet/push-messages", (1 << 20) + 1, 413),
        ("/v1/control/list-runs", 9, 404),
        ("/v1/fleet/other", 9, 404),
    ],
)
def test_routes_and_sizes(app: httpx.ASGITransport, path: str, size: int, answer: int) -> None:
    assert status(app, path, bytes(size)) == answer


def test_a_body_that_does_not_come(
    app: httpx.ASGITransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that stalls has no connection to the SuperLink, and ends."""
    monkeypatch.setattr(module, "BODY_SECONDS", 0.2)

    async def stalled() -> AsyncIterator[bytes]:
        yield b"1"
        await asyncio.sleep(30)

    assert status(app, "/v1/fleet/pull-messages", stalled()) == 408


def test_all_bodies_share_a_bound(
    app: httpx.ASGITransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bodies that come slowly take the room, and give it back when they end."""
    monkeypatch.setattr(module, "MOST_HELD", 2500)
    monkeypatch.setattr(module, "BODY_SECONDS", 9)
    go_on = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield bytes(1000)
        await go_on.wait()

    async def ask() -> list[bool]:
        async with httpx.AsyncClient(transport=app, base_url="http://gateway") as client:
            path = "/v1/fleet/push-object"
            waiting = [asyncio.create_task(client.post(path, content=slow())) for _ in range(2)]
            await asyncio.sleep(0.05)
            refused = await client.post(path, content=bytes(600))
            go_on.set()
            ended = await asyncio.gather(*waiting)
            after = [await client.post(path, content=bytes(size)) for size in (2500, 2501)]
            answers = [refused, *ended, *after]
            return ["too many" in answer.text for answer in answers]

    assert asyncio.run(ask()) == [True, False, False, False, True]


NODE, OTHER, SERVER = 7, 8, 1


def pushed(change: Callable[[Any], None] = lambda says: None, node: int = NODE) -> bytes:
    """Return a node's request to push two replies, the second one changed."""
    identify()
    messages = []
    for name in ("a", "b"):
        asked = Message(RecordDict(), NODE, "train")
        number(asked, name)
        messages.append(message_to_proto(Message(RecordDict(), reply_to=asked)))
    change(messages[1].metadata)
    request = PushMessagesRequest(node=Node(node_id=node), messages_list=messages)
    return request.SerializeToString()


def test_a_node_s_replies_are_let_through(app: httpx.ASGITransport) -> None:
    assert status(app, "/v1/fleet/push-messages", pushed()) == 503  # to a SuperLink that is away


def set_to(**fields: Any) -> Callable[[Any], None]:
    """Return a change of a message's metadata."""

    def change(says: Any) -> None:
        for name, value in fields.items():
            setattr(says, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "node"),
    [
        # An instruction to another site as if the server had sent it
        (set_to(src_node_id=SERVER, dst_node_id=OTHER, reply_to_message_id=""), NODE),
        (set_to(src_node_id=SERVER, reply_to_message_id=""), NODE),
        (set_to(src_node_id=SERVER), NODE),
        (set_to(dst_node_id=OTHER), NODE),
        (set_to(src_node_id=OTHER), NODE),  # another site's reply
        (set_to(reply_to_message_id=""), NODE),
        (set_to(), OTHER),
        (set_to(src_node_id=SERVER), SERVER),
    ],
)
def test_a_node_sends_nothing_but_its_own_replies(
    change: Callable[[Any], None], node: int, app: httpx.ASGITransport
) -> None:
    assert status(app, "/v1/fleet/push-messages", pushed(change, node)) == 403


def test_what_is_no_request(app: httpx.ASGITransport) -> None:
    assert status(app, "/v1/fleet/push-messages", b"\xff" * 9) == 400
