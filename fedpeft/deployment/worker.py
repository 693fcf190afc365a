"""The resident worker of a site: answers one message after another, and keeps model and rows.

It runs the code that is installed at the site, never the code that came with a run.
"""

import logging
import os
import sys
import time
from functools import partial
from pathlib import Path

from flwr.app import Context, Message

from fedpeft.client.app import app, ready
from fedpeft.deployment.policy import Policy
from fedpeft.deployment.tasks import Tasks

POLL_SECONDS = 0.2


def main() -> None:
    """Answer messages until the process is ended.

    The arguments are the address of the SuperNode's runtime API, the file of its secret and the
    file of the site's policy.
    """
    address, secret, policy = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    tasks, answer = Tasks(address, Path(secret).read_bytes()), partial(_answer, Policy.read(policy))
    ready()  # torch is here when the first message comes
    parent = os.getppid()
    while os.getppid() == parent:
        if not tasks.answer(answer):
            time.sleep(POLL_SECONDS)


def _answer(policy: Policy, message: Message, context: Context) -> Message:
    """Answer a message whose configuration the site allows."""
    config = message.content.config_records.get("config")
    if config is not None:
        config["overrides"] = policy.merged(str(config.get("overrides", "")))
    return app(message, context)


if __name__ == "__main__":
    main()
