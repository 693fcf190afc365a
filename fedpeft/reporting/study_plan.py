"""The tables of one ``fedpeft study``: a study for each cell."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedpeft.config.choices import choices
from fedpeft.config.load import composed, leaves
from fedpeft.config.load import settings as settings_of
from fedpeft.config.overrides import quoted
from fedpeft.config.schema import Studying
from fedpeft.reporting.study import Study, listed, numbers

Finish = Callable[[bool, Study], Mapping[str, float]]


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

    @classmethod
    def of(
        cls, folder: Path, base: Sequence[str], options: Mapping[str, str], methods: str
    ) -> "StudyPlan":
        """Return the plan of a command.

        Args:
            folder: holds the runs.
            base: overrides of every run.
            options: values of ``--methods``, ``--lrs``, ``--seeds``, ``--extend`` and ``--data``,
                each of which comes before the configuration unless it is empty.
            methods: entries by commas, if neither names any.

        Raises:
            ValueError: an option's value is none.
        """
        chosen = settings_of(base).study
        changes = {
            "methods": listed(options["--methods"]) if options["--methods"] else chosen.methods,
            "lrs": numbers("--lrs", options["--lrs"], float) or chosen.lrs,
            "seeds": numbers("--seeds", options["--seeds"], int) or chosen.seeds,
            "extend": (numbers("--extend", options["--extend"], int) or [chosen.extend])[0],
        }
        changes["methods"] = changes["methods"] or listed(methods)
        data = Path(options["--data"]) if options["--data"] else None
        return cls(folder, [*chosen.common, *base], replace(chosen, **changes), data)

    def finish(self, finish_one: Finish) -> None:
        """Finish every table with the first seed, then with two, and so on, by ``finish_one``.

        So a command that is stopped leaves tables of whole seeds. A run that is there is not run
        again. Without cells there is one table, at once with all seeds. With ``reuse_lrs`` the
        first table is finished before the others, because they take its learning rates. An entry
        of which no run came to its end there has its method's own rate in the others.

        Args:
            finish_one: finishes a table's study, and returns each entry's best learning rate, where
                a run came to its end. It is also told whether this is the table's last time.
        """
        studies = self.studies()
        if self.settings.reuse_lrs:
            first, *studies = studies
            more = {entry: [lr] for entry, lr in finish_one(True, first).items()}
            name = first.folder.name
            studies = [replace(study, more=more, rates_from=name) for study in studies]
        for last, study in self._passes(studies):
            finish_one(last, study)

    def _passes(self, studies: Sequence[Study]) -> Iterator[tuple[bool, Study]]:
        count = len(self.settings.seeds)
        for seeds in range(1, count + 1) if self.settings.cells and count else [count]:
            for study in studies:
                yield seeds == count, replace(study, seeds=study.seeds[:seeds])

    def studies(self) -> list[Study]:
        """Return a study for each table, with all seeds.

        With ``reuse_lrs``, only the first has learning rates before it is finished.
        """
        settings = self.settings
        cells = [cell.split() for cell in settings.cells] or [[]]
        return [
            Study(
                self.folder.joinpath(*(["_".join(cell).replace("/", "-")] if cell else [])),
                self._with_data([*self.base, *cell]),
                settings.methods,
                () if number and settings.reuse_lrs else settings.lrs,
                settings.seeds,
            )
            for number, cell in enumerate(cells)
        ]

    def _with_data(self, overrides: list[str]) -> list[str]:
        if self.data is None:
            return overrides
        name = choices(leaves(composed(overrides), resolve=False))["data"]
        return [*overrides, f"data.path={quoted(self.data / str(name))}"]
