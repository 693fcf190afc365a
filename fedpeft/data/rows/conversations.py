"""Conversations: lists of messages with a role and a content, as chat models read them."""

from typing import Any

from fedpeft.data.rows.tables import kind

Conversation = list[dict[str, str]]


def problem(messages: Any) -> str | None:
    """Say why a cell cannot be learnt from: ``has no assistant's message in it``; null if it can.

    It can if it is a list of messages of texts with an answer by the assistant, and something
    before the last one.
    """
    if not isinstance(messages, list):
        return f"has {kind(messages)}, must be a list of messages"
    for message in messages:
        parts = [message.get(k) for k in ("role", "content")] if isinstance(message, dict) else []
        if len(parts) < 2 or not all(isinstance(part, str) for part in parts):
            return "has a message without a role or a content of text"
    last = _last_answer(messages)
    if last is None:
        return "has no message whose role is assistant"
    if last == 0:
        return "has no message before the assistant's"
    return None if messages[last]["content"].strip() else "has an empty answer"


def divided(messages: Conversation) -> tuple[Conversation, str]:
    """Return the messages before the assistant's last one, and its content.

    What comes after is left out. ``problem`` has found none.
    """
    last = _last_answer(messages)
    assert last is not None
    before = [{"role": m["role"], "content": m["content"]} for m in messages[:last]]
    return before, messages[last]["content"]


def said_by_user(text: str) -> Conversation:
    """Return the conversation that begins with a text of the user."""
    return [{"role": "user", "content": text}]


def as_text(messages: Conversation) -> str:
    """Return messages to be read by people."""
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _last_answer(messages: Conversation) -> int | None:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return answers[-1] if answers else None
