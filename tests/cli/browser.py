"""A page in a real browser: chromium without a screen, which is told what to do, and asked what it shows, through its DevTools protocol.

That is JSON objects, each with a zero byte behind it: orders go to descriptor 3 of the browser, answers and events come from its descriptor 4.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from running import running, until

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
HEIGHT = 900
# Narrower windows are phones: a finger instead of a mouse, and no room for bars that scroll.
PHONE = 600
# Only the shell can give a program descriptors of a certain number.
WITH_PIPES = 'orders=$1; answers=$2; shift 2; exec "$@" 3<"/proc/self/fd/$orders" 4>"/proc/self/fd/$answers"'


class Page:
    """What is in the window."""

    def __init__(self, orders: FileIO, answers: FileIO, width: int) -> None:
        self._orders, self._answers, self.width = orders, answers, width
        self._number, self._session, self._heard = 0, "", b""
        self._early: dict[int, dict[str, Any]] = {}
        self._loaded = False
        self.thrown: list[str] = []
        """What the page's own program has raised and not caught."""

    def open(self, address: str) -> None:
        """Goes there, in a window of its own."""
        is_phone = self.width < PHONE
        window = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=window, flatten=True)["sessionId"]
        self.tell("Runtime.enable")
        self.tell("Page.enable")
        self._is_high(HEIGHT)
        self.tell("Emulation.setTouchEmulationEnabled", enabled=is_phone)
        self._loaded = False
        self.tell("Page.navigate", url=address)
        while not self._loaded:
            self._next()

    def _is_high(self, height: float) -> None:
        """From now on the window is."""
        self.tell("Emulation.setDeviceMetricsOverride", width=self.width, height=int(height), deviceScaleFactor=1, mobile=self.width < PHONE)

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to an order."""
        return self._answer(self._send(method, parameters))

    def _send(self, method: str, parameters: dict[str, Any]) -> int:
        """The number of the order."""
        self._number += 1
        order = {"id": self._number, "method": method, "params": parameters, **({"sessionId": self._session} if self._session else {})}
        said = memoryview(json.dumps(order).encode() + b"\0")
        while said:
            said = said[self._orders.write(said) :]
        return self._number

    def _answer(self, number: int) -> dict[str, Any]:
        while number not in self._early:
            message = self._next()
            if "id" in message:
                self._early[message["id"]] = message
        answer = self._early.pop(number)
        assert "error" not in answer, answer["error"]
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._heard:
            piece = self._answers.read(1 << 16)
            assert piece, "the browser has ended"
            self._heard += piece
        message, _, self._heard = self._heard.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        if found.get("method") == "Page.loadEventFired":
            self._loaded = True
        elif found.get("method") == "Runtime.exceptionThrown":
            self.thrown.append(str(found["params"]["exceptionDetails"]))
        return found

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript is on the page."""
        found = self.tell("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def text(self) -> str:
        """What a person reads of it."""
        return str(self.value("document.body.innerText"))

    def html(self) -> str:
        """All of it, as it is now."""
        return str(self.value("document.documentElement.outerHTML"))

    def until(self, expression: str) -> None:
        """Waits until that is true on the page."""
        try:
            until(expression, lambda: bool(self.value(expression)))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()}") from None

    def shows(self, *texts: str) -> None:
        """Waits until a person reads all of them."""
        self.until(f"{json.dumps(texts)}.every(text => document.body.innerText.includes(text))")

    def press(self, label: str) -> None:
        """A click, or a tap, on the button that is called so."""
        button = f"[...document.querySelectorAll('button')].find(each => each.getAttribute('aria-label') === {json.dumps(label)})"

        def middle() -> dict[str, float] | None:
            # The page is not painted anew while something is pressed: until then the button may go elsewhere.
            self.value(f"pressed = true; {button}?.scrollIntoView({{ block: 'center', behavior: 'instant' }})")
            box = self.value(f"{button}?.getBoundingClientRect().toJSON()")
            at = box and {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
            if at and self.value(f"document.elementFromPoint({at['x']}, {at['y']}) === {button}"):
                return at
            self.value("pressed = false")
            return None

        def pressed() -> bool:
            self.until(f"{button}?.disabled === false")
            at = middle()
            if at:
                self._tap(at)
            return at is not None

        until(f"'{label}' is pressed", pressed)

    def _tap(self, at: dict[str, float]) -> None:
        """With a finger, or the mouse. The second order is there before the first is carried out: a finger that stays for long would mean something else."""
        orders: list[dict[str, Any]]
        if self.width < PHONE:
            method, orders = "Input.dispatchTouchEvent", [{"type": "touchStart", "touchPoints": [at]}, {"type": "touchEnd", "touchPoints": []}]
        else:
            kinds = ("mousePressed", "mouseReleased")
            method, orders = "Input.dispatchMouseEvent", [{"type": kind, "button": "left", "clickCount": 1, **at} for kind in kinds]
        for number in [self._send(method, order) for order in orders]:
            self._answer(number)

    def scroll(self, by: int) -> None:
        """With a finger, so far down the page at least."""
        from_here, middle = HEIGHT / 2, self.width / 2
        self.tell("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": middle, "y": from_here}])
        for way in range(0, by + 40, 10):
            self.tell("Input.dispatchTouchEvent", type="touchMove", touchPoints=[{"x": middle, "y": from_here - way}])
        self.tell("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.until(f"scrollY >= {by}")

    def too_wide(self) -> list[str]:
        """What is beyond the window's edges, or wider than what it is in. A phone makes a page that is too wide smaller than it can be read."""
        return list(
            self.value(
                f"""[...document.querySelectorAll("*")].filter(each => {{
                    const box = each.getBoundingClientRect();
                    return box.left < -1 || box.right > {self.width} + 1 || each.scrollWidth > Math.max(each.clientWidth, box.width) + 1;
                }}).map(each => each.outerHTML.slice(0, 300))
                .concat(innerWidth === {self.width} && visualViewport.scale === 1 ? [] : [`the window is ${{innerWidth}} wide`])"""
            )
        )

    def picture(self, file: Path) -> None:
        """All of the page, as in a window that is high enough for it."""
        self._is_high(self.tell("Page.getLayoutMetrics")["cssContentSize"]["height"])
        file.write_bytes(base64.b64decode(self.tell("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browsing(address: str, width: int, folder: Path) -> Iterator[Page]:
    """A page in a window of that width. With SIRE_TEST_SCREENSHOTS, a directory, what it shows in the end becomes a picture there."""
    browser = os.environ.get("SIRE_TEST_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no chromium on this machine (apt-get install chromium), nor one in SIRE_TEST_BROWSER")
    command = [browser, "--headless", "--disable-gpu", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe"]
    command += [f"--user-data-dir={folder / f'profile-{width}'}", f"--window-size={max(width, PHONE)},{HEIGHT}"]
    with contextlib.ExitStack() as stack:
        (its_orders, orders), (answers, its_answers) = pipe(), pipe()
        for end in (its_orders, orders, answers, its_answers):
            stack.enter_context(end)
        said = stack.enter_context((folder / f"browser-{width}.txt").open("w"))
        its = (its_orders.fileno(), its_answers.fileno())
        stack.enter_context(running(["sh", "-c", WITH_PIPES, "sh", *map(str, its), *command], pass_fds=its, stdout=said, stderr=said))
        its_orders.close()
        its_answers.close()
        page = Page(orders, answers, width)
        page.open(address)
        yield page
        pictures = os.environ.get("SIRE_TEST_SCREENSHOTS")
        if pictures:
            page.picture(Path(pictures) / f"{folder.name}-{width}.png")
        assert page.thrown == []


def pipe() -> tuple[FileIO, FileIO]:
    """Both ends, with numbers that the browser gives to nothing of its own."""
    reader, writer = os.pipe()
    with FileIO(reader, "rb") as low_reader, FileIO(writer, "wb") as low_writer:
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (low_reader, low_writer)]
    return FileIO(ends[0], "rb"), FileIO(ends[1], "wb")
