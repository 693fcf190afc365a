"""Jinja templates over a row's columns, and the cut that keeps a prompt's both ends."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fedpeft.data.rows.tables import values

if TYPE_CHECKING:
    from datasets import Dataset
    from jinja2 import Template


def template_columns(text: str) -> list[str]:
    """Columns that a template reads, sorted.

    Raises:
        ValueError: it is no template.
    """
    from jinja2 import TemplateSyntaxError, meta

    try:
        return sorted(meta.find_undeclared_variables(_environment().parse(text)))
    except TemplateSyntaxError as error:
        raise ValueError(f"{text!r} is no Jinja template: {error.message}") from error


def rendered(text: str, rows: "Dataset", **more: Sequence[Any]) -> list[str]:
    """The template's text for every row, nothing for a null; ``more`` are further columns.

    Raises:
        ValueError: the template fails in a row.
    """
    names = [name for name in template_columns(text) if name not in more]
    columns = {name: values(rows, name) for name in names} | {k: list(v) for k, v in more.items()}
    template, found = _template(text), []
    for i in range(len(rows)):
        try:
            found.append(template.render({name: given[i] for name, given in columns.items()}))
        except Exception as error:  # whatever the template's own filters raise
            raise ValueError(f"the template {text!r} fails in row {i}: {error}") from error
    return found


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # Sandboxed: a client takes its configuration, and so its templates, from the server.
    return ImmutableSandboxedEnvironment(
        undefined=StrictUndefined,
        finalize=lambda value: "" if value is None else value,
        keep_trailing_newline=True,
    )


@lru_cache(maxsize=16)
def _template(text: str) -> "Template":
    return _environment().from_string(text)


def chat_prompts(texts: Sequence[str], tokenizer: Any) -> list[str]:
    """Each text as the user's message in the model's own template, up to where it answers."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        for text in texts
    ]


def prompt_tokens(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids with the tokenizer's own beginning, once, and without its end."""
    start, end = tokenizer.bos_token, tokenizer.eos_token_id
    plain = [text.removeprefix(start) if start else text for text in texts]
    found = tokenizer(plain)["input_ids"]
    # A template that writes the beginning itself keeps it where the tokenizer adds none.
    if start and found and found[0][:1] != [tokenizer.bos_token_id]:
        found = tokenizer(list(texts))["input_ids"]
    return [ids[:-1] if ids and ids[-1] == end else ids for ids in found]


def keep_ends(ids: list[int], room: int) -> list[int]:
    """At most ``room`` tokens: the middle goes, the template's frame and the question stay."""
    if len(ids) <= room:
        return ids
    head = room // 2
    return ids[:head] + ids[len(ids) - (room - head) :]
