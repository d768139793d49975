"""Runs that are being trained as a page that follows, to this machine alone.

The server listens on the loopback address and answers GET alone, of two addresses: the page, and the part of it that
changes. A web site that a browser shows cannot read them: other names for this machine in the Host header are refused
(DNS rebinding), and so are requests that a browser marks as another site's. All that stands in logs is escaped.
"""

from __future__ import annotations

import datetime
import secrets
import socketserver
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from markupsafe import Markup

from sinkroute.lab.page import render
from sinkroute.lab.page.heat import heat_svg
from sinkroute.lab.page.palette import Ink, inks
from sinkroute.lab.watch.chart import chart
from sinkroute.lab.watch.follow import Followed, Follower, fair_shares
from sinkroute.lab.watch.terminal import COLUMNS, row

__all__ = ["Server", "make_server"]

LOOPBACK = "127.0.0.1"
DRAWN = 12  # runs with curves and loads, at most
EXPLAINED = {
    "Loss": "In nats per symbol, mean over the steps since the line before.",
    "MaxVio": "Load of the busiest expert over the mean, minus 1; mean over layers. 0 is balanced.",
    "Plans": "Share of the routers' calls that took another branch than plain top-k.",
}


class Server(ThreadingHTTPServer):
    """Of one follower, which one request at a time reads."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, follower: Follower, port: int) -> None:
        self.follower, self.reading = follower, threading.Lock()
        self.title = "Training in " + ", ".join(map(str, follower.paths))
        super().__init__((LOOPBACK, port), _Handler)

    def server_bind(self) -> None:
        """Without asking a name server for the name of this machine, as `HTTPServer` does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = LOOPBACK, self.server_address[1]

    def now(self) -> dict[str, Any]:
        """What the changing part of the page shows."""
        with self.reading:
            self.follower.poll()
            return _shown(self.follower)


def make_server(follower: Follower, port: int, *, or_any: bool = False) -> Server:
    """A server at a port of the loopback address; `or_any` takes another one if it is not free.

    Raises:
        OSError: the port cannot be had; the message says what to do.
    """
    try:
        return Server(follower, port)
    except OSError as error:
        if or_any:
            return Server(follower, 0)
        raise OSError(f"--serve: port {port} cannot be had ({error.strerror}); give another, or none") from None


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version, protocol_version = "sinkroute", "", "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        nonce = secrets.token_urlsafe(16)
        names = {f"{name}:{self.server.server_port}" for name in (LOOPBACK, "localhost")}
        if self.headers.get("Host", "").lower() not in names:
            return self._answer(403, "This page is for this machine alone: its address is the one that was printed.")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return self._answer(403, "This page is not for other sites.")
        if self.path == "/":
            return self._answer(200, _page(self.server.now(), self.server.title, nonce), nonce=nonce)
        if self.path == "/now":
            return self._answer(200, render("watch/now.html.j2", **self.server.now()))
        return self._answer(404, "There is no such page; it is /.")

    def _refuse(self) -> None:
        self.close_connection = True  # a body, if there is one, is not read
        self._answer(405, "Nothing can be changed here: GET alone.")

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_CONNECT = do_TRACE = _refuse

    def _answer(self, code: int, text: str, nonce: str = "") -> None:
        body = text.encode()
        self.send_response(code)
        policy = (
            "default-src 'none'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        )
        policy += "frame-ancestors 'none'" + (f"; script-src 'nonce-{nonce}'" if nonce else "")
        for name, value in (
            ("Content-Type", f"text/{'html' if code == 200 else 'plain'}; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", policy),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
            *((("Allow", "GET"), ("Connection", "close")) if code == 405 else ()),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: the terminal belongs to whoever watches."""


def _page(now: dict[str, Any], title: str, nonce: str) -> str:
    return render("watch/page.html.j2", **now, nonce=nonce, kicker="sinkroute watch", title=title)


def _shown(follower: Follower) -> dict[str, Any]:
    """What the templates are filled with."""
    runs = sorted(follower.runs.values(), key=lambda run: run.state not in ("running", "silent"))[:DRAWN]
    place = {run: ink for ink, run in enumerate(run for run in follower.runs.values() if run in runs)}
    charts = [
        chart("Loss", _curves(place, "loss")),
        chart("MaxVio", _curves(place, "max_vio")),
        chart("Plans", _curves(place, "planned")),
    ]
    return {
        "colours": _colours([run.method for run in place]),
        "columns": [column.name for column in COLUMNS],
        "rows": [(place.get(run), [str(cell) for cell in row(run)]) for run in follower.runs.values()],
        "charts": [drawn for drawn in charts if drawn is not None],
        "explained": EXPLAINED,
        "heats": [(run.name, _heat(run)) for run in place if run.load],
        "missing": [str(path) for path in follower.missing],
        "to_come": {str(path): count for path, count in follower.to_come.items() if count},
        "more": len(follower.runs) - len(place),
        "at": f"{datetime.datetime.now():%H:%M:%S}",
    }


def _heat(run: Followed) -> Markup:
    rows = [(name, fair_shares(load)) for name, load in run.load.items()]
    return Markup(heat_svg(rows, f"Load of each expert of {run.name}"))


def _colours(methods: list[str]) -> list[Ink]:
    """The inks of the methods; of those with the same one, all but the first get another while there is one.

    >>> len({ink.light for ink in _colours(["softmax"] * DRAWN)})
    12
    """
    taken = inks(methods)
    known = ("softmax", "load-balance", "z-loss", "sinkhorn", "ssr-l", "ssr-s")
    free = [ink for ink in inks([*known, *[""] * 6]) if ink not in taken]
    return [free.pop() if ink in taken[:place] and free else ink for place, ink in enumerate(taken)]


def _curves(place: dict[Followed, int], name: str) -> dict[tuple[int, str], list[tuple[int, float]]]:
    return {
        (ink, run.name): [(point.step, value) for point in run.sorted if (value := getattr(point, name)) is not None]
        for run, ink in place.items()
    }
