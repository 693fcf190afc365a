"""Runs configurations with virtual clients: on Ray's workers, or in one process."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from fedpeft.config import load as configuration
from fedpeft.config.message import for_clients
from fedpeft.config.overrides import quoted, split
from fedpeft.config.runtime import Runtime
from fedpeft.config.schema import Config
from fedpeft.files import check_path
from fedpeft.reporting.inputs import Input, settings_key
from fedpeft.reporting.progress import Display, Tally
from fedpeft.reporting.run_directory import (
    InUse,
    check_makeable,
    check_run_dir,
    finished,
    run_path,
)
from fedpeft.simulation.stop import sigterm_kept

if TYPE_CHECKING:
    from fedpeft.data.tasks.base import Task
    from fedpeft.simulation.grid import LocalGrid


@contextmanager
def local_grid(
    num_clients: int, runtime: Runtime, before: Callable[[], None] = lambda: None
) -> "Iterator[LocalGrid]":
    """Yield a grid of this machine, or of the Ray cluster that it belongs to.

    Args:
        num_clients: number of nodes.
        runtime: chooses Ray's workers or this process.
        before: is called first, while Ray starts; its error ends the run.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if runtime.kind == "inprocess":
        before()
        from fedpeft.simulation.grid import InProcessGrid  # torch comes with it

        yield InProcessGrid(num_clients)
        return
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(before)
        import ray  # takes seconds, and a run in one process does without

        from fedpeft.simulation.start_ray import start_ray

        with sigterm_kept():  # because Ray sets a handler of its own, which aborts
            ours = start_ray(runtime)
    try:
        done.result()
        from fedpeft.simulation.ray import RayGrid  # torch comes with it

        cores = runtime.num_cpus, runtime.num_gpus, runtime.total_cpus
        with RayGrid(num_clients, *cores) as grid:
            yield grid
    finally:
        if ours:
            ray.shutdown()


def simulate(grid: "LocalGrid", overrides: Sequence[str], display: Display) -> dict[str, Any]:
    """Run one configuration on a local grid and return its summary.

    Args:
        grid: gets as many nodes as the configuration has clients.
        overrides: the configuration.
        display: shows the rounds.
    """
    from fedpeft.engine.engine import open_engine  # torch comes with it
    from fedpeft.server.app import serve

    settings = configuration.settings(overrides)
    if (summary := finished(configuration.composed(overrides))) is not None:
        return summary
    sent = for_clients(overrides)
    grid.prepare(sent)
    engine = open_engine(sent, None)
    left_over = engine.rows.left_over()  # an impossible partition ends the run here
    label = type(engine.config.method).__name__
    with run_path(settings.run_dir, label) as path:
        grid.num_clients = engine.config.num_clients
        grid.state_folder, grid.groups = Path(path).resolve() / "clients", engine.groups
        rest = [o for o in split(overrides) if not o.startswith("run_dir=")]
        return serve(grid, [*rest, f"run_dir={quoted(path)}"], display, notes=left_over)


# A run may fail in these ways and leave other runs alone.
FAILURES = (ValueError, TimeoutError, RuntimeError, FloatingPointError)


def check_all(runs: Sequence[Sequence[str]]) -> None:
    """Check configurations before the first of them runs.

    Rows are read and divided among the clients, and each method is tried on its model.

    Raises:
        ValueError: a configuration, a row or a partition is wrong, or a method does not fit its
            model.
    """
    for overrides in runs:
        _check_early(overrides)
    configs = _loaded(runs)
    _divide_all(configs)
    _try_all(runs, configs)


def check_inputs(runs: Sequence[Sequence[str]], inputs: Mapping[str, Input]) -> None:
    """Refuse runs whose rows or weights have changed since the runs with which they are compared.

    Args:
        runs: overrides of each run.
        inputs: rows and weights that finished runs have read, by their settings, see ``inputs_of``.

    Raises:
        ValueError: rows or weights have changed.
    """
    left = dict(inputs)  # each is read once
    for overrides in runs if inputs else ():
        tree = configuration.composed(overrides)
        if known := left.pop(settings_key(tree, "data"), None):
            rows = configuration.load_config(overrides).data.fingerprint()
            known.check(rows["sha256"], "there are now")
        if known := left.pop(settings_key(tree, "model"), None):
            model = configuration.load_config(overrides).model
            known.check(model.weights_sha256(), "there are now")


def run_all(
    runs: Sequence[Sequence[str]],
    display: Callable[[], Display] = Display,
    tally: Tally | None = None,
) -> list[dict[str, Any] | Exception]:
    """Run configurations one after another on the same workers.

    A wrong configuration ends them all before the first one starts. A run that fails later does
    not end the others.

    Args:
        runs: overrides of each run.
        display: makes the display of one run.
        tally: counts the runs and is shown after each; null to show none.

    Returns:
        For each run, in order, its summary or the error that ended it.

    Raises:
        InUse: another process is at work on one of the runs.
    """
    for overrides in runs:
        _check_early(overrides)
    first = configuration.settings(runs[0])
    outcomes: list[dict[str, Any] | Exception] = []
    with local_grid(first.num_clients, first.runtime, lambda: _check(runs)) as grid:
        for overrides in runs:
            shown = display()
            try:
                outcomes.append(simulate(grid, overrides, shown))
            except InUse:  # another command works on the same runs, so their outcomes are its own
                raise
            except FAILURES as error:
                outcomes.append(error)
                if tally:
                    shown.show(f"failed: {error}")
            if tally:
                tally.add(failed=isinstance(outcomes[-1], Exception))
                shown.show(tally.text())
    return outcomes


