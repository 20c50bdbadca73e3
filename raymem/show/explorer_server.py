"""`raymem explore`: the explorer over loopback, for stores too large for one page.

In:  a scored store. Out: the page, and each array, picture and example as the page asks for it.

Read-only, at 127.0.0.1 only. The address has a random token: who does not know it gets 403, and so
does a request for another host's name, with which a web page elsewhere could reach it (DNS
rebinding).
"""

from __future__ import annotations

import io
import json
import math
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from raymem.encoding import epsilon_name
from raymem.errors import ExamplesError, RaymemError
from raymem.show.explorer import about, explorer_page, pair_blobs, section_html, vega_code
from raymem.show.explorer_data import ExplorerTables, Measure, packed, packed_text
from raymem.show.explorer_spec import ExplorerError
from raymem.show.notebook import StudyResults, as_image
from raymem.show.thumbnails import media_type

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send
except ModuleNotFoundError as error:
    raise ExplorerError(
        "the explorer's server needs starlette and uvicorn; pip install 'raymem[explore]', or open "
        "the report, which has the explorer"
    ) from error

MOST_PAIRS = 2_000_000
HOST = "127.0.0.1"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        # Vega compiles its expressions.
        "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src 'self' blob: data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """Lets requests through that name this server and its token, and only read."""

    def __init__(self, app: ASGIApp, *, token: str, port: int) -> None:
        self.app, self.token = app, token
        self.hosts = {f"{HOST}:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        refusal = self._refusal(Request(scope))
        await (refusal or self.app)(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("this server only reads", 405, HEADERS)
        if request.headers.get("host", "") not in self.hosts:
            return PlainTextResponse("this server has another name", 403, HEADERS)
        token = request.url.path.split("/")[1]
        if not secrets.compare_digest(token.encode(), self.token.encode()):
            text = "wrong token; open the address that `raymem explore` printed"
            return PlainTextResponse(text, 403, HEADERS)
        return None


class Answers:
    """What the server says of one store."""

    def __init__(self, opened: StudyResults) -> None:
        self.opened, self.tables = opened, ExplorerTables(opened.store)
        self._kept = opened.store.thumbnails()
        try:
            opened.data()
            self.images_at_hand = True
        except RaymemError:
            self.images_at_hand = False

    def page(self) -> str:
        """The whole page, without its arrays."""
        tables = self.tables
        names = [n for m in tables.measures for n in (m.name, *m.around)]
        shown = [epsilon_name(e) for e in tables.epsilons]
        told = {
            **about(tables),
            "served": True,
            "pictures": self.images_at_hand or bool(self._kept),
            "columns": dict.fromkeys(shown, names),
            "pairs": [epsilon_name(e) for e in tables.epsilons if len(tables.pairs(e)["train"])],
            "trials": {
                epsilon_name(e): len(tables.trials(e)) for e in tables.epsilons if tables.trials(e)
            },
        }
        return explorer_page(section_html(told, {}), f"{tables.study.data_name}: explorer")

    def blob(self, name: str) -> bytes:
        """An array as the page unpacks it. Raises KeyError if there is none."""
        kind, *more = name.split("/")
        tables = self.tables
        simple: dict[str, Callable[[], bytes]] = {
            "ids": lambda: packed_text(json.dumps(tables.ids)),
            "labels": lambda: packed(tables.labels),
            "groups": lambda: packed(tables.groups),
            "vega": vega_code,
        }
        if not more:
            return simple[kind]()
        epsilon = self._epsilon(more[0])
        if kind == "m":
            self._known(more[1])
            values = tables.column(epsilon, more[1])
            return packed(np.full(tables.n_examples, np.nan) if values is None else values)
        if kind == "pairs":
            pairs = {key: values[:MOST_PAIRS] for key, values in tables.pairs(epsilon).items()}
            return pair_blobs(more[0], **pairs)[name]
        if kind == "outcomes":
            return packed(tables.outcomes(epsilon)[:, self._row(more[1])])
        raise KeyError(name)

    def _known(self, name: str) -> None:
        if not any(name in (m.name, *m.around) for m in self.tables.measures):
            raise KeyError(name)

    def _epsilon(self, name: str) -> float:
        return {epsilon_name(e): e for e in self.tables.epsilons}[name]

    def _row(self, text: str) -> int:
        row = int(text)
        if not 0 <= row < self.tables.n_examples:
            raise KeyError(text)
        return row

    def example(self, epsilon: str, row: str) -> dict[str, dict[str, float | None]]:
        """All measures of one example, by name: value, low, high."""
        at, place = self._epsilon(epsilon), self._row(row)
        return {m.name: self._value(m, at, place) for m in self.tables.measures}

    def _value(self, measure: Measure, epsilon: float, row: int) -> dict[str, float | None]:
        def of(name: str) -> float:
            values = self.tables.column(epsilon, name)
            return math.nan if values is None else float(values[row])

        value, around = of(measure.name), [of(name) for name in measure.around]
        if len(around) == 1:
            around = [value - 1.96 * around[0], value + 1.96 * around[0]]
        found = dict(zip(("value", "low", "high"), [value, *around], strict=False))
        return {key: number if math.isfinite(number) else None for key, number in found.items()}

    def picture(self, row: str) -> bytes:
        """An example's image as PNG, or the thumbnail that was kept. Raises KeyError."""
        place = self._row(row)
        if not self.images_at_hand:
            return self._kept[self.tables.ids[place]]
        data = self.opened.data()
        x, ids = (
            (data.x_train, data.train_ids)
            if place < self.tables.n_train
            else (data.x_test, data.test_ids)
        )
        index = int(self.tables.index[place])
        if ids[index] != self.tables.ids[place]:
            raise ExamplesError(f"{self.tables.ids[place]} is another image in {data.name}")
        out = io.BytesIO()
        as_image(np.asarray(x[index])).save(out, "PNG")
        return out.getvalue()


