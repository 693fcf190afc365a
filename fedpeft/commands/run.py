"""``fedpeft run``."""

import json
import sys

from fedpeft.commands.shared import flag, going_on
from fedpeft.config.sweeps import plan
from fedpeft.reporting.progress import Display, summary_text
from fedpeft.simulation import launch
from fedpeft.simulation.sweep import sweep

MULTIRUN = ("-m", "--multirun")


def run(arguments: list[str]) -> None:
    """Run one configuration, or a sweep by Hydra's multirun."""
    as_json, arguments = flag(arguments, "--json")
    if {*MULTIRUN} & {*arguments}:
        _sweep(arguments, as_json)
        return
    summary = launch.run(arguments, Display.beside_json(as_json))
    print(json.dumps(summary) if as_json else summary_text(summary))


def _sweep(arguments: list[str], as_json: bool) -> None:
    """Run a sweep; a job that fails does not stop the others, and gives status 2 at the end."""
    planned = plan([a for a in arguments if a not in MULTIRUN])
    if not sweep(planned, going_on(["run", *arguments], planned.folder, as_json), as_json):
        sys.exit(2)
