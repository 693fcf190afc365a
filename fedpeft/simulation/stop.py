"""A run ends by SIGTERM, as services and batch systems send it, as it does by Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def stop_on_sigterm() -> None:
    """Raise ``Terminated`` in the main thread when SIGTERM comes."""
    signal.signal(signal.SIGTERM, _raise)


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Put back the handler of SIGTERM that a library replaces; only the main thread has one."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated
