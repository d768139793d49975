"""The page that follows: who gets it, what stands in it, and how it looks."""

import http.client
import json
import re
import socket
import threading
from contextlib import contextmanager

import pytest

from sinkroute.lab.watch.follow import Follower
from sinkroute.lab.watch.serve import make_server

from ..browser import MISSING, browser
from .logs import make_run, train_line


@contextmanager
def served(*paths):
    with make_server(Follower(paths), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def asked(server, path="/", method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer, answer.read().decode()
    finally:
        connection.close()


@pytest.fixture
def runs(tmp_path):
    for name in ("softmax", "ssr-l"):
        lines = [train_line(step, load=[[*range(16)], [1] * 16]) for step in range(10, 60, 10)]
        make_run(tmp_path / "runs" / name, name=name, lines=lines)
    return tmp_path / "runs"


def test_the_page_shows_curves_loads_and_what_comes_later(runs):
    with served(runs) as server:
        answer, page = asked(server)
        assert answer.status == 200 and page.count("<polyline") == 6
        assert "layer 0, expert 15: 2.00 of a fair share" in page
        make_run(runs / "later", name="ssr-s", lines=[train_line(10, loss=1.2345)])
        server.follower._looked = 0.0  # new runs are looked for every two seconds
        _, now = asked(server, "/now")
        assert "later" in now and "1.2345" in now and "<html" not in now


def test_it_listens_on_the_loopback_address_alone(runs):
    with served(runs) as server:
        assert server.socket.getsockname()[0] == "127.0.0.1"
        with socket.socket() as other:
            other.settimeout(2)
            assert other.connect_ex(("127.0.0.2", server.server_port)) != 0


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:PORT", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil:PORT", ""]
)
def test_another_name_for_this_machine_is_refused(runs, host):
    with served(runs) as server:
        answer, said = asked(server, Host=host.replace("PORT", str(server.server_port)))
        assert answer.status == 403 and "softmax" not in said
        assert asked(server, Host=f"LOCALHOST:{server.server_port}")[0].status == 200


def test_another_site_and_another_method_are_refused(runs):
    with served(runs) as server:
        assert asked(server, **{"Sec-Fetch-Site": "cross-site"})[0].status == 403
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            answer, _ = asked(server, method=method)
            assert (answer.status, answer.headers["Allow"]) == (405, "GET")
        assert [asked(server, path)[0].status for path in ("/../pyproject.toml", "/now/", "/?x")] == [404] * 3


def test_what_stands_in_logs_and_names_is_escaped_and_no_script_but_the_pages_may_run(tmp_path):
    evil = "<script>alert(1)</script>"
    run = make_run(tmp_path / "runs" / '"><img src=x onerror=alert(1)>', name=evil, lines=[train_line(1)])
    (run / "failed.json").write_text('{"message": "<script>alert(2)</script>"}')
    log = {"step": 1, "mode": "train", "layers": {evil: {"load": [1, 2], "max_vio": 0.5, "passes": 1}}}
    (tmp_path / "load.jsonl").write_text(json.dumps(log) + "\n")
    with served(tmp_path / "runs", tmp_path / "load.jsonl") as server:
        answer, page = asked(server)
    assert "<script>alert" not in page and "<img" not in page
    assert "&lt;script&gt;alert(1)" in page
    policy = answer.headers["Content-Security-Policy"]
    (nonce,) = re.findall(r"script-src 'nonce-([^']+)'", policy)
    assert re.findall(r"<script[^>]*>", page) == [f'<script nonce="{nonce}">']
    assert "default-src 'none'" in policy and answer.headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_asks_the_network_for_nothing(runs):
    with served(runs) as server:
        _, page = asked(server)
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?!#)|url\(|@import|https?://", page.replace('href="#', ""))


def test_a_port_that_is_taken_is_told_unless_any_will_do(runs):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} cannot be had .*; give another, or none"):
            make_server(Follower([runs]), port)
        with make_server(Follower([runs]), port, or_any=True) as server:
            assert server.server_port != port


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_the_page_is_whole_on_every_screen_and_follows(runs):
    with served(runs) as server, browser() as window:
        address = f"http://127.0.0.1:{server.server_port}/"
        for width in (400, 1400):
            for dark in (False, True):
                window.open(address, width=width, dark=dark)
                assert window.faults() == "", (width, dark)
        assert window.run("return document.querySelectorAll('polyline').length") == 6
        with (runs / "softmax" / "log.jsonl").open("a") as file:
            file.write(train_line(77, loss=0.7654))
        for _ in range(100):
            window.settled()
            if "0.7654" in window.run("return document.body.innerText"):
                break
        assert "77/100" in window.run("return document.body.innerText")
        assert window.errors() == []
