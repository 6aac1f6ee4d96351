"""Asking a process from outside by the dashboard: over HTTP and, where there is one, in a browser."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, browsing
from outside import PROGRAM, Outside
from running import line, until
from watching import Dashboard

MIB = 1 << 20


@pytest.fixture(scope="module")
def dashboard(outside: Outside) -> Iterator[Dashboard]:
    with Dashboard(outside.command, outside.environment) as dashboard:
        until("somebody was seen", lambda: bool(dashboard.view()["view"]["processes"]))
        yield dashboard


def test_figures_need_the_token_and_the_page_does_not(dashboard: Dashboard) -> None:
    status, page = dashboard.ask("")
    assert status == 200
    assert "<title>Sire</title>" in page
    assert dashboard.token not in page
    for path in ("api/view", "metrics"):
        for token in (None, "", "wrong", dashboard.token[:-1], dashboard.token + "0"):
            assert dashboard.ask(path, token=token)[0] == 401
        assert dashboard.ask(path, token=dashboard.token)[0] == 200
    assert "# TYPE sire_processes gauge\nsire_processes 1\n" in dashboard.ask("metrics", token=dashboard.token)[1]


def test_wrong_requests_get_their_status(outside: Outside, dashboard: Dashboard) -> None:
    token = dashboard.token
    assert dashboard.ask("nothing", token=token)[0] == 404
    assert dashboard.ask("../../etc/passwd", token=token)[0] == 404
    assert dashboard.ask("api/order", token=token)[0] == 405
    assert dashboard.ask("api/view", order={}, token=token)[0] == 405
    # A page elsewhere whose name points here.
    assert dashboard.ask("api/view", token=token, host="evil.example")[0] == 421
    pid = int(outside.pid)
    assert dashboard.ask("api/order", order={"pid": pid, "verb": "pause"})[0] == 401
    for order in ({"pid": pid, "verb": "exec"}, {"pid": pid, "verb": "pause", "path": "x"}, {"verb": "pause"}, b"{", b"", {"pid": 1, "verb": "pause"}):
        assert dashboard.ask("api/order", order=order, token=token)[0] == 400, order
    assert dashboard.ask("api/order", order=b"x" * 5000, token=token)[0] == 413
    assert dashboard.ask("api/order", order={"pid": pid, "verb": "resume"}, token=token)[0] == 409


def test_clients_that_only_hold_their_connections_keep_nobody_out(dashboard: Dashboard) -> None:
    where = urllib.parse.urlsplit(dashboard.address)
    announced = (1 << 20, 1 << 40, 1 << 50, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)
    beginnings = [f"POST /api/order HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: {length}\r\n\r\n" for length in announced]
    beginnings += ["", "GET", f"GET / HTTP/1.1\r\nHost: {where.netloc}\r\n", "\r\n" * 40]
    with contextlib.ExitStack() as crowd:
        for beginning in beginnings * 4:
            client = crowd.enter_context(socket.create_connection((where.hostname, where.port), timeout=30))
            client.sendall(beginning.encode())
        for _ in range(8):
            assert dashboard.ask("api/view", token=dashboard.token)[0] == 200
        assert dashboard.process.poll() is None


def rest_of(client: socket.socket) -> bytes:
    """What it is told until the other end closes."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(1 << 12):
            said += piece
    return said


def test_connections_are_few_and_who_only_holds_one_makes_way(dashboard: Dashboard) -> None:
    where = urllib.parse.urlsplit(dashboard.address)
    with contextlib.ExitStack() as crowd:
        clients = []
        for _ in range(300):
            clients.append(crowd.enter_context(socket.create_connection((where.hostname, where.port), timeout=120)))
            clients[-1].sendall(b"GET / HT")
        assert dashboard.ask("api/view", token=dashboard.token)[0] == 200
        # Twice as many as there are places, and what the program needs itself; soon as many as places.
        assert len(os.listdir(f"/proc/{dashboard.process.pid}/fd")) < 2 * 64 + 50
        until("who made way is away", lambda: len(os.listdir(f"/proc/{dashboard.process.pid}/fd")) < 64 + 50)
        assert rest_of(clients[0]) == b""


