"""Another process's side of the control socket, spoken by hand: one JSON object per line."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

from sire import _library


class RefusedError(Exception):
    """An error reply; `code` is its class."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.code = error["code"]


def ask(path: str, **request: Any) -> dict[str, Any]:
    """One request on a connection of its own."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(path)
        connection.sendall(json.dumps({"id": 7, **request}).encode() + b"\n")
        with connection.makefile("rb") as replies:
            reply = json.loads(replies.readline())
    if "error" in reply:
        raise RefusedError(reply["error"])
    assert reply["id"] == 7
    answer: dict[str, Any] = reply["ok"]
    return answer


class Visitor:
    """A thread that asks while this one goes on; its failure is raised by `join`."""

    def __init__(self, visit: Callable[[], Any]) -> None:
        self.result: Any = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(visit,))
        self._thread.start()

    def _run(self, visit: Callable[[], Any]) -> None:
        try:
            self.result = visit()
        except BaseException as error:
            self._failure = error
            # A program that stays paused would wait for ever.
            _library.load().control_give_up()

    @property
    def here(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> Any:
        self._thread.join(60)
        assert not self._thread.is_alive(), "nobody answered"
        if self._failure is not None:
            raise self._failure
        return self.result
