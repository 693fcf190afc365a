"""The command line: fedpeft run | compare | params | partition."""

import json
import os
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

USAGE = """usage: fedpeft COMMAND [--json] [overrides]

  run        one run, or with -m a sweep:  fedpeft run method=scl num_clients=4
                                           fedpeft run -m method=scl,fedtt partition.alpha=0.1,1
  compare    several methods under one budget: fedpeft compare [--methods scl,lora] [overrides]
  params     what a method trains and sends: fedpeft params model=roberta_base [method=fedtt]
  partition  who holds what:               fedpeft partition num_clients=10 partition.alpha=0.1

Overrides are those of Hydra: key=value, group=name. Groups and names stand in conf/.
"""
# What compare runs if not told otherwise; params counts all.
METHODS = "lora,ffa_lora,fedsa_lora,scl,fedtt,fedtt_plus"


def main() -> None:
    """Entry point; errors of configuration and data end with one sentence and status 2."""
    # Before the libraries are imported, which read them then: no usage reports, and no tokenizer
    # threads beside the workers.
    for name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
        os.environ.setdefault(name, "0")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command, *arguments = sys.argv[1:] or ["--help"]
    commands: dict[str, Callable[[list[str]], None]] = {
        "run": run,
        "compare": compare,
        "params": params,
        "partition": partition,
    }
    if command in ("-h", "--help"):
        print(USAGE)
        return
    if command not in commands:
        sys.exit(f"fedpeft: unknown command {command}, must be one of {', '.join(commands)}")
    try:
        commands[command](arguments)
    except (ValueError, TimeoutError, RuntimeError) as error:
        if os.environ.get("FEDPEFT_TRACEBACK"):
            raise
        print(f"fedpeft: {error}", file=sys.stderr)
        sys.exit(2)


def run(arguments: list[str]) -> None:
    """One run, or Hydra's multirun."""
    as_json, arguments = _flag(arguments, "--json")
    if {"-m", "--multirun"} & set(arguments):
        _sweep(arguments, as_json)
        return
    summary = _serve_all([arguments], as_json)[0]
    _show(summary, as_json)


