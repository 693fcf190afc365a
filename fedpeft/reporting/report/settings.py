"""The runs of a report: compared by one measure, one setting for all that differ in the seed."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from fedpeft.config.choices import choices, of_choice
from fedpeft.reporting.brief import brief
from fedpeft.reporting.results import (
    common_label,
    headline,
    mean_and_sd,
    run_values,
    unmeasured,
)
from fedpeft.reporting.saved_runs import SavedRun, by_setting, one_a_seed
from fedpeft.reporting.tables import Rows

ROWS = {"quality": "the clients' test rows", "global_test": "the server's test rows"}
LONG_NAME = 40  # characters of a setting's name, above which it says less


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but the seed.

    Args:
        name: the setting's name in tables and figures.
        runs: runs that came to their end, one a seed.
        rows: the runs' numbers, see ``run_values``.
        lost: number of seeds whose run did not come to its end.
    """

    name: str
    runs: Sequence[SavedRun]
    rows: Rows
    lost: int

    @property
    def seeds(self) -> list[int]:
        """The runs' seeds, sorted."""
        return [run.settings["seed"] for run in self.runs]

    def values(self, key: str) -> list[Any]:
        """Return a number of each run that has it."""
        return [row[key] for row in self.rows if row[key] is not None]

    def mean_bytes(self, key: str) -> float:
        """Return the mean over the runs of a count of bytes in their summaries."""
        return fmean(run.final_summary["bytes"].get(key, 0) for run in self.runs)

    def spread(self, key: str) -> tuple[float | None, float | None]:
        """Return the mean over the seeds and the sample standard deviation of a number."""
        return mean_and_sd(self.values(key))


class LeftOut(NamedTuple):
    """A run that no number of the report counts, and why."""

    run: SavedRun
    status: str
    reason: str


@dataclass(frozen=True)
class Runs:
    """The runs of a report.

    Args:
        measure: name of the measure by which settings are compared.
        sign: 1 if more of the measure is better, -1 if less.
        settings: the settings, in the order in which their runs were found.
        left_out: runs that did not come to their end, and others that cannot be counted.
    """

    measure: str
    sign: int
    settings: Sequence[Setting]
    left_out: Sequence[LeftOut]

    @classmethod
    def of(cls, saved: Sequence[SavedRun]) -> "Runs":
        """Sort saved runs into settings.

        Raises:
            ValueError: no run came to its end, or the runs have different measures.
        """
        left = {
            run.path: LeftOut(run, run.status, run.reason) for run in saved if run.summary is None
        }
        lost = Counter(out.run.hash_but_seed for out in left.values())
        ended = [run for run in saved if run.path not in left]
        if not ended:
            reasons = "; ".join(f"{path}: {out.reason}" for path, out in left.items())
            raise ValueError(f"no run came to its end. {reasons}")
        measure, sign = _measure(ended)
        groups = [_once(group, left) for group in by_setting(ended)]
        names = _names([group[0] for group in groups])
        settings = [
            Setting(
                name, group, [_row(run, measure) for run in group], lost[group[0].hash_but_seed]
            )
            for name, group in zip(names, groups, strict=True)
        ]
        return cls(measure, sign, settings, [left[run.path] for run in saved if run.path in left])

    @property
    def compared(self) -> str:
        """``quality`` or, if no run's clients were tested, ``global_test``."""
        tested = any(setting.values("quality") for setting in self.settings)
        return "quality" if tested else "global_test"

    @property
    def partly_measured(self) -> list[str]:
        """Sentences on runs after whose last round a client measured nothing."""
        whole = [run for setting in self.settings for run in setting.runs]
        whys = [(run, unmeasured(run.final_summary)) for run in whole]
        return [f"{run.path}: after the last round, {why}" for run, why in whys if why]

    @property
    def title(self) -> str:
        """The measure as words."""
        return self.measure.replace("_", " ")


def _once(group: list[SavedRun], left: dict[Any, LeftOut]) -> list[SavedRun]:
    """Return one run a seed; others of the same seed are copies and go to ``left``."""
    first = {run.settings["seed"]: run for run in one_a_seed(group)}
    for run in group:
        same = first[run.settings["seed"]]
        if same is not run:
            left[run.path] = LeftOut(run, "copy", f"the same configuration and seed as {same.path}")
    return list(first.values())


def _row(run: SavedRun, measure: str) -> dict[str, Any]:
    values = run_values(run.final_summary, measure, measure)
    return values | {"baseline": common_label(run.final_summary, values["quality"])}


