"""Short forms of long paths and texts, for tables that must not spread."""

import os
import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import PurePath

MOST = 32  # characters of a cell, or of a value in a name
_PATH = re.compile(r"(~|\.{0,2}|\w[\w.-]*)/")  # begins one; https:// does not


def brief(values: Sequence[object], most: int = MOST) -> list[str]:
    """Return short forms of a column's values; different values have different forms.

    A path keeps its last parts, as many as tell it from the others. Another text is cut in the
    middle, because its ends tell more.

    Args:
        values: the values of one column.
        most: characters above which a value is shortened.
    """
    texts = [" ".join(str(value).split()) for value in values]
    if all(len(text) <= most for text in texts):
        return texts
    short = {text: _cut(form, most) for text, form in _last_parts(texts, most).items()}
    forms = [short[text] for text in texts]
    if len(set(forms)) == len(set(texts)):
        return forms
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts), 1)}
    return [
        f"{form} ({numbers[text]})" if _shared(form, short) else form
        for text, form in zip(texts, forms, strict=True)
    ]


def _shared(form: str, short: dict[str, str]) -> bool:
    """Tell whether several texts have the same short form."""
    return list(short.values()).count(form) > 1


def _last_parts(texts: Sequence[str], most: int) -> dict[str, str]:
    """Return each text; a long path is cut to its last parts."""
    forms = {text: text for text in texts}
    paths = {text: PurePath(text).parts for text in forms if _PATH.match(text)}
    for count in range(1, max(map(len, paths.values()), default=0)):
        ends = {text: parts[-count:] for text, parts in paths.items()}
        if len(set(ends.values())) == len(ends):
            same = _same_at_the_end(list(ends.values()))
            return forms | {t: _inside(e, same, most) for t, e in ends.items() if len(t) > most}
    return forms


def _same_at_the_end(ends: Sequence[Sequence[str]]) -> int:
    """Return the number of last parts that several paths share."""
    columns = zip(*(reversed(end) for end in ends), strict=False)
    return 0 if len(ends) < 2 else sum(1 for _ in takewhile(lambda c: len({*c}) == 1, columns))


def _inside(end: Sequence[str], same: int, most: int) -> str:
    """Return the last parts of a path; if they are long, without the parts that others share."""
    whole = f"…/{'/'.join(end)}"
    return whole if len(whole) <= most or not same else f"…/{'/'.join(end[:-same])}/…"


def _cut(text: str, most: int) -> str:
    """Return a text without its middle, if it has more than ``most`` characters."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def below(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Return the folder that holds all paths, and the paths inside it; no folder if none does."""
    parents = [os.path.dirname(path) for path in paths]
    try:
        folder = os.path.commonpath(parents)
    except ValueError:  # some are absolute, and others are not
        folder = ""
    if folder in ("", os.sep):
        return "", list(paths)
    return folder, [os.path.relpath(path, folder) for path in paths]