def run(overrides: str | Sequence[str], display: Display | None = None) -> dict[str, Any]:
    """Run one configuration with virtual clients on this machine and return its summary.

    Args:
        overrides: overrides of the configuration, e.g. ``["method=scl", "num_clients=4"]``.
        display: shows the rounds; null for one on standard output.

    Raises:
        ValueError: something about the configuration, the model or the data is wrong.
        RuntimeError: no client could train.
    """
    listed = split(overrides)
    (outcome,) = run_all([listed], lambda: display or Display())
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _check_early(overrides: Sequence[str]) -> None:
    """Find mistakes in values and paths before Ray starts and data load, which takes seconds."""
    settings = configuration.settings(overrides)
    if settings.run_dir:
        check_run_dir(Path(settings.run_dir), settings.resume)
    else:
        check_makeable(Path("runs"))  # a run without a name gets a directory in it
    configuration.trackers(overrides)
    tree = configuration.composed(overrides)
    for key in configuration.PATHS:
        path = OmegaConf.select(tree, key, throw_on_resolution_failure=False)
        if isinstance(path, str):
            check_path(key, path)
    configuration.check_fields(overrides)


def _check(runs: Sequence[Sequence[str]]) -> None:
    """Check configurations before workers start; more than one is tried, too.

    A partition that is impossible ends only its own run.
    """
    configs = _loaded(runs)
    if len(runs) > 1:
        _read_all(configs)
        _try_all(runs, configs)


def _loaded(runs: Sequence[Sequence[str]]) -> list[Config]:
    """Return configurations whose folders are there, and import the modules that take long."""
    configs = list(map(configuration.load_config, runs))
    for config in configs:
        config.model.source()
        check_path("data.path", config.data.folder())
    import fedpeft.server.app  # noqa: F401

    return configs


def _read_all(configs: Sequence[Config]) -> "dict[str, Task]":
    """Read and check the rows of all configurations, each data set once, and return the tasks.

    Raises:
        ValueError: a row cannot be used; the error names the folder.
    """
    tasks = {repr(config.data): config.data for config in configs}
    for task in tasks.values():
        try:
            task.fingerprint()
        except ValueError as error:
            raise ValueError(f"data.path={task.folder()}: {error}") from error
    return tasks


def _divide_all(configs: Sequence[Config]) -> None:
    """Read the rows and divide them as each configuration does.

    Raises:
        ValueError: a row cannot be used, or a partition is impossible.
    """
    tasks = _read_all(configs)
    divided: set[str] = set()
    for config in configs:
        task, partition = tasks[repr(config.data)], config.partition
        clients, seed = config.num_clients, config.seed
        if (key := repr((task, partition, clients, seed))) in divided:
            continue
        divided.add(key)
        try:
            partition.once(task.group_numbers(partition.column), clients, seed)
        except ValueError as error:
            raise ValueError(f"with {clients} clients and seed={seed}: {error}") from error


def _try_all(runs: Sequence[Sequence[str]], configs: Sequence[Config]) -> None:
    """Refuse a study of which a method cannot run, because others would run for hours first.

    Raises:
        ValueError: one method or more do not fit the model; it names each once.
    """
    from fedpeft.engine.parameters import check_on_meta

    misfits: dict[str, None] = {}
    tried: set[str] = set()
    for overrides, config in zip(runs, configs, strict=True):
        if (key := repr(replace(config, seed=0, lr=1.0, run_dir="-"))) in tried:
            continue
        tried.add(key)
        try:
            check_on_meta(config)
        except ValueError as error:
            misfits[f"{_entry(overrides, runs, config)}: {error}"] = None
    if misfits:
        raise ValueError("; ".join(misfits))


def _entry(overrides: Sequence[str], runs: Sequence[Sequence[str]], config: Config) -> str:
    """Return a run's method and the overrides that not all runs have, as a study writes them.

    Args:
        overrides: the run's overrides.
        runs: overrides of all runs.
        config: the run's configuration, whose method's class gives the name if no override does.
    """
    common = set(runs[0]).intersection(*runs)
    of_run = ("run_dir=", "lr=", "seed=")  # an entry's runs differ in them
    own = [o for o in overrides if o not in common and not o.startswith((*of_run, "method="))]
    methods = [o.removeprefix("method=") for o in overrides if o.startswith("method=")]
    named = methods[-1:] or [type(config.method).__name__]
    return "+".join([*named, *(o.lstrip("+") for o in own)])