def _measure(runs: Sequence[SavedRun]) -> tuple[str, int]:
    """Return the measure by which all runs are compared, and 1 if more is better, -1 if less.

    Raises:
        ValueError: the runs have more than one measure, or none is known.
    """
    known: dict[tuple[str, int], SavedRun] = {}
    for run in runs:
        if name := headline(run.final_summary):
            known.setdefault((name, _sign(run, name)), run)
    if len(known) > 1:
        (a, one), (b, other), *_ = ((_named(key), run.path) for key, run in known.items())
        raise ValueError(
            f"a report compares runs by one measure, got {a} ({one}) and {b} ({other}): make a "
            "report of each"
        )
    if not known:
        raise ValueError(f"{runs[0].path} does not say by which measure it is compared")
    return next(iter(known))


def _sign(run: SavedRun, measure: str) -> int:
    """Return 1 if more of a run's measure is better, -1 if less."""
    higher = run.final_summary.get("higher_is_better")
    if higher is None:  # an older run says it in its configuration alone
        less = run.settings.get("data.less_is_better") or []
        higher = measure.removesuffix("_generated").removesuffix("_teacher_forced") not in less
    return 1 if higher else -1


def _named(measure: tuple[str, int]) -> str:
    name, sign = measure
    return name if sign > 0 else f"{name}, of which less is better"


# --- names ---------------------------------------------------------------------------------------


def _names(runs: Sequence[SavedRun]) -> list[str]:
    """Return a name for each setting: its method and, where others have it, what differs.

    A long name keeps all values of the method. It keeps others, such as ``lr``, only until the
    settings differ. The table of keys that differ has all.
    """
    facts = [_facts(run) for run in runs]
    by_method: dict[str, list[int]] = {}
    for place, fact in enumerate(facts):
        by_method.setdefault(fact["method"], []).append(place)
    names = [""] * len(facts)
    for method, places in by_method.items():
        same = [facts[place] for place in places]
        keys = _apart(same)
        parts = _parts(same, keys, facts)
        if max(len(" ".join([method, *part])) for part in parts) > LONG_NAME:
            parts = _parts(same, _needed(same, keys), facts)
        for place, part in zip(places, parts, strict=True):
            names[place] = " ".join([method, *part])
    twice = {name for name, count in Counter(names).items() if count > 1}
    return [
        f"{name} {run.hash_but_seed}" if name in twice else name
        for name, run in zip(names, runs, strict=True)
    ]


def _parts(
    same: Sequence[Mapping[str, Any]], keys: Sequence[str], facts: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """Return the parts of the names of one method's settings, such as ``lr=0.1``.

    Args:
        same: the settings' values by key.
        keys: the keys that the names show.
        facts: values of all methods' settings by key; keys that end alike are not shortened.
    """
    columns = {key: brief([_text(fact.get(key)) for fact in same], 24) for key in keys}
    return [
        [f"{_short(key, facts)}={column[i]}" for key, column in columns.items() if key in fact]
        for i, fact in enumerate(same)
    ]


def _text(value: Any) -> str:
    """Return a value as text, a list without brackets and quotes, because names are long."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _needed(same: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """Return the method's keys and the first others that tell settings apart."""
    chosen = [key for key in keys if key.startswith("method.")]
    apart = _told(same, chosen)
    for key in keys[len(chosen) :]:
        told = _told(same, [*chosen, key])
        if told > apart:
            chosen, apart = [*chosen, key], told
    return chosen


def _told(same: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> int:
    """Return the number of settings that some keys tell apart."""
    return len({repr([fact.get(key) for key in keys]) for fact in same})


def _facts(run: SavedRun) -> dict[str, Any]:
    """Return the names of a run's groups, and then its values by dotted key, without the seed."""
    chosen = choices(run.settings)
    values = {key: value for key, value in run.settings.items() if key != "seed"}
    return {**chosen, **values}


def _apart(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys that tell settings apart, the method's first.

    A value that differs because the choice of its group does is left out.
    """
    keys = dict.fromkeys(key for fact in facts for key in fact)
    differ = [key for key in keys if len({repr(fact.get(key)) for fact in facts}) > 1]
    groups = {key for key in differ if "." not in key}
    kept = [key for key in differ if not of_choice(key, groups, facts)]
    return sorted(kept, key=lambda key: not key.startswith("method."))


def _short(key: str, facts: Iterable[Mapping[str, Any]]) -> str:
    """Return the last part of a dotted key, or all of it where two keys end alike."""
    last = key.rpartition(".")[2]
    alike = {k for fact in facts for k in fact if k.rpartition(".")[2] == last}
    return key if len(alike) > 1 else last
