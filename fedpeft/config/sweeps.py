"""The plan of a sweep: its folder and its jobs, before Hydra's sweeper and launcher begin."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fedpeft.config.compose import addable, composed, composing, leaves
from fedpeft.config.overrides import key_of, quoted, readable
from fedpeft.config.schema import ConfigError
from fedpeft.config.sentences import hydra_sentence

# A private name of Hydra; this sweeper runs the product of all values.
BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
FOLDER, SUBDIR = "hydra.sweep.dir", "hydra.sweep.subdir"


@dataclass(frozen=True)
class SweepPlan:
    """A sweep before it begins.

    Args:
        arguments: overrides for Hydra, with the sweep's folder.
        folder: holds the runs' directories.
        swept: the keys that have several values.
        jobs: overrides of each job; one example if the sweeper chooses values itself.
        sweeper: Hydra's configuration of the sweeper.
        all_known: the jobs are all that there will be.
    """

    arguments: list[str]
    folder: str
    swept: tuple[str, ...]
    jobs: list[list[str]]
    sweeper: DictConfig
    all_known: bool

    @property
    def total(self) -> int | None:
        """Number of jobs; null if the sweeper does not say."""
        return len(self.jobs) if self.all_known else self.sweeper.get("n_trials")

    def label(self, overrides: Sequence[str]) -> str:
        """Return what sets a job apart from the others."""
        of_sweep = [o.lstrip("+") for o in overrides if key_of(o) in self.swept]
        return " ".join(of_sweep or overrides)


def plan(arguments: Sequence[str]) -> SweepPlan:
    """Plan a sweep.

    Args:
        arguments: overrides, of which some have several values; ``run_dir`` is the sweep's folder.

    Raises:
        ConfigError: an argument is no override, or names an unknown key or value.
    """
    if flags := [a for a in arguments if a.startswith("-")]:
        raise ConfigError(f"a sweep takes overrides alone, got {flags[0]}")
    if chosen := [a for a in arguments if key_of(a) == SUBDIR]:
        raise ConfigError(
            f"{SUBDIR} must not be set, because a sweep finds a run again by its folder, the hash "
            f"of its settings, got {chosen[0]}"
        )
    moved = [f"{FOLDER}={_as_text(a[8:])}" if a.startswith("run_dir=") else a for a in arguments]
    # A value with a comma is a list of values to run, so it stays as it is.
    overrides = [addable(a if "," in a else readable(a)) for a in moved]
    try:
        return _plan(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        known = list(leaves(composed(()), resolve=False))
        raise ConfigError(hydra_sentence(error, overrides, known)) from error


def _plan(overrides: list[str]) -> SweepPlan:
    with composing():
        loader = GlobalHydra.instance().config_loader()
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
        single = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
        hydra = compose("config", single, return_hydra_config=True).hydra
        folder, sweeper = str(hydra.sweep.dir), hydra.sweeper
        params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        search = OverridesParser.create(config_loader=loader).parse_overrides(params)
        known = sweeper._target_ == BASIC
        jobs = _jobs([*search, *(o for o in parsed if not _of_hydra(o))], known)
    swept = tuple(o.key_or_group for o in [*search, *parsed] if o.is_sweep_override())
    of_folder = [o for o in overrides if key_of(o) != FOLDER]
    return SweepPlan(
        [*of_folder, f"{FOLDER}={quoted(folder)}"], folder, swept, jobs, sweeper, known
    )


def _as_text(value: str) -> str:
    """Return a folder in quotes, because a comma in its name makes no list of it."""
    return value if value[:1] in ("'", '"') else quoted(value)


def _of_hydra(override: Override) -> bool:
    return override.key_or_group.startswith(("hydra.", "hydra/"))


def _jobs(overrides: Sequence[Override], all_of_them: bool) -> list[list[str]]:
    """Return the product of all values, as Hydra's basic sweeper does, or its first alone."""
    by_key = {o.get_key_element(): list(_values(o, all_of_them)) for o in overrides}
    if empty := [o.input_line for o in overrides if not by_key[o.get_key_element()]]:
        raise ConfigError(f"{empty[0]} has no value, so the sweep has no job")
    pairs = [[f"{key}={value}" for value in values] for key, values in by_key.items()]
    return [list(job) for job in islice(product(*pairs), None if all_of_them else 1)]


def _values(override: Override, all_of_them: bool) -> Iterator[Any]:
    if not override.is_sweep_override():
        yield override.get_value_element_as_str()
    elif override.is_discrete_sweep():
        yield from override.sweep_string_iterator()
    elif all_of_them:
        raise ConfigError(f"{override.input_line} is no list of values: set hydra/sweeper=optuna")
    else:
        interval = override.value()
        assert isinstance(interval, IntervalSweep)
        yield interval.start
