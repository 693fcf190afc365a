"""Chat templates, which write conversations as text."""

from typing import Any

# For tokenizers that have no template. The end of an answer is its only special token, so it suits
# every tokenizer.
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


def set_template(tokenizer: Any, template: str | None) -> None:
    """Set the template that ``tokenizer.apply_chat_template`` uses.

    Args:
        tokenizer: changed in place.
        template: a Jinja template of messages. If null, the tokenizer keeps its own, or gets
            ``CHAT_TEMPLATE`` if it has none.

    Raises:
        ValueError: ``template`` cannot render a user's message.
    """
    tokenizer.chat_template = template or tokenizer.chat_template or CHAT_TEMPLATE
    if template is None:
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except Exception as error:  # a template may raise anything
        raise ValueError(
            f"model.chat_template is no Jinja template of messages: {error}"
        ) from error
