"""The page's web server: Starlette on uvicorn, on 127.0.0.1.

Preferred to Gradio, which installs 341 MB (this: 5 MB) and writes every upload and picture to a folder.
"""

import errno
import socket
import traceback
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from facevae_jax.core.errors import UserError
from facevae_jax.exploring.explorer import MAX_PHOTOGRAPH_BYTES, Explorer, read_json

HOST = "127.0.0.1"  # this machine only: the page has no password
PNG = "image/png"
MAX_JSON_BYTES = 2**20  # two latents of the largest allowed size take a sixth of it
SHUTDOWN_SECONDS = 5  # how long Ctrl-C waits for open requests
# Faces are personal: no cache stores them, and no other site may show, read or frame them.
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def listen(port: int) -> socket.socket:
    """A socket that listens on 127.0.0.1; port 0 takes any free port.

    Raises:
      UserError: the port is in use, or needs privileges.
    """
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened ({error.strerror})"
        raise UserError(f"--port={port} {reason}: choose another, or 0 for any free port.") from error


def address(listener: socket.socket) -> str:
    """The URL to open in a browser."""
    return f"http://{HOST}:{listener.getsockname()[1]}/"


def make_server(explorer: Explorer) -> uvicorn.Server:
    """A server of the page; `run(sockets=[listener])` serves until Ctrl-C, then raises KeyboardInterrupt."""
    config = uvicorn.Config(
        make_app(explorer),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",  # `_fault` prints errors; a line per slider move would bury them
        headers=list(HEADERS.items()),
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    return uvicorn.Server(config)


def make_app(explorer: Explorer) -> Starlette:
    """The page's files, its description (`/page.json`) and its three calls."""
    description = JSONResponse(explorer.describe())
    return Starlette(
        routes=[
            Route("/page.json", lambda request: description),
            _call("/render", MAX_JSON_BYTES, lambda body: Response(explorer.render(read_json(body)), media_type=PNG)),
            _call("/sample", MAX_JSON_BYTES, lambda body: JSONResponse(explorer.sample(read_json(body)))),
            _call("/encode", MAX_PHOTOGRAPH_BYTES, lambda body: JSONResponse(explorer.encode(body))),
            Mount("/", StaticFiles(packages=[("facevae_jax.exploring", "page")], html=True)),
        ],
        # A foreign site can point its own name at 127.0.0.1 (DNS rebinding), but the Host header shows that name.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)],
        exception_handlers={
            UserError: lambda request, error: _error(400, str(error)),
            HTTPException: lambda request, error: _error(error.status_code, error.detail),
            ClientDisconnect: lambda request, error: _error(400, "the upload is incomplete."),
            Exception: _fault,
        },
    )


def _call(path: str, max_bytes: int, answer: Callable[[bytes], Response]) -> Route:
    """A POST that only the page itself may send; `answer` maps its body to the response, in a thread."""

    async def endpoint(request: Request) -> Response:
        own = f"http://{request.headers['host']}"
        if any(origin != own for origin in request.headers.getlist("origin")):
            raise HTTPException(403, "requests from other sites are refused.")
        return await run_in_threadpool(answer, await request.body())

    return Route(path, endpoint, methods=["POST"], max_body_size=max_bytes)


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)


def _fault(request: Request, error: Exception) -> JSONResponse:
    traceback.print_exception(error)
    return _error(500, "the command failed; see its terminal for the reason.")
