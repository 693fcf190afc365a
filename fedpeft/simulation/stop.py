"""A run ends by SIGTERM, as services and batch systems send it, as it does by Ctrl-C."""

import signal
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def stop_on_sigterm() -> None:
    """Raise ``Terminated`` in the main thread when SIGTERM comes."""
    signal.signal(signal.SIGTERM, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated
