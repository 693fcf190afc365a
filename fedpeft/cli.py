"""The command line: fedpeft run | compare | study | params | show | export | check | ..."""

import os
import sys
from difflib import get_close_matches
from itertools import takewhile
from pkgutil import resolve_name

from fedpeft.errors import explained
from fedpeft.simulation.stop import Terminated, stop_on_sigterm

USAGE = """usage: fedpeft COMMAND [options] [overrides]

  run        one run, or with -m a sweep:  fedpeft run method=scl num_clients=4
                                           fedpeft run -m method=scl,fedtt partition.alpha=0.1,1
  compare    several methods under one budget: fedpeft compare [--methods scl,lora] [overrides]
  study      methods x learning rates x seeds: fedpeft study --methods scl,lora+strategy=local_only
                                           --lrs 1e-4,1e-3 --seeds 0,1,2 run_dir=FOLDER [overrides]
                                           [--extend N] [--data DIR] [--estimate]
                                           or of a paper's table: experiment=scl_table2 scale=small
  results    runs below folders, compared: fedpeft results [DIR ...] [--where method=lora 'lr<0.01']
                                           [--columns A,B] [--over-seeds] [--sort COLUMN]
                                           [--to FILE.parquet [--rounds]]
  params     what a method trains and sends: fedpeft params model=roberta_base [method=fedtt]
  show       what each client got:         fedpeft show RUN [--round N]
  report     a page, figures and tables:   fedpeft report DIR... [--chosen] [--to FOLDER]
  partition  who holds what:               fedpeft partition num_clients=10 partition.alpha=0.1
                                           [--out FOLDER]
  check      a dry run, which trains nothing: fedpeft check method=scl num_clients=4
  export     the model as a folder:        fedpeft export RUN --to DIR [--merge] [--client N]
  predict    answers to lines of text:     fedpeft predict RUN < texts
  evaluate   the measures on test rows:    fedpeft evaluate RUN data.path=FOLDER
  node       a site of a deployment:       fedpeft node --help
  server     the server of a deployment:   fedpeft server --help
  deploy     both on this machine:         fedpeft deploy trial method=fedsa_lora num_rounds=2

All but predict, node, server and deploy take --json.
Overrides are those of Hydra: key=value, group=name. Groups and names stand in conf/.
"""
# By command, the function that answers it. Names, because its module may import torch, which takes
# seconds, and a wrong word or --help should not wait.
COMMANDS = {
    "run": "fedpeft.commands.run:run",
    "compare": "fedpeft.commands.study:compare",
    "study": "fedpeft.commands.study:study",
    "results": "fedpeft.commands.results:results",
    "params": "fedpeft.commands.planning:params",
    "show": "fedpeft.commands.saved:show",
    "report": "fedpeft.commands.saved:report",
    "partition": "fedpeft.commands.planning:partition",
    "check": "fedpeft.commands.planning:check",
    "export": "fedpeft.commands.model:export",
    "predict": "fedpeft.commands.model:predict",
    "evaluate": "fedpeft.commands.model:evaluate",
    "node": "fedpeft.deployment.node:main",
    "server": "fedpeft.deployment.server:main",
    "deploy": "fedpeft.deployment.trial:main",
}
# These print the options that they parse.
OWN_HELP = ("results", "export", "predict", "evaluate", "node", "server", "deploy")


def main() -> None:
    """Run a command; an error ends it with one sentence and status 2, or 1 if nobody expected it.

    With FEDPEFT_TRACEBACK set, errors show their traceback.
    """
    # Turn off usage reports, and tokenizers' threads beside the workers. This comes first, because
    # libraries read these variables when they are imported.
    for name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
        os.environ.setdefault(name, "0")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return
    if command not in COMMANDS:
        close = get_close_matches(command, COMMANDS, 1)
        advice = f"did you mean {close[0]}?" if close else f"must be one of {', '.join(COMMANDS)}"
        print(f"fedpeft: unknown command {command}, {advice}", file=sys.stderr)
        sys.exit(2)
    if {"-h", "--help"} & {*arguments} and command not in OWN_HELP:
        print(usage_of(command))
        return
    stop_on_sigterm()
    try:
        resolve_name(COMMANDS[command])(arguments)
    except KeyboardInterrupt as stopped:
        print(f"fedpeft: {str(stopped) or 'stopped'}", file=sys.stderr)
        sys.exit(143 if isinstance(stopped, Terminated) else 130)
    except Exception as error:
        if os.environ.get("FEDPEFT_TRACEBACK"):
            raise
        print(f"fedpeft: {explained(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError | OSError | RuntimeError) else 1)


def usage_of(command: str) -> str:
    """Return the lines of USAGE on one command, and its last two, on --json and overrides."""
    lines = USAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"  {command} "))
    more = takewhile(lambda line: line.startswith("    "), lines[start + 1 :])
    return "\n".join([lines[start].strip(), *more, "", *lines[-2:]])
