"""Values that papers report, beside the values of a report's settings."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf

from fedpeft.config.choices import choices
from fedpeft.config.compose import CONF
from fedpeft.reporting.report.settings import ROWS, Runs, Setting
from fedpeft.reporting.report.table import Table, Text, plain, spread
from fedpeft.reporting.tables import Rows

FILE = CONF / "published.yaml"
FORMS = ("_generated", "_teacher_forced")  # ends of text measures, which papers do not tell apart


def published_table(runs: Runs) -> Table | None:
    """Return the values of papers for the same data, clients and method; null if there are none.

    Runs that bound a table (each client alone, all rows in one place) have no value there, and no
    server algorithm but FedAvg has.
    """
    measure = re.sub(rf"({'|'.join(FORMS)})$", "", runs.measure)
    rows: Rows = []
    for setting in runs.settings:
        spreads = {key: setting.spread(key) for key in ROWS}
        for entry, value in _values(setting, measure):
            rows.append(
                {
                    "setting": setting.name,
                    **{key: mean for key, (mean, _) in spreads.items()},
                    **{f"{key}_sd": sd for key, (_, sd) in spreads.items()},
                    "published": value,
                    "model": entry["model"],
                    "source": entry["source"],
                    "note": entry.get("note", ""),
                }
            )
    if not rows:
        return None
    columns: dict[str, Text] = {
        "setting": plain("setting"),
        "model of the paper": plain("model"),
        "source": lambda row: row["source"] + (f" ({row['note']})" if row["note"] else ""),
        **{ROWS[key]: spread(key) for key in ROWS if any(row[key] is not None for row in rows)},
        "published": lambda row: f"{row['published']:.3f}",
    }
    notes = [
        f"The columns of test rows hold our {measure.replace('_', ' ')}. A paper measures one "
        "model on one set, so its value belongs beside the server's column. Published values are "
        "those of the same data set, number of clients and method, and of iid clients only if the "
        "clients here are iid. Only a run of the same model, rows, rounds and kind of measure can "
        "be compared with them; elsewhere compare the order of methods within a column. "
        "conf/published.yaml has the values."
    ]
    return Table("published", "Measured and published", columns, rows, notes, texts=3)


def _values(setting: Setting, measure: str) -> Iterator[tuple[Mapping[str, Any], float]]:
    """Yield the published entries that fit a setting, and their values of a measure."""
    values = setting.runs[0].settings
    chosen = choices(values)
    if chosen["strategy"] != "fedavg":
        return
    published: Any = OmegaConf.to_container(OmegaConf.load(FILE))
    like = (chosen["data"], values["num_clients"], chosen["partition"] == "iid")
    for entry in published:
        if (entry["data"], entry["num_clients"], entry["iid"]) != like:
            continue
        for name, measures in entry["values"].items():
            method, *wanted = name.split("+")
            fits = all(
                str(values.get(key)) == value for key, value in (w.split("=") for w in wanted)
            )
            if method == chosen["method"] and fits and measure in measures:
                yield entry, measures[measure]
