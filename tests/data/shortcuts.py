"""Short forms of two things that many tests of data do."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from fedpeft.config.load import load_config
from fedpeft.config.schema import Config


@cache
def composed(*overrides: str) -> Config:
    """Compose a configuration once.

    Replace its ``data`` before use, because a task keeps the rows that it has read.
    """
    return load_config(overrides)


def error_of(call: Callable[[], Any]) -> str:
    """Return the text of the ValueError that a call raises."""
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)
