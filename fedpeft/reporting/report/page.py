"""``report.html``: one page that needs no other file and asks no host for anything."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from fedpeft.reporting.figures import COLOURS
from fedpeft.reporting.report.chart import Chart, dashes
from fedpeft.reporting.report.plotly_form import form
from fedpeft.reporting.report.settings import Runs
from fedpeft.reporting.report.table import Table
from fedpeft.reporting.tables import counted
from fedpeft.versions import SHOWN

MOST_ROWS = 20  # rows of a table that are shown before the reader asks for more


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title: the section's heading.
        tables: come first.
        charts: come after the tables.
        notes: sentences between them.
    """

    title: str
    tables: Sequence[Table] = field(default=())
    charts: Sequence[Chart] = field(default=())
    notes: Sequence[str] = field(default=())

    @property
    def id(self) -> str:
        """Name of the heading for links."""
        return self.title.lower().replace(" ", "-")


def html(runs: Runs, sections: Sequence[Section]) -> str:
    """Return the page; every value is escaped.

    Args:
        runs: the report's runs.
        sections: the sections in their order; a section without content is left out.
    """
    folder = Path(__file__).parent
    jinja = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return jinja.get_template("page.html.j2").render(
        title=f"{runs.title.capitalize()} of {counted(len(runs.settings), 'setting')}",
        facts=_facts(runs),
        sections=[s for s in sections if s.tables or s.charts or s.notes],
        left_out=len(runs.left_out),
        most_rows=MOST_ROWS,
        legend=[
            (s.name, COLOURS[i % len(COLOURS)], " ".join(map(str, dashes(i))))
            for i, s in enumerate(runs.settings)
        ],
        forms={chart.name: form(chart) for section in sections for chart in section.charts},
        plotly=get_plotlyjs(),
    )


def _facts(runs: Runs) -> str:
    """Return a line on the runs: how many, of which data, made with which versions."""
    summaries = [run.final_summary for setting in runs.settings for run in setting.runs]
    parts = [counted(len(summaries), "run")]
    data = {s["data"]["sha256"][:12] for s in summaries if s.get("data", {}).get("sha256")}
    parts.append(f"data, by SHA-256: {', '.join(sorted(data)) or 'not saved'}")
    weights = {s["weights"] for s in summaries if "weights" in s}
    parts.append(f"weights: {', '.join(sorted(weights)) or 'not saved'}")
    made = {f"{n} {v}" for s in summaries for n, v in s.get("versions", {}).items() if n in SHOWN}
    parts.append(f"made with {', '.join(sorted(made)) or 'versions that were not saved'}")
    return "; ".join(parts) + "."
