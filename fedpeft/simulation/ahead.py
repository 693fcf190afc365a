"""Checks of configurations ahead of their runs, which may take hours."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from fedpeft.config import load as configuration
from fedpeft.config.compose import composed
from fedpeft.config.schema import Config
from fedpeft.files import check_path
from fedpeft.reporting.inputs import Input, settings_key
from fedpeft.reporting.run_directory import check_makeable, check_run_dir

if TYPE_CHECKING:
    from fedpeft.data.tasks.base import Task


def check_all(runs: Sequence[Sequence[str]]) -> None:
    """Check configurations before the first of them runs.

    Rows are read and divided among the clients, and each method is tried on its model.

    Raises:
        ValueError: a configuration, a row or a partition is wrong, or a method does not fit its
            model.
    """
    for overrides in runs:
        check_early(overrides)
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
        tree = composed(overrides)
        if known := left.pop(settings_key(tree, "data"), None):
            rows = configuration.load_config(overrides).data.fingerprint()
            known.check(rows["sha256"], "there are now")
        if known := left.pop(settings_key(tree, "model"), None):
            model = configuration.load_config(overrides).model
            known.check(model.weights_sha256(), "there are now")


def check_early(overrides: Sequence[str]) -> None:
    """Find mistakes in values and paths before Ray starts and data load, which takes seconds."""
    settings = configuration.settings(overrides)
    if settings.run_dir:
        check_run_dir(Path(settings.run_dir), settings.resume)
    else:
        check_makeable(Path("runs"))  # a run without a name gets a directory in it
    configuration.trackers(overrides)
    tree = composed(overrides)
    for key in configuration.PATHS:
        path = OmegaConf.select(tree, key, throw_on_resolution_failure=False)
        if isinstance(path, str):
            check_path(key, path)
    configuration.check_fields(overrides)


def check_loaded(runs: Sequence[Sequence[str]]) -> None:
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
    from fedpeft.engine.parameters import check_on_meta  # torch comes with it

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
