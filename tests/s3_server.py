"""An S3 server on this machine, and a proxy before it that has the faults of real ones.

`S3` is moto behind a `Proxy`: its `url` is what AWS_ENDPOINT_URL should be. The proxy asks its
`fault` about each request, which answers with one of the faults below, or None.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from moto.server import ThreadedMotoServer

HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "expect"}


@dataclass(frozen=True)
class Request:
    """What a client asks for."""

    method: str
    path: str
    """With the query."""
    headers: Mapping[str, str]
    body: bytes

    @property
    def key(self) -> str:
        """The object, without its bucket."""
        return urlsplit(self.path).path.lstrip("/").partition("/")[2]

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query, keep_blank_values=True)

    @property
    def what(self) -> str:
        """read, list, put, part, begin, end (of an upload in parts), delete, ..."""
        query = self.query
        if self.method == "PUT":
            return "part" if "partNumber" in query else "put"
        if self.method == "POST":
            return "begin" if "uploads" in query else "end" if "uploadId" in query else "post"
        if self.method == "GET":
            return "list" if "list-type" in query else "read"
        return self.method.lower()


@dataclass(frozen=True)
class Refuse:
    """The server answers with an error and does nothing."""

    code: str = "SlowDown"
    status: int = 503


@dataclass(frozen=True)
class CutRequest:
    """The connection dies after `after` bytes of the request's body."""

    after: int = 0


@dataclass(frozen=True)
class CutAnswer:
    """The server does what it is asked; the connection dies after `after` bytes of its answer."""

    after: int = 0


@dataclass(frozen=True)
class Delay:
    """The answer is late."""

    seconds: float


@dataclass(frozen=True)
class Without:
    """The server ignores a header."""

    header: str


Fault = Refuse | CutRequest | CutAnswer | Delay | Without
Faults = Callable[[Request], Fault | None]


def some(share: float, *faults: Fault, seed: int = 0) -> Faults:
    """Each of the faults for an equal part of `share` of all requests, drawn with a seed."""
    drawn, lock = random.Random(seed), threading.Lock()

    def fault(request: Request) -> Fault | None:
        with lock:
            return drawn.choice(faults) if drawn.random() < share else None

    return fault


def first(n: int, fault: Fault, when: Callable[[Request], bool] = lambda request: True) -> Faults:
    """The fault for the first `n` requests for which `when` holds."""
    left, lock = [n], threading.Lock()

    def decide(request: Request) -> Fault | None:
        with lock:
            if left[0] and when(request):
                left[0] -= 1
                return fault
        return None

    return decide


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _ProxyServer

    def handle_one_request(self) -> None:
        # Clients hang up, and so does this proxy.
        with contextlib.suppress(OSError):
            super().handle_one_request()
            return
        self.close_connection = True

    def relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.command, self.path, dict(self.headers), body)
        s3 = self.server.s3
        with s3.lock:
            s3.requests.append(request)
        fault = s3.fault(request)
        if isinstance(fault, Refuse):
            text = f"<Error><Code>{fault.code}</Code><Message>as asked</Message></Error>"
            data = b"" if self.command == "HEAD" else text.encode()
            self.answer(fault.status, [("Content-Type", "application/xml")], data, len(data))
            return
        if isinstance(fault, CutRequest):
            self.send_half(request, fault.after)
            self.hang_up()
            return
        if isinstance(fault, Delay):
            time.sleep(fault.seconds)
        left_out = {fault.header.lower()} if isinstance(fault, Without) else set()
        status, headers, data = self.ask(request, left_out)
        after = fault.after if isinstance(fault, CutAnswer) else None
        if after == 0:
            self.hang_up()
            return
        length = int(dict(headers).get("Content-Length", len(data)))
        self.answer(status, headers, data if after is None else data[:after], length)
        if after is not None:
            self.hang_up()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = relay

    def ask(self, request: Request, left_out: set[str]):
        s3 = self.server.s3
        conditional = "If-None-Match" in request.headers
        # moto looks and writes in two steps.
        with s3.conditional if conditional else contextlib.nullcontext():
            connection = http.client.HTTPConnection("127.0.0.1", s3.moto_port)
            try:
                headers = {
                    name: value
                    for name, value in request.headers.items()
                    if name.lower() not in HOP_BY_HOP | left_out
                }
                connection.request(request.method, request.path, request.body, headers)
                answer = connection.getresponse()
                data = answer.read()
                kept = [(n, v) for n, v in answer.getheaders() if n.lower() not in HOP_BY_HOP]
                return answer.status, kept, data
            finally:
                connection.close()

    def answer(self, status: int, headers, data: bytes, length: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length":
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def send_half(self, request: Request, after: int) -> None:
        """What a server sees of a client that dies in mid-put."""
        lines = [f"{request.method} {request.path} HTTP/1.1"]
        lines += [f"{n}: {v}" for n, v in request.headers.items() if n.lower() not in HOP_BY_HOP]
        with socket.create_connection(("127.0.0.1", self.server.s3.moto_port)) as there:
            there.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + request.body[:after])
            there.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                there.settimeout(5)
                while there.recv(1 << 16):
                    pass

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *arguments) -> None:
        pass


class _ProxyServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    s3: S3


@dataclass
class S3:
    """moto behind the proxy."""

    moto_port: int
    url: str
    fault: Faults = lambda request: None
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    conditional: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def faulty(self, fault: Faults) -> Iterator[None]:
        """With this fault, while the block runs."""
        self.fault = fault
        try:
            yield
        finally:
            self.fault = lambda request: None

    def seen(self, pattern: str = "") -> list[Request]:
        """The requests so far whose key matches."""
        with self.lock:
            return [request for request in self.requests if re.search(pattern, request.key)]

    def forget(self) -> None:
        """Start counting requests anew."""
        with self.lock:
            self.requests.clear()


@contextlib.contextmanager
def running() -> Iterator[S3]:
    """A server, on ports that are free."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    server = _ProxyServer(("127.0.0.1", 0), Proxy)
    s3 = S3(moto.get_host_and_port()[1], f"http://127.0.0.1:{server.server_address[1]}")
    server.s3 = s3
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield s3
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        moto.stop()
