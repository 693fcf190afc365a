"""``fedpeft params``, ``partition`` and ``check``, which say what a run would do."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from fedpeft.commands.shared import flag, option
from fedpeft.config.choices import choices
from fedpeft.config.compose import CONF, composed, leaves
from fedpeft.config.load import check_fields, load_config, settings
from fedpeft.reporting.tables import print_table, span, span_of_bytes


def params(arguments: list[str]) -> None:
    """Count parameters and bytes of one method, or of all that fit the model."""
    as_json, arguments = flag(arguments, "--json")
    one = [a for a in arguments if a.startswith("method=")]
    names = [one[0].removeprefix("method=")] if one else every_method()
    base = [a for a in arguments if not a.startswith("method=")]
    of_method = [a for a in base if a.startswith(("method.", "+method."))]
    if of_method and not one:
        raise ValueError(f"{of_method[0]} needs method=NAME, since not all methods have it")
    counts, refused = _counts(names, base)
    if as_json:
        print(json.dumps(counts))
        return
    cells = [
        [
            name,
            span(c["trained"]),
            span(c["sent_up"]),
            span(c["sent_down"]),
            span_of_bytes(c["bytes_up"]),
            span_of_bytes(c["bytes_down"]),
            f"{c['trained_percent']:.3f} %",
        ]
        for name, c in counts.items()
    ]
    total = next(iter(counts.values()))["total"]
    given = {argument.partition("=")[0] for argument in base}
    chosen = choices(leaves(composed(base), resolve=False))
    defaults = [f"{group}={chosen[group]}" for group in ("model", "data") if group not in given]
    title = f"{' '.join([*base, *defaults])}: {total:,} parameters; a round and client:"
    header = ("method", "trained", "sent up", "sent down", "MB up", "MB down", "of the whole")
    print_table(title, header, cells)
    print("MB: 10^6 bytes of the arrays, uncompressed; strategy=scaffold sends as much again.")
    for name, reason in refused.items():
        print(f"{name}: {reason}")


def every_method() -> list[str]:
    """Return the names of the files in conf/method."""
    return sorted(path.stem for path in (CONF / "method").glob("*.yaml"))


def _counts(names: list[str], base: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return counts by method, and reasons of methods that refuse the model; one must fit."""
    from fedpeft.engine.parameters import count_on_meta  # imports torch

    counts: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name in names:
        config = load_config([*base, f"method={name}"])
        try:
            counts[name] = count_on_meta(config)
        except ValueError as error:
            refused[name] = str(error)
    if not counts:
        raise ValueError(next(iter(refused.values())))
    return counts, refused


def partition(arguments: list[str]) -> None:
    """Show each client's rows: a table, a heat map and a file of row numbers."""
    from fedpeft.reporting.partition import Holdings  # imports torch

    as_json, arguments = flag(arguments, "--json")
    folder, arguments = option(arguments, "--out")
    holdings = Holdings.of(load_config(arguments))
    if as_json:
        print(holdings.as_json())
    else:
        holdings.show()
    if folder or not as_json:
        out = Path(folder).absolute()
        names = holdings.save(out)
        print(f"saved {out}/{', '.join(names)}", file=sys.stderr if as_json else sys.stdout)


def check(arguments: list[str]) -> None:
    """Open model and data and print versions, hashes, counts and memory; problems give status 2."""
    as_json, arguments = flag(arguments, "--json")
    given = settings(arguments)
    check_fields(arguments)

    # These import torch, which takes seconds, so wrong words are answered before.
    from fedpeft.server.check import check as checked
    from fedpeft.simulation.grid import InProcessGrid

    log = logging.getLogger("fedpeft.client")
    level = log.level
    log.setLevel(logging.CRITICAL)  # the report says what is wrong, and a node's log all of it
    try:
        report = checked(InProcessGrid(given.num_clients), arguments, simulated=True)
    finally:
        log.setLevel(level)
    if as_json:
        print(report.as_json())
    else:
        report.show()
    if report.problems:
        sys.exit(2)
