"""The server's door to the sites: it lets the routes for SuperNodes through, and no other.

A SuperLink serves sites, operators and apps at one address, and Flower's free edition asks nobody
who submits a run for an account. So the SuperLink listens on the server's own machine alone, where
operators work, and sites reach it through this gateway.
"""

import argparse
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

ROUTES = "/v1/fleet/{name:str}"
OF_THE_HOP = {"connection", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
TIMEOUT = httpx.Timeout(120, connect=10)


def gateway(superlink: str, certificate: str) -> Starlette:
    """Return the app that forwards SuperNodes' requests.

    Args:
        superlink: address of the SuperLink, such as https://127.0.0.1:8000.
        certificate: file of the certificate that the SuperLink must show.
    """
    context = ssl.create_default_context(cafile=certificate)
    client = httpx.AsyncClient(base_url=superlink, verify=context, timeout=TIMEOUT)

    async def forward(request: Request) -> Response:
        """Hand a request on, and its answer back, in parts, so that neither fills the memory."""
        asked = client.build_request(
            "POST", request.url.path, headers=_end_to_end(request.headers), content=request.stream()
        )
        try:
            answer = await client.send(asked, stream=True)
        except httpx.TransportError:  # it starts again; a SuperNode asks again after a 503
            return Response("the SuperLink does not answer", status_code=503)
        headers = _end_to_end(answer.headers)
        done = BackgroundTask(answer.aclose)
        return StreamingResponse(answer.aiter_raw(), answer.status_code, headers, background=done)

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    return Starlette(routes=[Route(ROUTES, forward, methods=["POST"])], lifespan=life)


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
        log_level="warning",
    )


if __name__ == "__main__":
    main()