def test_a_request_has_its_time(dashboard: Dashboard) -> None:
    where = urllib.parse.urlsplit(dashboard.address)
    head = f"POST /api/order HTTP/1.1\r\nHost: {where.netloc}\r\nAuthorization: Bearer {dashboard.token}\r\n"
    slow = {"nothing": "", "half a head": head, "half a body": head + 'Content-Length: 40\r\n\r\n{"pid": '}
    with contextlib.ExitStack() as crowd:
        clients = {what: crowd.enter_context(socket.create_connection((where.hostname, where.port), timeout=120)) for what in slow}
        for what, client in clients.items():
            client.sendall(slow[what].encode())
        for what, client in clients.items():
            said = rest_of(client)
            assert (b" 408 " in said) == (what == "half a body"), (what, said)
    # An answer, and the connection may ask again.
    with socket.create_connection((where.hostname, where.port), timeout=120) as client:
        for _ in range(2):
            client.sendall(f"GET / HTTP/1.1\r\nHost: {where.netloc}\r\n\r\n".encode())
            assert client.recv(12) == b"HTTP/1.1 200"
            said = b""
            while b"</html>" not in said:
                piece = client.recv(1 << 16)
                assert piece, said[-200:]
                said += piece


def test_a_client_that_asks_twice_and_goes_away_ends_nothing(dashboard: Dashboard) -> None:
    """The second answer meets a connection that is closed; the signal that Unix has for that ended the page for everybody."""
    where = urllib.parse.urlsplit(dashboard.address)
    asked = f"GET / HTTP/1.1\r\nHost: {where.netloc}\r\n\r\n".encode()
    for _ in range(50):
        with socket.create_connection((where.hostname, where.port), timeout=120) as client:
            client.sendall(asked * 2)
    assert dashboard.ask("")[0] == 200
    assert dashboard.process.poll() is None


def test_an_order_pauses_and_the_timeline_shows_it(outside: Outside, dashboard: Dashboard) -> None:
    name = f"{outside.pid} model/weights"
    order = {"pid": int(outside.pid), "verb": "pause", "tag": "model/weights"}
    status, body = dashboard.ask("api/order", order=order, token=dashboard.token)
    assert status == 200, body
    moments: list[dict[str, Any]] = []

    def shows_it() -> bool:
        moments[:] = dashboard.view()["history"]
        return name not in moments[-1]["tags"] and moments[-1]["tiers"].get("host") == 32 * MIB

    until("the pause is in the timeline", shows_it)
    assert any(moment["tags"].get(name) == 32 * MIB for moment in moments)
    assert dashboard.ask("api/order", order={**order, "verb": "resume"}, token=dashboard.token)[0] == 200
    newer = json.loads(dashboard.ask(f"api/view?since={moments[-1]['time']}", token=dashboard.token)[1])["history"]
    assert all(moment["time"] > moments[-1]["time"] for moment in newer)


