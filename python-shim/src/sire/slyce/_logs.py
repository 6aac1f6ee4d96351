"""The log of one model: to a file, to the console, or both."""

from __future__ import annotations

import itertools
import logging
import os
import weakref
from pathlib import Path
from typing import Any

from .._errors import InvalidArgumentError

_numbers = itertools.count(1)
_FORM = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def logger_for(owner: Any, file: str | os.PathLike[str] | None, console: bool, level: int | str) -> logging.Logger:
    """A logger of its own under ``sire.slyce``, whose handlers close when ``owner`` goes."""
    logger = logging.getLogger(f"sire.slyce.{next(_numbers)}")
    try:
        logger.setLevel(level)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"log_level is a level of Python's logging such as 'INFO', not {level!r}") from error
    logger.propagate = not (console or file is not None)
    handlers: list[logging.Handler] = [logging.StreamHandler()] if console else []
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file, delay=True))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORM))
        logger.addHandler(handler)
    weakref.finalize(owner, _close, logger).atexit = False
    return logger


def _close(logger: logging.Logger) -> None:
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