def explorer_app(opened: StudyResults, *, token: str, port: int) -> ASGIApp:
    """The server's application: answers at /TOKEN/ to requests for 127.0.0.1:PORT."""
    answers = Answers(opened)

    # Without a media type: that of the image.
    def route(path: str, media: str, answer: Callable[..., Any]) -> Route:
        # Not a coroutine: it reads and packs in a thread, so that others are not kept waiting.
        def respond(request: Request) -> Response:
            try:
                body = answer(**request.path_params)
            except (KeyError, ValueError, IndexError):
                return PlainTextResponse("there is no such thing here", 404, HEADERS)
            except RaymemError as error:
                return PlainTextResponse(str(error), 500, HEADERS)
            return Response(body, media_type=media or media_type(body), headers=HEADERS)

        return Route(f"/{token}/{path}", respond)

    def example(epsilon: str, row: str) -> str:
        return json.dumps(answers.example(epsilon, row), allow_nan=False)

    routes = [
        route("", "text/html", answers.page),
        route("blob/{name:path}", "application/octet-stream", answers.blob),
        route("picture/{row}", "", answers.picture),
        route("example/{epsilon}/{row}", "application/json", example),
    ]
    return Guard(Starlette(routes=routes), token=token, port=port)


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket at 127.0.0.1; port 0 takes a free one."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((HOST, port))
            server.listen()  # the address works from when it is told
        except OSError as error:
            raise ExplorerError(
                f"port {port} is in use; leave --port out, and a free one is taken"
            ) from error
        yield server


def serve_explorer(
    opened: StudyResults, *, port: int = 0, told: Callable[[str], object] = print
) -> None:
    """Serve a store's explorer until Ctrl-C; `told` is called with the address first.

    Raises StoreError without scores, ExplorerError if the port is in use.
    """
    token = secrets.token_urlsafe(16)
    with listening(port) as server:
        port = server.getsockname()[1]
        app = explorer_app(opened, token=token, port=port)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=2
        )
        told(f"http://{HOST}:{port}/{token}/")
        try:
            uvicorn.Server(config).run(sockets=[server])
        except KeyboardInterrupt:
            return