def test_a_token_of_ones_own_must_be_private(outside: Outside, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("a" * 40)
    file.chmod(0o644)
    for why in ("others can read", "is no token"):
        refused = outside.run("dashboard", "--listen", "127.0.0.1:0", "--token-file", str(file))
        assert refused.returncode == 1
        assert why in refused.stderr
        file.chmod(0o600)
        file.write_text("short")


def test_a_public_view_shows_and_does_nothing(outside: Outside) -> None:
    with Dashboard(outside.command, outside.environment, "--public-view") as dashboard:
        assert dashboard.ask("api/view")[0] == 200
        assert dashboard.ask("metrics")[0] == 200
        assert dashboard.ask("api/order", order={"pid": int(outside.pid), "verb": "pause"})[0] == 401


def test_an_order_goes_to_the_socket_that_greets(outside: Outside, dashboard: Dashboard) -> None:
    """In a directory that containers share, several sockets may have one number; here the first of them hangs up on everybody."""
    [own] = Path(outside.environment["XDG_RUNTIME_DIR"], "sire").glob(f"{outside.pid}*.sock")
    other = own.with_name(f"{outside.pid}-1.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(other))
        listener.listen()

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    listener.accept()[0].close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        try:
            order = {"pid": int(outside.pid), "verb": "evict"}
            status, body = dashboard.ask("api/order", order=order, token=dashboard.token)
            assert status == 200, body
        finally:
            other.unlink(missing_ok=True)
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(60)


# --- the page in a browser ---------------------------------------------------------------------------------------------------------


def region_of(outside: Outside, tag: str) -> str:
    """The state of a tag's region, as `sire ps` has it."""
    [process] = outside.view()["processes"]
    [state] = [region["state"] for region in process["stats"]["regions"] if region["tag"] == tag]
    return str(state)


def pill(tag: str) -> str:
    """JavaScript: the state that the page shows beside a tag."""
    row = f"[...document.querySelectorAll('.tag')].find(each => each.querySelector('.name')?.textContent === {json.dumps(tag)})"
    return f"{row}?.querySelector('.pill').textContent"


def says(page: Page, text: str) -> None:
    page.until(f"document.getElementById('said').textContent.includes({json.dumps(text)})")


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_shows_and_does_in_a_browser(outside: Outside, dashboard: Dashboard, tmp_path: Path, width: int) -> None:
    tag, pid = "model/weights", outside.pid
    with browsing(dashboard.address, width, tmp_path) as page:
        page.shows("1 process", f"{pid} ", tag, "scratch <b>x</b>", "of 256 MiB")
        page.until("document.querySelector('polygon') !== null")
        # The name of a tag is text, whatever it holds.
        assert "scratch &lt;b&gt;x&lt;/b&gt;" in page.html()
        assert "<b>x</b>" not in page.html()
        assert page.too_wide() == []
        assert page.value(pill(tag)) == "resident"
        page.press(f"pause {tag}, process {pid}")
        says(page, f"process {pid}: pause {tag}, done")
        page.until(f"{pill(tag)} === 'paused'")
        page.shows("held")
        assert region_of(outside, tag) == "paused"
        assert region_of(outside, "scratch <b>x</b>") == "resident"
        assert page.too_wide() == []
        page.press(f"resume {tag}, process {pid}")
        says(page, f"process {pid}: resume {tag}, done")
        page.until(f"{pill(tag)} === 'resident'")
        assert region_of(outside, tag) == "resident"
        # What is refused is said, too.
        page.press(f"resume, process {pid}")
        says(page, f"process {pid}: nothing was paused from outside")


def test_a_finger_that_scrolls_does_not_stop_the_page(outside: Outside, dashboard: Dashboard, tmp_path: Path) -> None:
    """The page is not painted anew under a finger. One that scrolls is not lifted, as far as the page hears: the browser takes it over."""
    with browsing(dashboard.address, 390, tmp_path) as page:
        page.shows("model/weights")
        page.until("document.documentElement.scrollHeight > innerHeight + 200")
        page.scroll(100)
        assert outside.run("pause", outside.pid).returncode == 0
        try:
            page.until(f"{pill('model/weights')} === 'paused'")
        finally:
            assert outside.run("resume", outside.pid).returncode == 0


LONG = "layers_" + 90 * "x"
LONG_NAMES = PROGRAM.replace("model/weights", f"model/{LONG}")


@pytest.mark.parametrize("width", [320, 1280])
def test_names_of_any_length_fit(command: Path, library: Path, stand_in: Path, tmp_path: Path, width: int) -> None:
    tmp_path.chmod(0o700)
    outside = Outside(command, library, stand_in, tmp_path, LONG_NAMES)
    try:
        assert line(outside.process) == "ready"
        with Dashboard(command, outside.environment) as dashboard, browsing(dashboard.address, width, tmp_path) as page:
            page.until(f"{pill(f'model/{LONG}')} === 'resident'")
            assert page.too_wide() == []
            page.press(f"pause model/{LONG}, process {outside.pid}")
            says(page, "done")
            page.until("document.getElementById('events').innerText.includes('x'.repeat(90))")
            assert page.too_wide() == []
    finally:
        outside.close()
