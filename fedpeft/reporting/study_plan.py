"""The tables of one ``fedpeft study``: a study for each cell."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from fedpeft.config.choices import choices
from fedpeft.config.compose import composed, leaves
from fedpeft.config.overrides import quoted
from fedpeft.config.schema import Studying
from fedpeft.reporting.study import Study


class Finished(NamedTuple):
    """A table's study with all runs done.

    Attributes:
        study: the study, with the learning rates that were added.
        ranked_lrs: each entry's learning rates with which a run came to its end, the best first.
    """

    study: Study
    ranked_lrs: Mapping[str, Sequence[float]]


# Finishes a study; told whether this is the last time for its table.
Finish = Callable[[bool, Study], Finished]


@dataclass(frozen=True)
class StudyPlan:
    """All tables of a study, as the configuration and the command's options say.

    Args:
        folder: holds the runs; a folder a cell, if there are cells.
        base: overrides of every run.
        settings: the configuration's key ``study``, with the options in place.
        data: holds a folder for each data set, by its name in ``conf/data``; null to read each from
            its own path.
    """

    folder: Path
    base: Sequence[str]
    settings: Studying
    data: Path | None = None

    def finish_tables(self, finish_one: Finish) -> None:
        """Finish every table with the first seed, then with two, and so on, by ``finish_one``.

        So a command that is stopped leaves tables of whole seeds. A run that is there is not run
        again. If there are neither cells nor ``finalists``, the only table is finished with all
        seeds at once.

        With ``finalists``, later seeds are run with each entry's best rates of the first seed. An
        entry of which no run came to its end with the first seed keeps the first rates of the grid.

        With ``reuse_lrs`` the first table is finished before the others, because they take its
        learning rates. An entry of which no run came to its end there has its method's own rate in
        the others.

        Args:
            finish_one: finishes a table's study. It is also told whether this is the table's last
                time.
        """
        first, *others = self.studies()
        if not self.settings.reuse_lrs:
            self._grow([first, *others], finish_one)
            return
        (ended,) = self._grow([first], finish_one)
        best = {entry: rates[:1] for entry, rates in ended.ranked_lrs.items()}
        name = first.folder.name if ended.study.searches else None
        self._grow([replace(study, more=best, rates_from=name) for study in others], finish_one)

    def check_data(self) -> None:
        """Check the folder ``data``.

        Raises:
            ValueError: the folder ``data`` lacks the folder of a table.
        """
        for data in [self._data_of(study.base) for study in self.studies()]:
            if data is not None and not data.is_dir():
                raise ValueError(self._lacking(data))

    def untried(self) -> list[list[str]]:
        """Return the overrides of each run of the entries that have no folder in their table yet.

        They have one learning rate and all seeds, because a partition may be impossible with one.
        """
        tables = [replace(study, lrs=study.lrs[:1]) for study in self.studies()]
        runs = [run for table in tables for run in table.runs()]
        return [run.overrides for run in runs if not run.path.parents[1].exists()]

    def check_begun(self) -> None:
        """Compare the runs that are there with the configurations of all tables.

        Raises:
            ValueError: a run was made from another configuration.
        """
        for run in (run for table in self.studies() for run in table.runs()):
            run.earlier()

    def _lacking(self, data: Path) -> str:
        """Say why the folder of a table's data is not there."""
        parent = data.parent
        if not parent.is_dir():
            return f"--data: there is no folder {parent}"
        above = parent.name == data.name
        advice = f": give the folder above, --data {parent.parent}" if above else ""
        return f"--data {parent} must hold a folder {data.name}, got none{advice}"

    def _grow(self, studies: Sequence[Study], finish_one: Finish) -> list[Finished]:
        """Finish tables, and return each as it was after its last time."""
        settings, count = self.settings, len(self.settings.seeds)
        one_by_one = count and (settings.cells or settings.finalists)
        ended: list[Finished] = []
        for seeds in range(1, count + 1) if one_by_one else [count]:
            ended = [
                finish_one(seeds == count, replace(study, seeds=settings.seeds[:seeds]))
                for study in studies
            ]
            if most := settings.finalists:
                studies = [_narrowed(one, most) if seeds == 1 else one.study for one in ended]
        return ended

    def studies(self) -> list[Study]:
        """Return a study for each table, with all seeds.

        With ``reuse_lrs``, only the first has learning rates before it is finished.
        """
        settings = self.settings
        cells = [cell.split() for cell in settings.cells] or [[]]
        # The grid's first rates stand for the best ones until the first seed has ranked them.
        kept = settings.lrs[: settings.finalists]
        unranked = dict.fromkeys(settings.methods, kept) if settings.finalists else {}
        return [
            Study(
                self.folder.joinpath(*(["_".join(cell).replace("/", "-")] if cell else [])),
                self._with_data([*self.base, *cell]),
                settings.methods,
                () if number and settings.reuse_lrs else settings.lrs,
                settings.seeds,
                finalists=unranked,
            )
            for number, cell in enumerate(cells)
        ]

    def _with_data(self, overrides: list[str]) -> list[str]:
        data = self._data_of(overrides)
        return overrides if data is None else [*overrides, f"data.path={quoted(data)}"]

    def _data_of(self, overrides: Sequence[str]) -> Path | None:
        """Return the folder of a table's data; null if each is read from its own path."""
        if self.data is None:
            return None
        return self.data / str(choices(leaves(composed(overrides), resolve=False))["data"])


def _narrowed(ended: Finished, finalists: int) -> Study:
    """Return the study whose later seeds are run with each entry's best rates alone.

    Args:
        ended: the study with its first seed.
        finalists: number of rates that are kept for an entry.
    """
    best = {entry: rates[:finalists] for entry, rates in ended.ranked_lrs.items()}
    return replace(ended.study, finalists={**ended.study.finalists, **best})
