"""The page's server: Python's own `http.server`, on 127.0.0.1.

Chosen by measuring (Python 3.11, 2 cores; what is installed beside this project, and how long its import takes):

| | MB | packages | import | beside that |
| --- | --- | --- | --- | --- |
| gradio 6.31 | 341 | 52 | 5.5 s | writes every upload and picture to a folder; 74 ms a picture without any model |
| starlette 1.10, uvicorn 0.54 | 5 | 7 | 0.25 s | leaves limits of uploads and the Origin to be checked by hand |
| http.server | 0 | 0 | 0.08 s | leaves those, the Host and time-outs |

Five files and three calls need no framework, and a photograph must not touch the disk. What `http.server` leaves to
its user is done here: limits before a body is read, checks of Host and Origin, time-outs, and headers that say what a
browser may do with an answer. With a random model of configs/celeba128.py the page shows a new picture 30 ms after a
slider moved (median; Chromium on the same, busy 2 cores).
"""

import errno
import http
import http.server
import json
import re
import socket
import socketserver
import sys
import traceback
from collections.abc import Callable
from importlib import resources
from typing import Any, ClassVar, NamedTuple, cast

from facevae_jax.errors import UserError
from facevae_jax.exploring.explorer import MAX_PHOTOGRAPH_BYTES, Explorer, read_json

HOST = "127.0.0.1"  # this machine alone: the page has no password
MAX_REQUEST_BYTES = 2**20  # of JSON: two latents of the longest that a config allows take a sixth
IDLE_SECONDS = 60.0  # after which a silent connection is closed
REFUSED_SECONDS = 2.0  # for which the rest of a refused body is received, so that its sender reads why
CHUNK_BYTES = 2**16
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/script.js": ("script.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
JSON, PNG = "application/json", "image/png"
# Faces are personal: no cache keeps them, no other page may show, read or frame them, and none is told where they are.
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


class Call(NamedTuple):
    """What a page may post."""

    answer: Callable[[Explorer, bytes], bytes]
    content_type: str
    max_bytes: int


CALLS = {
    "/render": Call(lambda explorer, body: explorer.render(read_json(body)), PNG, MAX_REQUEST_BYTES),
    "/sample": Call(lambda explorer, body: _json(explorer.sample(read_json(body))), JSON, MAX_REQUEST_BYTES),
    "/encode": Call(lambda explorer, body: _json(explorer.encode(body)), JSON, MAX_PHOTOGRAPH_BYTES),
}


class PageServer(http.server.ThreadingHTTPServer):
    """Listens on 127.0.0.1 from its making on; answers once `serve` is called."""

    request_queue_size = 64

    def __init__(self, port: int) -> None:
        """Takes the port; 0: any free one.

        Raises:
          UserError: the port is taken, or not this user's to take.
        """
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            reason = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be listened on ({error.strerror})"
            raise UserError(f"--port={port} {reason}: choose another, or 0 for any free one.") from error
        self.files = read_files()
        self.explorer: Explorer | None = None
        port = self.server_address[1]
        # By any other name the request comes from a page whose owner had that name lead here (DNS rebinding).
        names = [f"{host}:{port}" for host in (HOST, "localhost")] + ([HOST, "localhost"] if port == 80 else [])
        self.hosts = frozenset(names)
        self.origins = frozenset(f"http://{name}" for name in names)

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """Binds, without the question to the name server that `HTTPServer` asks for the host's full name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def serve(self, explorer: Explorer) -> None:
        """Answers until Ctrl-C."""
        self.explorer = explorer
        self.files["/page.json"] = (_json(explorer.describe()), JSON)
        try:
            self.serve_forever()
        except KeyboardInterrupt:
            explorer.wait(seconds=5.0)  # threads end with the process

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no news; anything else keeps its traceback."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection, which a browser uses for many requests."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "facevae_jax", ""
    timeout = IDLE_SECONDS
    disable_nagle_algorithm: ClassVar[bool] = True  # else the picture waits 40 ms for its headers' acknowledgement
    wbufsize = -1

    def do_GET(self) -> None:
        """Answers with a file of the page."""
        # A body, which no GET of the page has, would be read as the next request.
        self.close_connection = self.close_connection or "Content-Length" in self.headers or self._is_chunked()
        if refusal := self._refusal():
            self._fail(*refusal)
        elif (found := self._server.files.get(self.path.partition("?")[0])) is None:
            self._fail(404, "there is no such page.")
        else:
            self._send(200, *found)

    def do_POST(self) -> None:
        """Computes what the page asks for."""
        call = CALLS.get(self.path)
        refusal = self._refusal() or ((404, "there is no such call.") if call is None else self._body_refusal(call))
        if refusal or call is None or self._server.explorer is None:
            self._fail(*(refusal or (503, "the model is being loaded.")))
            self._receive_rest()
            return
        length = int(self.headers["Content-Length"])
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
            self.wfile.flush()
        body = self.rfile.read(length)
        if len(body) < length:  # the browser gave up
            self.close_connection = True
            return
        try:
            answer = call.answer(self._server.explorer, body)
        except UserError as error:
            self._fail(400, str(error))
        except Exception:
            traceback.print_exc()
            self._fail(500, "the command failed; its terminal says why.")
        else:
            self._send(200, answer, call.content_type)

    @property
    def _server(self) -> PageServer:
        return cast(PageServer, self.server)

    def _refusal(self) -> tuple[int, str] | None:
        """Status and words for what comes from elsewhere than the page."""
        hosts, origins = (self.headers.get_all(name, []) for name in ("Host", "Origin"))
        if len(hosts) != 1 or hosts[0].lower() not in self._server.hosts:
            return 421, f"this server is {self._server.address}, by no other name."
        if not set(origins) <= self._server.origins:
            return 403, "other pages may not ask this server."
        return None

    def _body_refusal(self, call: Call) -> tuple[int, str] | None:
        """Status and words for a body that is not read."""
        lengths = self.headers.get_all("Content-Length", [])
        if self._is_chunked() or not lengths:
            return 411, "a length is needed."
        if len(lengths) > 1 or not re.fullmatch(r"[0-9]{1,15}", lengths[0]):
            return 400, "the length is no number."
        if int(lengths[0]) > call.max_bytes:
            return 413, f"{int(lengths[0]) / 2**20:.1f} MB are too much: {call.max_bytes // 2**20} MB are the most."
        return None

    def _is_chunked(self) -> bool:
        return "Transfer-Encoding" in self.headers

    def _receive_rest(self) -> None:
        """Drops some of a refused body: of a connection that is closed with bytes unread, the answer may be lost."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(REFUSED_SECONDS)
        left = MAX_PHOTOGRAPH_BYTES
        while left > 0 and (chunk := self.rfile.read1(min(left, CHUNK_BYTES))):
            left -= len(chunk)

    def handle_expect_100(self) -> bool:
        """Whether to go on: `do_POST` asks for the body, if it takes it."""
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers what `http.server` itself refuses, in the same form as everything else."""
        self.close_connection = True
        self._fail(code, message or http.HTTPStatus(code).phrase)

    def _fail(self, code: int, words: str) -> None:
        self._send(code, _json({"error": words}), JSON)

    def _send(self, code: int, body: bytes, content_type: str) -> None:
        self.send_response(code)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection or code >= 400:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing: a line for each move of a slider would drown what matters."""


def read_files() -> dict[str, tuple[bytes, str]]:
    """The files of the page and their types, by path."""
    folder = resources.files("facevae_jax.exploring") / "page"
    return {path: ((folder / name).read_bytes(), content_type) for path, (name, content_type) in FILES.items()}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
