"""The gateway lets through what SuperNodes ask, within bounds."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from fedpeft.deployment import gateway as module
from fedpeft.deployment.gateway import gateway
from fedpeft.deployment.keys import write_certificate
from fedpeft.deployment.processes import free_ports


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
