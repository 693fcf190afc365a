"""Studies: methods x learning rates x seeds, each run in a directory of its own, resumable."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from fedpeft.config.compose import composed
from fedpeft.config.overrides import key_of, quoted
from fedpeft.reporting.inputs import Input, inputs_of
from fedpeft.reporting.run_files import CONFIG, check_same
from fedpeft.reporting.saved_runs import Outcome, SavedRun, directory

RunAll = Callable[[list[list[str]], Mapping[str, Input]], Sequence[Outcome]]


class StudyRun(NamedTuple):
    """One run of a study.

    Attributes:
        entry: label of the run's method.
        lr: learning rate.
        seed: the run's seed.
        path: the run's directory.
        overrides: the overrides of the run's configuration, with its directory.
        config: the composed configuration.
    """

    entry: str
    lr: float
    seed: int
    path: Path
    overrides: list[str]
    config: DictConfig

    def earlier(self) -> Outcome | None:
        """Return the outcome of an earlier command; null if the run is to begin or to go on.

        Raises:
            ValueError: the directory's run was made from another configuration.
        """
        if not (self.path / CONFIG).exists():
            return None
        saved = SavedRun(self.path)
        check_same(saved.config, self.config, self.path)
        return saved.outcome()


class Done(NamedTuple):
    """A run and its summary, or the error that ended it."""

    run: StudyRun
    outcome: Outcome


@dataclass(frozen=True)
class Study:
    """Several methods under one budget.

    Args:
        folder: holds the runs' directories and the results.
        base: overrides of every run.
        entries: methods, each with overrides of its own: ``lora+strategy=local_only``.
        lrs: learning rates of every entry, except an entry that names its rate: ``lora+lr=1e-3``.
        seeds: seeds; the configuration's if empty.
        flat: directories are ``<entry>`` instead of ``<entry>/lr=<lr>/seed=<seed>``.
        more: learning rates by entry, beyond ``lrs``. An entry without any rate has its method's.
        finalists: learning rates by entry that seeds after the first are run with; an entry that
            is not there is run with all its rates.
        rates_from: name of the table that searched the rates; null if it was this table or none.
    """

    folder: Path
    base: Sequence[str]
    entries: Sequence[str]
    lrs: Sequence[float] = ()
    seeds: Sequence[int] = ()
    flat: bool = False
    more: Mapping[str, Sequence[float]] = field(default_factory=dict)
    finalists: Mapping[str, Sequence[float]] = field(default_factory=dict)
    rates_from: str | None = None

    def finish(self, run_all: RunAll) -> list[Done]:
        """Run every run that has no outcome yet.

        Training that diverged is not tried again, because it would diverge again. A run that failed
        for another reason is tried again by the next command.

        Args:
            run_all: runs configurations, each of which may fail. It is also told what the earlier
                runs have read, see ``inputs_of``.

        Returns:
            All runs of the study, the earlier ones too.

        Raises:
            ValueError: a run's directory was made from another configuration, or two runs read
                different files at the same settings.
        """
        runs = self.runs()
        known = [run.earlier() for run in runs]
        pairs = list(zip(runs, known, strict=True))
        inputs = inputs_of((run.path, run.config, o) for run, o in pairs if isinstance(o, dict))
        left = [run for run, outcome in pairs if outcome is None]
        new = iter(run_all([run.overrides for run in left], inputs) if left else [])
        done = [Done(run, next(new) if outcome is None else outcome) for run, outcome in pairs]
        for run, outcome in done:
            SavedRun(run.path).note(outcome)
        return done

    @property
    def size(self) -> int:
        """Number of runs."""
        return sum(map(self.count, self.entries))

    @property
    def searches(self) -> bool:
        """True if an entry is run with more than one learning rate."""
        return any(len(self._rates(entry)) > 1 for entry in self.entries)

    @property
    def raced(self) -> bool:
        """True if seeds after the first are run with the best learning rates alone."""
        return bool(self.searches and self.finalists and len(self.seeds) > 1)

    def count(self, entry: str) -> int:
        """Return the number of an entry's runs."""
        return len(self._pairs(entry))

    def widened(self, edges: Mapping[str, float]) -> "Study":
        """Return the study with one more learning rate for each entry whose best rate is an edge.

        The new rate lies as far beyond the edge as the edge from its neighbour, as a factor.

        Args:
            edges: best rate by entry, the first or last of the entry's grid of two or more rates.
        """
        more, finalists = dict(self.more), dict(self.finalists)
        for entry, best in edges.items():
            grid = sorted({*self._rates(entry)})
            next_to = grid[1] if best == grid[0] else grid[-2]
            beyond = float(f"{best * best / next_to:.2g}")
            more[entry] = [*more.get(entry, ()), beyond]
            if entry in finalists:
                finalists[entry] = [*finalists[entry], beyond]
        return replace(self, more=more, finalists=finalists)

    def runs(self) -> list[StudyRun]:
        """Compose every run, in the order of entries, learning rates and seeds.

        Raises:
            ValueError: a run stands twice, or a number is given twice.
        """
        runs = [run for entry in self.entries for run in self._runs_of(entry)]
        paths = [run.path for run in runs]
        if twice := [path for path in paths if paths.count(path) > 1]:
            raise ValueError(f"each run of a study must be named once, got {twice[0]} twice")
        return runs

    def _runs_of(self, entry: str) -> Iterator[StudyRun]:
        method, *extra = _parts(entry)
        # Keys of the study say nothing of one run, and would make its command longer.
        base = [override for override in self.base if not key_of(override).startswith("study.")]
        common = [*base, f"method={method}", *extra]
        self._check(extra, common)
        tree = composed([*common, "resume=true"])
        if not self.flat:
            common = [override for override in common if not override.startswith("lr=")]
        own_lr, own_seed = float(tree.lr), tree.seed
        for given_lr, given_seed in self._pairs(entry):
            lr = own_lr if given_lr is None else given_lr
            seed = own_seed if given_seed is None else given_seed
            tree.lr, tree.seed = lr, seed
            parts = [] if self.flat else [f"lr={lr}", f"seed={seed}"]
            place = directory(entry, lr, seed)
            path = self.folder / (place.parts[0] if self.flat else place)
            overrides = [*common, *parts, f"run_dir={quoted(path)}", "resume=true"]
            yield StudyRun(entry, lr, seed, path, overrides, deepcopy(tree))

    def _pairs(self, entry: str) -> list[tuple[float | None, int | None]]:
        """Return the learning rate and the seed of each run; null for the configuration's."""
        rates: Sequence[float | None] = self._rates(entry) or [None]
        first, *later = self.seeds or [None]
        kept = self.finalists.get(entry, rates) if len(rates) > 1 else rates
        return [(lr, seed) for lr in rates for seed in [first, *(later if lr in kept else [])]]

    def _rates(self, entry: str) -> list[float]:
        """Return the learning rates of an entry; empty if it has its own or its method's."""
        if any(part.startswith("lr=") for part in _parts(entry)):
            return []
        return [*self.lrs, *self.more.get(entry, ())]

    def _check(self, extra: Sequence[str], common: Sequence[str]) -> None:
        """Refuse overrides that a single run may not set."""
        for override in extra:
            if override.startswith("runtime"):
                raise ValueError(
                    f"runtime must be the same for all runs of a study, got {override}"
                )
        for name, values, texts in (("lr", self.lrs, self.base), ("seed", self.seeds, common)):
            if values and (twice := [o for o in texts if o.startswith(f"{name}=")]):
                raise ValueError(f"{name} must be given once, got {twice[0]} and --{name}s")


def _parts(entry: str) -> list[str]:
    """Return an entry's method and its overrides."""
    return re.split(r"\+(?=[\w./@]+=)", entry)
