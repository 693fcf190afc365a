"""The keys of a configuration's dataclass: type, default, rule and meaning, read from the code."""

import re
import types
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, fields, replace
from inspect import getdoc
from typing import Any, Union, get_args, get_origin, get_type_hints

# Values that a field may refuse with a sentence that says its rule.
_PROBES: dict[type, tuple[Any, ...]] = {
    str: ("?",),
    int: (-1, 0, 10**9),
    float: (-1.0, 0.0, 2.0),
    list: ([],),
}
_NEXT = re.compile(r"(?:, | and )(?=[\w.]+ (?:>=|>|<=|in) ).*", re.DOTALL)
_ARGUMENT = re.compile(r"^(\w+): (.*(?:\n\s+.*)*)", re.MULTILINE)


@dataclass(frozen=True)
class Key:
    """One key.

    Args:
        name: the key's name, without the group.
        type: the key's type in words, such as ``int or null``.
        default: the default as it is written on the command line; empty if the key must be set.
        rule: values that are allowed, if the code refuses others when it reads them.
        meaning: text on the key in its class's docstring; empty if there is none.
    """

    name: str
    type: str
    default: str
    rule: str
    meaning: str


def keys_of(cls: type, values: Mapping[str, Any], leave: frozenset[str] = frozenset()) -> list[Key]:
    """Return the keys of a dataclass, in its order.

    Args:
        cls: dataclass of a group or of nested settings.
        values: defaults of the YAML, which win over the class's.
        leave: names to leave out.
    """
    meanings, hints = arguments(cls), get_type_hints(cls)
    return [
        Key(
            field.name,
            in_words(hints[field.name]),
            written(values.get(field.name, _default(field))),
            "; ".join(_rules(cls, values, field.name, hints[field.name])),
            meanings.get(field.name, ""),
        )
        for field in fields(cls)
        if field.name not in leave
    ]


def arguments(cls: type) -> dict[str, str]:
    """Return the texts of the ``Args`` in the docstrings of a class and its bases, by name."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = (getdoc(base) or "").partition("Args:\n")[2]
        lines = re.sub(r"^    ", "", section, flags=re.MULTILINE)
        if base.__doc__ and base is not object:
            found |= {name: " ".join(text.split()) for name, text in _ARGUMENT.findall(lines)}
    return found


def summary(cls: type) -> str:
    """Return the first paragraph of a class's docstring."""
    return " ".join((getdoc(cls) or "").partition("\n\n")[0].split())


def in_words(hint: Any) -> str:
    """Return a type as the page names it, such as ``int or null``."""
    if hint is Any:
        return "any"
    if hint is type(None):
        return "null"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(in_words, get_args(hint)))
    if get_origin(hint) is list:
        return f"list of {in_words(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return f"{in_words(get_args(hint)[1])} by name"
    return getattr(hint, "__name__", str(hint))


def written(value: Any) -> str:
    """Return a value as the command line takes it."""
    if value is MISSING:
        return ""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{written(v)}" for k, v in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value).replace("\n", "\\n")


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _rules(cls: type, values: Mapping[str, Any], name: str, hint: Any) -> Iterator[str]:
    """Yield the rules in the sentences with which a class refuses wrong values of a field."""
    kinds = [get_origin(kind) or kind for kind in (*get_args(hint), hint)]
    known = {f.name for f in fields(cls)}
    constant = {k: v for k, v in values.items() if k in known and "${" not in str(v)}
    seen: set[str] = set()
    for probe in (p for kind in kinds if isinstance(kind, type) for p in _PROBES.get(kind, ())):
        with suppress(TypeError):  # a field of several types meets a probe of another one
            try:
                replace(cls(**constant), **{name: probe})
            except ValueError as error:
                rule = _rule(str(error), name)
                if rule and rule not in seen:
                    seen.add(rule)
                    yield rule


def _rule(sentence: str, name: str) -> str:
    """Return what a sentence such as ``method.rank must be >= 1, got 0`` says of a key."""
    found = re.search(
        rf"\b{name} (?:of \w+ )?(?:must (?:be|name|have) )?(.+)",
        re.split("[,;] got", sentence)[0],
    )
    if found is None or " must " not in sentence:
        return ""
    return _NEXT.sub("", found.group(1)).strip()
