"""The tables of one ``fedpeft study``: a study for each cell, one seed at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedpeft.config.choices import choices
from fedpeft.config.load import composed, leaves
from fedpeft.config.load import settings as settings_of
from fedpeft.config.overrides import quoted
from fedpeft.config.schema import Studying
from fedpeft.reporting.study import Study, listed, numbers


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

    def passes(self) -> Iterator[tuple[bool, Study]]:
        """Yield every table with the first seed, then with the first two, and so on.

        So a command that is stopped leaves tables of whole seeds. A run that is there is not run
        again. Without cells there is one table, at once with all seeds.

        Yields:
            True if it is the last of its table, and the table's study.
        """
        count = len(self.settings.seeds)
        for seeds in range(1, count + 1) if self.settings.cells and count else [count]:
            for study in self.studies():
                yield seeds == count, replace(study, seeds=study.seeds[:seeds])

    def studies(self) -> list[Study]:
        """Return a study for each table, with all seeds."""
        settings = self.settings
        cells = [cell.split() for cell in settings.cells] or [[]]
        return [
            Study(
                self.folder.joinpath(*(["_".join(cell).replace("/", "-")] if cell else [])),
                self._with_data([*self.base, *cell]),
                settings.methods,
                settings.lrs,
                settings.seeds,
            )
            for cell in cells
        ]

    def _with_data(self, overrides: list[str]) -> list[str]:
        if self.data is None:
            return overrides
        name = choices(leaves(composed(overrides), resolve=False))["data"]
        return [*overrides, f"data.path={quoted(self.data / str(name))}"]
