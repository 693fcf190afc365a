"""The clients of the last round, from the runs' tables of clients."""

from fedpeft.reporting.clients import read_columns
from fedpeft.reporting.report.settings import Setting
from fedpeft.reporting.saved_runs import SavedRun


def last_round(setting: Setting, measure: str) -> list[tuple[float, str]]:
    """Return each client's measure on its test rows, with a text that names client and seed.

    Args:
        setting: gives the runs; a run that saved no table of clients adds nothing.
        measure: the measure's name, without ``test_``.
    """
    key = f"test_{measure}"
    return [
        (value, f"client {client}, seed {seed}")
        for run, seed in zip(setting.runs, setting.seeds, strict=True)
        for client, value in _measured(run, key)
    ]


def _measured(run: SavedRun, key: str) -> list[tuple[int, float]]:
    try:
        table = read_columns(run.path, ("round", "client", key))
    except ValueError:  # an older run, or one whose table was not kept
        return []
    if key not in table.column_names:
        return []
    table = table.filter(table[key].is_valid())
    rounds = table["round"].to_numpy()
    last = table.filter(rounds == rounds.max(initial=0))
    return list(zip(last["client"].to_pylist(), last[key].to_pylist(), strict=True))
