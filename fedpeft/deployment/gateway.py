"""The server's door to the sites: it lets the routes for SuperNodes through, and no other.

A SuperLink serves sites, operators and apps at one address, and Flower's free edition asks nobody
who submits a run for an account. So the SuperLink listens on the server's own machine alone, where
operators work, and sites reach it through this gateway.
"""

import argparse
import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
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
MOST_BYTES = {**dict.fromkeys(LARGE, 64 << 20), **dict.fromkeys(SMALL, 16 << 20)}  # of a body
BODY_SECONDS = 60  # for a request's body
MOST_REQUESTS = 512  # at once
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

    def route(name: str) -> Route:
        async def forward(request: Request) -> Response:
            """Hand a request on when it is here as a whole, and its answer back in parts.

            The SuperLink reads a body before it knows the sender, so a body has a bound.
            """
            try:
                body = await asyncio.wait_for(_body(request, MOST_BYTES[name]), BODY_SECONDS)
            except (TimeoutError, ClientDisconnect):
                return Response("the request did not come in time", status_code=408)
            except ValueError as error:
                return Response(str(error), status_code=413)
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

        return Route(SITES + name, forward, methods=["POST"])

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    return Starlette(routes=[route(name) for name in MOST_BYTES], lifespan=life)


async def _body(request: Request, most: int) -> bytes:
    """Read a request's body.

    Raises:
        ValueError: it is too long.
        ClientDisconnect: it does not end.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise ValueError(f"a body has at most {most} bytes here")
    return bytes(body)


def _end_to_end(headers: object) -> dict[str, str]:
    """Return the headers that belong to the message, without those of the connection."""
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
