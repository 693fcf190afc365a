"""Conversations as text: the tokenizer's own template, a given one, or plain instructions."""

from typing import Any

# For tokenizers that have none: an instruction, and where the answer begins. No token of the
# tokenizer's own but the end of an answer, so it serves any of them.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}"
    "{{- '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{%- elif message['role'] == 'assistant' %}"
    "{{- '### Response:\\n' + message['content'] + (eos_token or '') }}"
    "{{- '' if loop.last else '\\n\\n' }}"
    "{%- else %}"
    "{{- message['content'] + '\\n\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}"
)


def set_template(tokenizer: Any, given: str | None) -> None:
    """Makes sure that ``tokenizer.apply_chat_template`` works.

    Args:
        given: a Jinja template that wins over the tokenizer's own.

    Raises:
        ValueError: ``given`` cannot render a user's message.
    """
    from jinja2 import TemplateError

    tokenizer.chat_template = given or tokenizer.chat_template or CHAT_TEMPLATE
    if given is None:
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except TemplateError as error:
        raise ValueError(
            f"model.chat_template is no Jinja template of messages: {error}"
        ) from error
