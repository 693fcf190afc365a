"""Whoever runs fedpeft keeps their own handler of SIGTERM."""

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fedpeft.simulation.stop import Terminated, sigterm_kept, stop_on_sigterm


@pytest.fixture(autouse=True)
def handler() -> Iterator[Any]:
    before = signal.getsignal(signal.SIGTERM)
    yield before
    signal.signal(signal.SIGTERM, before)


def test_sigterm_ends_as_ctrl_c_does() -> None:
    stop_on_sigterm()
    with pytest.raises(KeyboardInterrupt) as stopped:
        signal.raise_signal(signal.SIGTERM)
    assert isinstance(stopped.value, Terminated)


def test_a_library_s_handler_goes_again() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with sigterm_kept():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_a_library_s_handler_goes_again_after_an_error() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with pytest.raises(RuntimeError), sigterm_kept():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_another_thread_sets_nothing() -> None:
    """Python lets only the main thread set a handler."""
    errors: list[Exception] = []

    def work() -> None:
        try:
            with sigterm_kept():
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
