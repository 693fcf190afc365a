"""The server's door to the sites: it lets the routes for SuperNodes through, and no other.

A SuperLink serves sites, operators and apps at one address, and Flower's free edition asks nobody
who submits a run for an account. So the SuperLink listens on the server's own machine alone, where
operators work, and sites reach it through this gateway. It also lets no site speak to another one.
"""

import argparse
import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from flwr.proto.fleet_pb2 import PushMessagesRequest
from google.protobuf.message import DecodeError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

SITES = "/v1/fleet/"
# Flower's routes for SuperNodes; the bodies of objects are parts of arrays, of at most 20 MB.
LARGE = ("push-object",)
SMALL = (
    *("register-node", "activate-node", "deactivate-node", "unregister-node", "get-run", "get-fab"),
    *("send-node-heartbeat", "pull-messages", "push-messages", "pull-object"),
    *("confirm-message-received",),
)
REPLIES = "push-messages"
SUPERLINK = 1  # the server's node id in every message
MOST_BYTES = {**dict.fromkeys(LARGE, 64 << 20), **dict.fromkeys(SMALL, 16 << 20)}  # a body's bytes
MOST_BYTES[REPLIES] = 1 << 20  # it carries no arrays, and takes thirty times its size to read
MOST_HELD = 1 << 30  # bytes of all bodies that are here at once
BODY_SECONDS = 60  # seconds for a request's body
MOST_REQUESTS = 512  # requests at once
OF_THE_HOP = {"connection", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
OF_THE_HOP |= {"content-length", "date", "server"}  # these are written anew
TIMEOUT = httpx.Timeout(120, connect=10)


def gateway(superlink: str, certificate: str) -> Starlette:
    """Return the app that forwards SuperNodes' requests.

    Args:
        superlink: address of the SuperLink, such as https://127.0.0.1:8000.
        certificate: file of the certificate that the SuperLink must show.
    """
    context = ssl.create_default_context(cafile=certificate)
    client = httpx.AsyncClient(
        base_url=superlink,
        verify=context,
        timeout=TIMEOUT,
        limits=httpx.Limits(max_connections=None),
        trust_env=False,  # no proxy stands between two programs of one machine
    )
    bodies = Bodies()

    async def passed_on(request: Request, name: str, body: bytes) -> Response:
        """Hand a request on, and its answer back in parts."""
        headers = _end_to_end(request.headers)
        asked = client.build_request("POST", SITES + name, headers=headers, content=body)
        try:
            answer = await client.send(asked, stream=True)
        except httpx.TransportError:  # it starts again; a SuperNode asks again after a 503
            return Response("the SuperLink does not answer", status_code=503)
        headers = _end_to_end(answer.headers)
        done = BackgroundTask(answer.aclose)
        parts = answer.aiter_raw()
        return StreamingResponse(parts, answer.status_code, headers, background=done)

    def route(name: str) -> Route:
        async def forward(request: Request) -> Response:
            async with bodies.read(request, MOST_BYTES[name]) as body:
                if name == REPLIES:
                    check_replies(body)
                return await passed_on(request, name, body)

        return Route(SITES + name, forward, methods=["POST"])

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    return Starlette(routes=[route(name) for name in MOST_BYTES], lifespan=life)


class Bodies:
    """Reads requests' bodies, and counts the bytes of all that are here.

    The SuperLink reads a body before it knows the sender, so it gets whole ones alone, and each
    has a bound, as all together have.
    """

    def __init__(self) -> None:
        self.held = 0

    @asynccontextmanager
    async def read(self, request: Request, most: int) -> AsyncIterator[bytes]:
        """Yield a request's body; its bytes count as held until the block ends.

        Args:
            request: the request whose stream is read.
            most: largest size of the body, in bytes.

        Raises:
            HTTPException: the body is too long or too slow, or there is no room for it now.
        """
        parts: list[bytes] = []
        size = 0
        try:
            await self._fill(parts, request, most)
            size = sum(map(len, parts))
            body = b"".join(parts)
            parts.clear()  # so that the body is here once
            yield body
        finally:
            self.held -= size or sum(map(len, parts))

    async def _fill(self, parts: list[bytes], request: Request, most: int) -> None:
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    parts.append(part)
                    size, self.held = size + len(part), self.held + len(part)
                    self._check(size, most)
        except (TimeoutError, ClientDisconnect) as error:
            raise HTTPException(408, "the request did not come in time") from error

    def _check(self, size: int, most: int) -> None:
        if size > most:
            raise HTTPException(413, f"a body has at most {most} bytes here")
        if self.held > MOST_HELD:  # a SuperNode asks again after a 503
            raise HTTPException(503, "too many bytes come at once")


def check_replies(body: bytes) -> None:
    """Let a site send replies of its own to the server, and nothing else.

    The SuperLink makes sure that a request comes from the node that it names. It then stores every
    message in it, also a message that reads as if the server had sent it to another site.

    Args:
        body: a serialised request to push messages.

    Raises:
        HTTPException: a message is no reply, has another sender or goes to another site.
    """
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError as error:
        raise HTTPException(400, "this is no request to push messages") from error
    node = request.node.node_id
    for message in request.messages_list:
        says = message.metadata
        ends = says.src_node_id, says.dst_node_id
        if node == SUPERLINK or ends != (node, SUPERLINK) or not says.reply_to_message_id:
            raise HTTPException(403, f"node {node} may only reply to the server")


def _end_to_end(headers: object) -> dict[str, str]:
    """Return the headers that belong to the message, without the connection's."""
    return {k: v for k, v in dict(headers).items() if k.lower() not in OF_THE_HOP}  # type: ignore[call-overload]


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(prog="python -m fedpeft.deployment.gateway")
    for name in ("host", "port", "certificate", "key", "superlink", "superlink-certificate"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    uvicorn.run(
        gateway(args.superlink, args.superlink_certificate),
        host=args.host,
        port=int(args.port),
        ssl_certfile=Path(args.certificate),
        ssl_keyfile=Path(args.key),
        access_log=False,
        limit_concurrency=MOST_REQUESTS,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
