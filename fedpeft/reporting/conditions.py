"""Conditions on the columns of a table, such as ``method=lora`` or ``lr<0.01``."""

import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import yaml

from fedpeft.config.sentences import meaning

_FORM = re.compile(r"([\w./-]+)(<=|>=|!=|=|<|>)(.*)")
_ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Condition:
    """A column, a sign and a value.

    Args:
        column: the column's name.
        sign: ``=``, ``!=``, ``<``, ``<=``, ``>`` or ``>=``.
        value: text of the value to compare with; upper and lower case are equal.
    """

    column: str
    sign: str
    value: str

    @classmethod
    def of(cls, text: str) -> "Condition":
        """Parse a condition.

        Raises:
            ValueError: the text has no sign, or compares the order of what is no number.
        """
        if (match := _FORM.fullmatch(text)) is None:
            raise ValueError(
                f"--where takes conditions such as method=lora or 'lr<0.01', got {text}"
            )
        condition = cls(*match.groups())
        if condition.sign in _ORDERS and not _is_number(condition._parsed()):
            raise ValueError(f"{text}: {condition.sign} compares numbers")
        return condition

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Tell whether a row meets the condition; a row without the column only meets ``!=``."""
        if self.sign in _ORDERS:
            value = row.get(self.column)
            return _is_number(value) and _ORDERS[self.sign](value, self._parsed())
        equal = self.column in row and self._equals(row[self.column])
        return equal == (self.sign == "=")

    def _equals(self, value: Any) -> bool:
        if _is_number(value):
            return value == self._parsed()
        return value == self._parsed() or str(value).lower() == self.value.lower()

    def _parsed(self) -> Any:
        """Return the value as YAML has it, but 1e-3 as a number."""
        try:
            return float(self.value)
        except ValueError:
            pass
        try:
            return yaml.safe_load(self.value)
        except yaml.YAMLError:  # such as a comma
            return self.value


def check_known(name: str, known: Collection[str]) -> None:
    """Check the name of a column.

    Raises:
        ValueError: there is no such column.
    """
    if name not in known:
        close = get_close_matches(name, known, 1)
        inner = [key for key in known if key.endswith(f".{name}")]
        raise ValueError(f"no run has a column {name}{meaning(inner or close)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
