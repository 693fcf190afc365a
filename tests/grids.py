"""Answers to a grid's messages."""

from collections.abc import Callable, Sequence

from flwr.app import Context, Message

from fedpeft.simulation.grid import AnswerAll


def one_by_one(client_app: Callable[[Message, Context], Message]) -> AnswerAll:
    """Return a function that answers a pass's messages one after another by any ClientApp."""

    def tried(message: Message, context: Context) -> Message | Exception:
        try:
            return client_app(message, context)
        except Exception as error:
            return error

    def answer_all(
        messages: Sequence[Message], contexts: Sequence[Context]
    ) -> list[Message | Exception]:
        return [tried(m, c) for m, c in zip(messages, contexts, strict=True)]

    return answer_all