def _sweep(arguments: list[str], as_json: bool) -> None:
    """Hands over to Hydra, whose launcher and sweeper the configuration may choose."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from fedpeft.config.load import CONF, addable

    def job(_: DictConfig) -> float:
        given = list(HydraConfig.get().overrides.task)
        folder = Path(HydraConfig.get().runtime.output_dir).absolute()
        summary = _serve_all([[*given, f"run_dir='{folder}'"]], as_json)[0]
        _show(summary, as_json)
        return float(summary["final"].get(summary["selected_by"], 0.0))

    sys.argv = ["fedpeft", *map(addable, arguments)]
    hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()


def _serve_all(runs: list[list[str]], quiet: bool) -> list[dict[str, Any]]:
    """Runs configurations one after another on the same clients; returns their summaries."""
    from rich.console import Console

    from fedpeft.config import load as configuration
    from fedpeft.reporting.progress import Display
    from fedpeft.simulation.launch import launch

    settings = [configuration.settings(overrides) for overrides in runs]
    summaries: list[dict[str, Any]] = []

    def check_all() -> None:
        from fedpeft.data.rows.tables import check_path

        for config in map(configuration.load_config, runs):
            config.model.source()
            check_path(config.data.folder())
        import fedpeft.server.app  # noqa: F401  # the rest of what takes long to import

    def serve_each(grid: Any, context: Any) -> None:
        from fedpeft.server.app import serve

        console = Console(highlight=False, soft_wrap=True, stderr=quiet)
        for overrides in runs:
            summaries.append(serve(grid, overrides, Display(console), simulated=True))

    launch(serve_each, settings[0].num_clients, settings[0].runtime, check_all)
    return summaries


def _show(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary))
        return
    final, sent = summary["final"], summary["bytes"]
    if summary["weights"] == "RANDOM":
        print("RANDOM WEIGHTS: a dry run, its measures say nothing about the model")
    for key in sorted(final):
        if key.startswith(("test_", "client_test_")):
            print(f"{key}: {final[key]:.4f} (best round {summary['best'].get(key, 0):.4f})")
    for reason, count in summary["data"]["skipped"].items():
        print(f"left out: {count} rows, each {reason}")
    for split, counts in summary["data"]["cut"].items():
        cut = ", ".join(f"{count} {key.removeprefix('cut_')}s" for key, count in counts.items())
        print(f"cut to data.max_length in {split}: {cut}")
    up, down = sent["uplink_bytes"], sent["downlink_bytes"]
    print(f"sent up {up / 1e6:.3f} MB, down {down / 1e6:.3f} MB, {summary['seconds']:.0f} s")
    print(f"shared_state_sha256: {summary['shared_state_sha256']}")
    print(f"results: {summary['run_dir']}")


def compare(arguments: list[str]) -> None:
    """Several methods on the same clients, rows and budget."""
    from fedpeft.config import load as configuration
    from fedpeft.reporting.run_directory import read_metrics
    from fedpeft.reporting.tables import (
        HEADER,
        comparison_cells,
        comparison_rows,
        plot_comparison,
        print_table,
        write_comparison,
    )

    as_json, arguments = _flag(arguments, "--json")
    methods, arguments = _option(arguments, "--methods", METHODS)
    tree = configuration.composed(arguments)
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder = Path(tree.run_dir or f"runs/{stamp}_compare")
    base = [a for a in arguments if not a.startswith("run_dir=")] + ["evaluation.clients=always"]
    names = methods.split(",")
    runs = [[*base, f"method={m}", f"run_dir='{folder / m}'"] for m in names]
    folder.mkdir(parents=True, exist_ok=True)
    summaries = dict(zip(names, _serve_all(runs, as_json), strict=True))
    config = configuration.load_config(base)
    metric, selects = config.data.headline, config.data.selects[0]
    rows = comparison_rows(summaries, metric, config.cohort_size())
    baseline = next(iter(summaries.values()))["baseline"].get("client_test_baseline")
    notes = comparison_notes(metric, baseline, arguments)
    write_comparison(folder, rows, notes)
    curves = {name: read_metrics(folder / name) for name in names}
    plot_comparison(folder / "comparison.png", rows, curves, metric, selects, baseline)
    if as_json:
        print(json.dumps({"rows": rows, "baseline": baseline, "folder": str(folder)}))
        return
    print_table(f"{metric} after the last round", HEADER, comparison_cells(rows))
    print("\n".join(notes))
    print(f"saved {folder}/comparison.md, comparison.csv, comparison.png")


def comparison_notes(metric: str, baseline: float | None, arguments: list[str]) -> list[str]:
    """What the columns mean."""
    notes = [
        f"quality: {metric} on the clients' own test rows after the last round, mean by rows; "
        "best: the same at the round that validation chose; global test: the server's model on "
        "the test set (none where the head is personal); kB per client.",
    ]
    if baseline is not None:
        notes.append(f"Always answering a client's commonest label scores {baseline:.3f}.")
    return [*notes, f"Made by: fedpeft compare {' '.join(arguments)}"]


def params(arguments: list[str]) -> None:
    """Counts on the meta device for one method, or for all that fit the model."""
    from fedpeft.reporting.tables import print_table, span, span_of_bytes

    as_json, arguments = _flag(arguments, "--json")
    one = [a for a in arguments if a.startswith("method=")]
    names = [one[0].removeprefix("method=")] if one else _every_method()
    base = [a for a in arguments if not a.startswith("method=")]
    own = [a for a in base if a.startswith(("method.", "+method."))]
    if own and not one:
        raise ValueError(f"{own[0]} needs method=NAME, since not all methods have it")
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
    title = f"{' '.join(base) or 'model=minilm'}: {total:,} parameters; a round and client:"
    header = ("method", "trained", "sent up", "sent down", "MB up", "MB down", "of the whole")
    print_table(title, header, cells)
    print("MB: 10^6 bytes of the arrays, uncompressed; strategy=scaffold sends as much again.")
    for name, reason in refused.items():
        print(f"{name}: {reason}")


def _every_method() -> list[str]:
    """Names of the files in conf/method."""
    from fedpeft.config.load import CONF

    return sorted(path.stem for path in (CONF / "method").glob("*.yaml"))


def _counts(names: list[str], base: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Counts by method, and the reasons of methods that refuse the model; one must fit it."""
    from fedpeft.config import load as configuration
    from fedpeft.engine.parameters import count_on_meta

    counts: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name in names:
        config = configuration.load_config([*base, f"method={name}"])
        try:
            counts[name] = count_on_meta(config)
        except ValueError as error:
            refused[name] = str(error)
    if not counts:
        raise ValueError(next(iter(refused.values())))
    return counts, refused


def partition(arguments: list[str]) -> None:
    """Who holds what, as a table, a heat map and a file of row numbers."""
    from fedpeft.config import load as configuration
    from fedpeft.reporting.partition import Holdings

    as_json, arguments = _flag(arguments, "--json")
    folder, arguments = _option(arguments, "--out", "")
    holdings = Holdings.of(configuration.load_config(arguments))
    if as_json:
        print(holdings.as_json())
    else:
        holdings.show()
    if folder or not as_json:
        out = Path(folder).absolute()
        names = holdings.save(out)
        print(f"saved {out}/{', '.join(names)}", file=sys.stderr if as_json else sys.stdout)


def _flag(arguments: list[str], name: str) -> tuple[bool, list[str]]:
    return name in arguments, [a for a in arguments if a != name]


def _option(arguments: list[str], name: str, default: str) -> tuple[str, list[str]]:
    """Takes ``--name value`` or ``--name=value`` out of the arguments."""
    rest: list[str] = []
    value, pending = default, False
    for argument in arguments:
        if pending:
            value, pending = argument, False
        elif argument == name:
            pending = True
        elif argument.startswith(name + "="):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)
    if pending:
        raise ValueError(f"{name} needs a value")
    return value, rest
