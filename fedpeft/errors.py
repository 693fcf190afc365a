"""Errors, and the part of their text that may leave a client.

A server may be hostile, and Flower sends it the text of every error of a client. So this package's
sentences name rows, columns and kinds, never a value of a row or a part of one. A library's text
may quote a row, so it stays in the log of the client's node.
"""

from collections.abc import Iterator
from dis import opmap
from tempfile import NamedTemporaryFile
from traceback import format_exception
from types import TracebackType

MOST_CHARACTERS = 500
PACKAGE = __name__.partition(".")[0]


class PartlyPublic(ValueError):
    """An error whose text ends in a part that must not leave a client, such as a library's text.

    Args:
        public: the first part, a sentence without a value of a row.
        private: the rest.
    """

    def __init__(self, public: str, private: str = "") -> None:
        super().__init__(public + private)
        self.public = public


def named_row(position: int, split: str = "", line: int | None = None) -> str:
    """Return the words for a row in a message; people count rows and lines from 1.

    Args:
        position: the row's position in its split, from 0.
        split: name of the split; empty if the message says it elsewhere.
        line: the row's line in the split's file, from 1; null if it is not known.
    """
    of = f" of {split}" if split else ""
    return f"row {position + 1}{of} ({'counted from 1' if line is None else f'line {line}'})"


def public_text(error: Exception) -> str:
    """Return the text of an error that may leave this machine, cut to 500 characters.

    The text of an error that a ``raise`` of this package made may leave. Of any other error, such
    as a library's, only the type and the last place in this package leave.
    """
    if isinstance(error, PartlyPublic):
        text = f"{error.public} (this node's log says more)"
    elif str(error) and raised_here(error):
        text = str(error)
    else:
        text = f"{type(error).__name__}{_place(error)}; this node's log has the text"
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 3] + "..."


def explained(error: Exception) -> str:
    """Return an error's text; one that nobody wrote for a reader also names a file with its trace.

    The sentences that this package raises, and those of the operating system, say what to do.
    """
    if raised_here(error) or isinstance(error, OSError):
        return str(error)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    try:
        with NamedTemporaryFile("w", prefix="fedpeft-", suffix=".log", delete=False) as file:
            file.write("".join(format_exception(error)))
    except OSError:
        return f"{text} (FEDPEFT_TRACEBACK=1 shows where)"
    return f"{text} (the whole traceback is in {file.name})"


def raised_here(error: BaseException) -> bool:
    """Return true if a ``raise`` of this package made the error.

    The frame alone does not tell, because built-in functions such as ``int`` have no frame of their
    own and quote what they refuse.
    """
    steps = list(_steps(error.__traceback__))
    if not steps or not _is_ours(steps[-1]):
        return False
    code = steps[-1].tb_frame.f_code.co_code
    return code[steps[-1].tb_lasti] == opmap["RAISE_VARARGS"]


def _place(error: Exception) -> str:
    """Return the innermost place in this package: `` in fedpeft/state.py line 88``."""
    ours = [step for step in _steps(error.__traceback__) if _is_ours(step)]
    if not ours:
        return ""
    module = ours[-1].tb_frame.f_globals["__name__"].replace(".", "/")
    return f" in {module}.py line {ours[-1].tb_lineno}"


def _is_ours(step: TracebackType) -> bool:
    name = str(step.tb_frame.f_globals.get("__name__"))
    return name.partition(".")[0] == PACKAGE


def _steps(step: TracebackType | None) -> Iterator[TracebackType]:
    while step is not None:
        yield step
        step = step.tb_next
