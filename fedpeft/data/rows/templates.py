"""Prompts from Jinja templates over a row's columns, and their tokens."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import StrictUndefined, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fedpeft.data.rows.conversations import Conversation
from fedpeft.data.rows.tables import values
from fedpeft.errors import PartlyPublic, named_row

if TYPE_CHECKING:
    from datasets import Dataset
    from jinja2 import Template


def template_columns(text: str) -> list[str]:
    """Return the columns that a template reads, sorted.

    Raises:
        ValueError: the text is no Jinja template.
    """
    try:
        return sorted(meta.find_undeclared_variables(_environment().parse(text)))
    except TemplateSyntaxError as error:
        raise ValueError(f"{text!r} is no Jinja template: {error.message}") from error


def rendered(text: str, rows: "Dataset", **more: Sequence[Any]) -> list[str]:
    """Return a template's text for every row; a null becomes an empty text.

    Args:
        text: the Jinja template.
        rows: (rows,), with the template's columns.
        more: further columns (rows,) by name; they win over columns of ``rows``.

    Raises:
        ValueError: the template fails in a row.
    """
    names = [name for name in template_columns(text) if name not in more]
    columns = {name: values(rows, name) for name in names} | {k: list(v) for k, v in more.items()}
    template, texts = _template(text), []
    for i in range(len(rows)):
        try:
            texts.append(template.render({name: column[i] for name, column in columns.items()}))
        except Exception as error:  # filters of a template may raise anything
            raise _failing(f"the template {text!r}", i, error) from error
    return texts


def _failing(template: str, row: int, error: Exception, advice: str = "") -> PartlyPublic:
    kind = type(error).__name__
    return PartlyPublic(f"{template} fails in {named_row(row)} with {kind}{advice}", f": {error}")


def check_prompt(prompt: str) -> None:
    """Check that a prompt differs by row.

    Raises:
        ValueError: the text is no Jinja template, or uses no column.
    """
    if not template_columns(prompt):
        name = prompt if prompt.isidentifier() else "column"
        form = "{{ " + name + " }}"
        raise ValueError(
            f"data.prompt={prompt} uses no column, so all prompts would be the same: give "
            f"\"data.prompt='{form}'\""
        )


@lru_cache(maxsize=1)
def _environment() -> Any:
    # Sandboxed, because a client gets its templates from the server, with the configuration.
    return ImmutableSandboxedEnvironment(
        undefined=StrictUndefined,
        finalize=_printed,
        keep_trailing_newline=True,
    )


def _printed(value: Any) -> Any:
    """Return a value as a template prints it; a null is the empty text.

    Raises:
        TypeError: the value is a list or nested, so that Python's notation would be printed.
    """
    if isinstance(value, list | dict):
        raise TypeError("it prints a list or a nested value: join it, or name a text in it")
    return "" if value is None else value


@lru_cache(maxsize=16)
def _template(text: str) -> "Template":
    return _environment().from_string(text)


def chat_prompts(conversations: Sequence[Conversation], tokenizer: Any) -> list[str]:
    """Return each conversation in the model's chat template, up to the answer.

    Raises:
        ValueError: the template fails in a row.
    """
    prompts = []
    for i, messages in enumerate(conversations):
        try:
            prompts.append(
                tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            )
        except Exception as error:  # a template may raise anything
            advice = " (model.chat_template sets another)"
            raise _failing("the tokenizer's chat template", i, error, advice) from error
    return prompts


def prompt_tokens(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return token ids with the tokenizer's beginning token once and without its end token."""
    start, end = tokenizer.bos_token, tokenizer.eos_token_id
    plain = [text.removeprefix(start) if start else text for text in texts]
    tokens = tokenizer(plain)["input_ids"]
    # If the tokenizer adds no beginning token, one that the template writes stays.
    if start and tokens and tokens[0][:1] != [tokenizer.bos_token_id]:
        tokens = tokenizer(list(texts))["input_ids"]
    return [ids[:-1] if ids and ids[-1] == end else ids for ids in tokens]


def keep_ends(ids: list[int], room: int) -> list[int]:
    """Cut the middle of a prompt that is longer than ``room`` tokens.

    Its ends stay, because the template's frame and the question stand there.
    """
    if len(ids) <= room:
        return ids
    head = room // 2
    return ids[:head] + ids[len(ids) - (room - head) :]
