"""Studies: their runs, their choice of learning rates, and the numbers of their tables."""

import csv
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import OmegaConf

from fedpeft.commands.shared import listed, numbers
from fedpeft.commands.study import plan_of
from fedpeft.config.compose import composed
from fedpeft.config.load import settings
from fedpeft.data.rows.source import Source
from fedpeft.reporting.figures import plot_study
from fedpeft.reporting.pages import save_comparison, save_study
from fedpeft.reporting.results import Measures, edges, ranked_lrs, run_rows, study_row
from fedpeft.reporting.run_directory import RunDirectory
from fedpeft.reporting.saved_runs import chosen_runs
from fedpeft.reporting.study import Done, Outcome, Study, StudyRun
from fedpeft.reporting.study_plan import Finished, StudyPlan
from fedpeft.reporting.tables import Rows, study_cells
from fedpeft.simulation import ahead

ACCURACY = Measures("accuracy", "accuracy", 1)
NAN = "no client's reply was usable; client 0: training loss is nan: lower lr"


def summary_of(quality: float, validation: float, **more: Any) -> dict[str, Any]:
    """Return the summary of an imagined run of two rounds that sent 3 MB up and 1 MB down."""
    measures = {"client_test_accuracy": quality, "client_validation_accuracy": validation}
    measures |= {"client_test_accuracy_unweighted": 0.375, "client_test_accuracy_worst": 0.125}
    measures |= {"client_test_accuracy_p10": 0.25}
    return {
        "final": {"round": 2, "test_accuracy": quality - 0.1, **measures},
        "best": {"round": 1, "client_test_accuracy": quality - 0.2},
        "initial": {"client_test_accuracy": 0.25},
        "baseline": {"client_test_baseline": 0.3},
        "refused": {},
        "interference": [None, 0.5],
        "parameters": {"trained": [10, 1200]},
        "bytes": {"uplink_bytes": 3_000_000, "downlink_bytes": 1_000_000},
        "seconds": 1.5,
        **more,
    }


class Fake:
    """Launches no run, but writes its directory and notes its method, learning rate and seed.

    Args:
        result: gives the outcome for a learning rate and a seed.
    """

    def __init__(self, result: Callable[[float, int], Outcome]) -> None:
        self.result = result
        self.launched: list[tuple[str, float, int]] = []

    def __call__(self, runs: list[list[str]], *_: Any) -> list[Outcome]:
        return [self.one(overrides) for overrides in runs]

    def one(self, overrides: list[str]) -> Outcome:
        tree = composed(overrides)
        outcome = self.result(tree.lr, tree.seed)
        self.launched.append((tree.method._target_.rpartition(".")[2], tree.lr, tree.seed))
        directory = RunDirectory(tree.run_dir, tree, resume=True)
        directory.keep_lines(-1)
        directory.append({"round": 0, "client_validation_accuracy": 0.1})
        for round in (1, 2):
            directory.append(
                {"round": round, "cohort": [*range(settings(overrides).cohort_size())]}
            )
        if isinstance(outcome, dict):
            directory.finish(outcome)
        return outcome


def steady(lr: float, seed: int) -> Outcome:
    """Give every run the same outcome."""
    return summary_of(0.5, 0.5)


def row(lr: float, validation: float | None, quality: float = 0.5, seed: int = 0) -> dict[str, Any]:
    """Return a row of runs.csv; its run failed if it has no validation.

    Args:
        lr: learning rate.
        validation: the measure that chooses the learning rate.
        quality: the measure on test rows.
        seed: the run's seed.
    """
    cells = {"method": "lora", "lr": lr, "seed": seed, "quality": quality, "trained": 10}
    failed = NAN if validation is None else None
    more = {"global_test": quality / 2, "bytes": 1_000_000, "failed": failed}
    return cells | {"validation": validation} | more


# --- the choice of a learning rate ----------------------------------------------------------------


def test_validation_over_all_seeds_chooses_whatever_the_test_rows_say() -> None:
    """Seed 0 alone and the best single run would choose 0.01, the test rows 0.1."""
    validation = {0.001: (0.60, 0.70, 0.74), 0.01: (0.90, 0.50, 0.45), 0.1: (0.4, 0.4, 0.4)}
    quality = {0.001: 0.50, 0.01: 0.70, 0.1: 0.99}
    rows = [
        row(lr, value, quality[lr], seed)
        for lr, values in validation.items()
        for seed, value in enumerate(values)
    ]
    assert ranked_lrs(rows, 1) == [0.001, 0.01, 0.1]
    assert study_row(rows, 1)["quality"] == 0.50
    assert ranked_lrs(rows, -1) == [0.1, 0.01, 0.001]  # a loss


def test_of_equals_the_smaller_and_first_where_more_seeds_came_to_their_end() -> None:
    assert ranked_lrs([row(0.01, 0.8), row(0.001, 0.8), row(0.1, 0.7)], 1) == [0.001, 0.01, 0.1]
    two = [row(0.001, 0.6), row(0.001, 0.6, seed=1), row(0.01, 0.9), row(0.01, None, seed=1)]
    assert ranked_lrs(two, 1) == [0.001, 0.01]
    assert ranked_lrs([row(0.001, None), row(0.01, 0.1)], 1) == [0.01]
    assert ranked_lrs([row(0.001, None)], 1) == []


def test_equal_shares_of_rows_are_equal() -> None:
    """Sums in another order differ in the last bits, and decide nothing."""
    rows = [row(0.003, 0.83, seed=0), row(0.003, 0.79, seed=1), row(0.01, 0.81 + 1e-12, seed=0)]
    assert ranked_lrs([*rows, row(0.01, 0.81, seed=1)], 1) == [0.003, 0.01]


def test_the_grid_grows_until_its_best_rate_is_inside(tmp_path: Path) -> None:
    """Over both seeds 0.1 is the best, and it is inside only when 1.0 is there."""

    def result(lr: float, seed: int) -> Outcome:
        return summary_of(0.5, -abs(math.log(lr / best[seed])))

    best = {0: 0.1, 1: 0.2}
    study = Study(tmp_path, [], ["lora"], [0.001, 0.01], [0, 1])
    done, rates = study.finish(Fake(result)), []
    for _ in range(5):
        rates.append([run.lr for run, _ in done if run.seed == 0])
        if not (found := edges(done, ACCURACY)):
            break
        study = study.widened(found)
        done = study.finish(Fake(result))
    assert rates == [[0.001, 0.01], [0.001, 0.01, 0.1], [0.001, 0.01, 0.1, 1.0]]
    assert study.size == len(done) == 8


def test_the_grid_grows_downwards_too(tmp_path: Path) -> None:
    study = Study(tmp_path, [], ["lora", "scl"], [0.01, 0.03])
    done = study.finish(Fake(lambda lr, seed: summary_of(0.5, -lr)))
    assert edges(done, ACCURACY) == {"lora": 0.01, "scl": 0.01}
    more = study.widened({"scl": 0.01})
    assert [(run.entry, run.lr) for run in more.runs()] == [
        *(("lora", lr) for lr in (0.01, 0.03)),
        *(("scl", lr) for lr in (0.01, 0.03, 0.0033)),
    ]


def test_an_edge_is_a_warning_below_the_table(tmp_path: Path) -> None:
    study = Study(tmp_path, [], ["lora"], [0.01, 0.03])
    done = study.finish(Fake(lambda lr, seed: summary_of(0.5, lr)))
    text = "\n".join(save_study(study, done, ACCURACY, "").page.notes)
    assert (
        "WARNING: the best learning rate is the grid's first or last, (edge), for lora (0.03)"
        in text
    )
    assert "Untrained, after round 0: lora 0.250." in text
    inside = Study(tmp_path, [], ["lora"], [0.01, 0.03, 0.1])
    done = inside.finish(Fake(lambda lr, seed: summary_of(0.5, -abs(lr - 0.03))))
    assert "WARNING" not in " ".join(save_study(inside, done, ACCURACY, "").page.notes)


OPTIONS: dict[str, str] = dict.fromkeys(("--methods", "--lrs", "--seeds", "--extend", "--data"), "")
CELLS = "study.cells=['data=sst2 num_clients=3','data=mrpc num_clients=4']"


Ranked = Mapping[str, list[float]]


def finished(plan: StudyPlan, *ranked: Ranked) -> list[tuple[bool, Study]]:
    """Return a plan's tables in the order in which it finishes them.

    Args:
        plan: the study's plan.
        ranked: learning rates by entry that came to its end, the best first; one mapping for each
            time that a table is finished, of which the last stays.
    """
    passes: list[tuple[bool, Study]] = []

    def finish_one(last: bool, study: Study) -> Finished:
        passes.append((last, study))
        return Finished(study, ranked[min(len(passes), len(ranked)) - 1] if ranked else {})

    plan.finish_tables(finish_one)
    return passes


def test_tables_grow_one_seed_at_a_time(tmp_path: Path) -> None:
    base = [CELLS, "study.methods=[lora]", "study.common=['num_rounds=2']", "study.extend=1"]
    for name in ("sst2", "mrpc"):
        (tmp_path / name).mkdir()
    options = OPTIONS | {"--seeds": "5,6", "--data": str(tmp_path)}
    plan = plan_of(tmp_path, base, options, "scl")
    names = ["data=sst2_num_clients=3", "data=mrpc_num_clients=4"]
    passes = finished(plan)
    assert [(last, s.folder.name, list(s.seeds)) for last, s in passes] == [
        *((False, name, [5]) for name in names),
        *((True, name, [5, 6]) for name in names),
    ]
    assert plan.settings.extend == 1 and passes[0][1].entries == ["lora"]
    last = composed(passes[-1][1].runs()[-1].overrides)
    assert (last.num_clients, last.num_rounds, last.seed) == (4, 2, 6)
    assert (last.data.subset, last.data.path) == ("mrpc", str(tmp_path / "mrpc"))


def test_the_folder_of_the_data_must_hold_each_table_s_before_the_first_run(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    options = OPTIONS | {"--seeds": "5", "--data": str(tmp_path)}
    plan = plan_of(tmp_path, [CELLS, "study.methods=[lora]"], options, "scl")
    assert [study.folder.name for study in plan.studies()]  # an estimate needs no data
    with pytest.raises(ValueError, match=rf"^--data {tmp_path} must hold a folder mrpc, got none$"):
        plan.check_data()


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("data.path=broken", "data.path=broken: row 7 of test (counted from 1) has an empty text"),
        ("method.rank=4000", ": method.rank must be <= 32"),
        ("partition=dirichlet partition.min_size=99", "with 3 clients and seed=1: 240 training"),
        ("data.label=no_such", "no_such"),
    ],
)
def test_what_is_wrong_with_the_last_table_is_found_before_the_first_one_runs(
    cell: str,
    says: str,
    begun: bool,
    fedpeft: Callable[..., str],
    base: list[str],
    table: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where an earlier command began with the first table, so that one run is checked."""
    fake = Fake(steady)
    monkeypatch.setattr("fedpeft.simulation.launch.run_all", lambda runs, *rest: fake(runs))
    shutil.copytree(table, "broken")
    rows = pd.read_parquet(table / "test.parquet")
    rows.loc[6, "text"] = " "
    rows.to_parquet("broken/test.parquet")
    if begun:
        Path("out/num_clients=2/lora").mkdir(parents=True)
    command = ["study", "--methods", "lora", "--seeds", "1", "run_dir=out"]
    command += [o for o in base if not o.startswith("method")]
    with pytest.raises(SystemExit):
        fedpeft(*command, f"study.cells=['num_clients=2','num_clients=3 {cell}']")
    assert says in capsys.readouterr().err
    assert not fake.launched
    fedpeft(*command, "study.cells=['num_clients=2']")
    assert fake.launched


def test_entries_without_a_folder_are_checked_ahead_with_all_seeds(tmp_path: Path) -> None:
    options = OPTIONS | {"--lrs": "0.1,1", "--seeds": "5,6"}
    base = [CELLS, "study.methods=[lora,fedtt]"]
    plan = plan_of(tmp_path, base, options, "")
    (tmp_path / "data=sst2_num_clients=3" / "lora").mkdir(parents=True)
    keys = ("data=", "method=", "lr=", "seed=")
    runs = [[o for o in overrides if o.startswith(keys)] for overrides in plan.untried()]
    assert runs == [
        [f"data={data}", f"method={method}", "lr=0.1", f"seed={seed}"]
        for data, method in (("sst2", "fedtt"), ("mrpc", "lora"), ("mrpc", "fedtt"))
        for seed in (5, 6)
    ]


def test_a_check_that_is_stopped_names_the_command_that_goes_on(
    fedpeft: Callable[..., str],
    base: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedpeft.simulation.ahead.check_all", stop)
    with pytest.raises(SystemExit):
        fedpeft("study", "--methods", "lora", *(o for o in base if not o.startswith("method")))
    said = capsys.readouterr().err
    assert "stopped before the first run, this goes on: fedpeft study --methods lora" in said


def test_a_partition_that_is_impossible_with_one_seed_is_found_ahead_and_ends_only_its_run(
    base: list[str],
) -> None:
    partition = [*base, "partition=dirichlet", "num_clients=3"]
    runs = [[*partition, f"seed={seed}", f"partition.min_size={50 * seed}"] for seed in (1, 2)]
    with pytest.raises(ValueError, match="with 3 clients and seed=2: 240 training rows"):
        ahead.check_all(runs)
    ahead.check_loaded(runs)


def test_the_rows_of_a_configuration_are_read_once(
    base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub data set is not remembered, so each reading hashes all its rows."""
    read: list[int] = []
    fingerprint = Source.fingerprint
    monkeypatch.setattr(Source, "fingerprint", lambda s: (read.append(1), fingerprint(s))[1])
    ahead.check_all([[*base, f"seed={seed}"] for seed in range(3)])
    assert len(read) == 1


def test_a_run_s_command_holds_no_key_of_the_study(tmp_path: Path) -> None:
    base = ["study.lrs=[0.1]", "num_rounds=3", "++study.methods=[lora]"]
    (run,) = Study(tmp_path, base, ["lora"], lrs=[0.5], seeds=[2]).runs()
    given = ["num_rounds=3", "method=lora", "lr=0.5", "seed=2"]
    assert run.overrides == [*given, f"run_dir='{run.path}'", "resume=true"]


def test_options_come_before_the_configuration_and_a_study_alone_is_one_table(
    tmp_path: Path,
) -> None:
    base = [
        "study.methods=[lora]",
        "study.lrs=[0.1]",
        "num_rounds=3",
        "study.common=['num_rounds=2']",
    ]
    given = OPTIONS | {"--methods": "scl", "--lrs": "1e-3,1e-2", "--seeds": "1,2"}
    ((last, study),) = finished(plan_of(tmp_path, base, given, "lora"))
    assert (last, study.folder, study.entries) == (True, tmp_path, ["scl"])
    assert (study.lrs, study.seeds) == ([1e-3, 1e-2], [1, 2])
    assert composed(study.runs()[0].overrides).num_rounds == 3
    ((_, plain),) = finished(plan_of(tmp_path, [], OPTIONS, "lora,scl"))
    assert (plain.entries, plain.lrs, plain.seeds) == (["lora", "scl"], [], [])


def test_the_first_table_chooses_the_learning_rates_of_the_others(tmp_path: Path) -> None:
    base = [CELLS, "study.methods=[lora,scl]", "study.lrs=[0.1,1]", "study.reuse_lrs=true"]
    plan = plan_of(tmp_path, base, OPTIONS | {"--seeds": "5,6"}, "lora")
    assert [study.size for study in plan.studies()] == [2 * 2 * 2, 2 * 1 * 2]  # for the estimate
    passes = finished(plan, {"scl": [1.0, 0.1]})  # no run of lora came to its end: its own rate
    assert [(last, s.folder.name) for last, s in passes] == [
        (False, "data=sst2_num_clients=3"),
        (True, "data=sst2_num_clients=3"),
        (False, "data=mrpc_num_clients=4"),
        (True, "data=mrpc_num_clients=4"),
    ]
    runs = [[(run.entry, run.lr, run.seed) for run in study.runs()] for _, study in passes]
    assert len(runs[1]) == 8
    page = save_study(passes[3][1], passes[3][1].finish(Fake(steady)), ACCURACY, "").page
    assert "mean of all seeds, in the table data=sst2_num_clients=3." in " ".join(page.notes)
    assert runs[2] == [("lora", 3e-3, 5), ("scl", 1.0, 5)]
    assert runs[3] == [(entry, lr, seed) for entry, lr, _ in runs[2] for seed in (5, 6)]


@pytest.mark.parametrize("cells", [True, False])
def test_later_seeds_are_run_with_the_best_rates_of_the_first(tmp_path: Path, cells: bool) -> None:
    """The second seed ranks otherwise, which changes nothing. An entry's own rate has all seeds.

    No run of scl came to its end with the first seed, so it keeps the grid's first rates.
    """
    floor = "lora+lr=0.5+num_rounds=0"
    base = [f"study.methods=[lora,scl,'{floor}']", "study.lrs=[0.01,0.1,1]", "study.finalists=2"]
    given = OPTIONS | {"--seeds": "5,6,7"}
    plan = plan_of(tmp_path, [*base, *([CELLS] if cells else [])], given, "lora")
    assert plan.studies()[0].size == (3 + 2 + 2) * 2 + 3  # for the estimate
    first_seed, later = {"lora": [1.0, 0.1], floor: [0.5]}, {"lora": [0.01]}
    passes = finished(plan, *[first_seed] * (2 if cells else 1), later)
    assert [len(study.seeds) for _, study in passes] == [
        n for n in (1, 2, 3) for _ in range(1 + cells)
    ]
    last = passes[-1][1]
    runs: dict[str, list[tuple[float, int]]] = {entry: [] for entry in last.entries}
    for run in last.runs():
        runs[run.entry].append((run.lr, run.seed))
    assert runs["lora"] == [(0.01, 5), *((lr, seed) for lr in (0.1, 1) for seed in (5, 6, 7))]
    assert runs["scl"] == [*((lr, seed) for lr in (0.01, 0.1) for seed in (5, 6, 7)), (1, 5)]
    assert runs[floor] == [(0.5, 5), (0.5, 6), (0.5, 7)]
    assert last.size == len(last.runs()) and composed(last.runs()[-1].overrides).lr == 0.5
    grown = last.widened({"lora": 1.0})
    assert [run.seed for run in grown.runs() if run.lr == 10.0] == [5, 6, 7]


def test_a_race_in_the_first_table_gives_the_others_its_best_rate(tmp_path: Path) -> None:
    base = [CELLS, "study.methods=[lora]", "study.lrs=[0.01,0.1]", "study.finalists=1"]
    plan = plan_of(tmp_path, [*base, "study.reuse_lrs=true"], OPTIONS | {"--seeds": "5,6"}, "")
    passes = finished(plan, {"lora": [0.1, 0.01]})
    runs = [[(run.lr, run.seed) for run in study.runs()] for _, study in passes]
    assert runs == [
        [(0.01, 5), (0.1, 5)],
        [(0.01, 5), (0.1, 5), (0.1, 6)],
        [(0.1, 5)],
        [(0.1, 5), (0.1, 6)],
    ]
    page = save_study(passes[1][1], passes[1][1].finish(Fake(steady)), ACCURACY, "").page
    raced = "Seeds after the first were run with each method's best rates of the first alone"
    assert any(raced in note for note in page.notes)
    page = save_study(passes[3][1], passes[3][1].finish(Fake(steady)), ACCURACY, "").page
    assert not any(raced in note for note in page.notes)  # it searched nothing


def test_a_table_of_methods_with_one_rate_each_says_that_none_was_searched(tmp_path: Path) -> None:
    base = [
        "study.methods=['lora+lr=0.1','scl+lr=0.2']",
        "study.lrs=[0.01,0.1]",
        "study.finalists=1",
    ]
    for more in ([], [CELLS, "study.reuse_lrs=true"]):
        plan = plan_of(tmp_path, [*base, *more], OPTIONS | {"--seeds": "5,6"}, "")
        for _, study in finished(plan):
            page = save_study(study, study.finish(Fake(steady)), ACCURACY, "").page
            (note,) = [note for note in page.notes if note.startswith("lr: ")]
            assert note == "lr: each method has one; none was searched."


def test_a_rate_that_was_added_stays_and_counts(
    fedpeft: Callable[..., str], base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 is added with the first seed and diverges; the second seed neither adds it nor 100.

    The output is one document, because a pass of some seeds prints nothing.
    """
    fake = Fake(lambda lr, seed: RuntimeError(NAN) if lr == 10 else summary_of(0.5, lr))
    monkeypatch.setattr("fedpeft.simulation.launch.run_all", lambda runs, *rest: fake(runs))
    rest = [o for o in base if not o.startswith("method")]
    options = ["--methods", "lora+method.rank=4", "--lrs", "0.1,1", "--seeds", "5,6", "--extend=1"]
    text = fedpeft("study", *options, "--json", "study.finalists=1", *rest, "run_dir=out")
    assert [(lr, seed) for _, lr, seed in fake.launched] == [(0.1, 5), (1, 5), (10, 5), (1, 6)]
    (row,) = json.loads(text)["rows"]
    assert (row["lr"], row["ranked_lrs"], row["seeds"]) == (1.0, [1.0, 0.1], 2)


@pytest.mark.parametrize(
    ("validations", "cell"),
    [
        ((0.9, 0.8, 0.7), "0.001 (edge)"),
        ((0.7, 0.9, 0.8), "0.01"),
        ((0.7, 0.8, 0.9), "0.1 (edge)"),
        ((None, 0.8, 0.7), "0.01"),
        ((0.7, 0.8, None), "0.01"),
    ],
)
def test_the_edge_of_the_grid_is_marked(validations: tuple[float | None, ...], cell: str) -> None:
    rows = [row(lr, v) for lr, v in zip((0.001, 0.01, 0.1), validations, strict=True)]
    assert study_cells([study_row(rows, 1)])[0][1] == cell


def test_a_single_learning_rate_has_no_edge_and_needs_no_validation() -> None:
    rows = [row(0.003, None) | {"failed": None}]
    assert study_cells([study_row(rows, 1)])[0][:2] == ["lora", "0.003"]


# --- the numbers ---------------------------------------------------------------------------------


def test_mean_and_sample_deviation_over_the_seeds() -> None:
    rows = [row(0.01, 0.5, quality, seed) for seed, quality in enumerate((0.7, 0.8, 0.9))]
    for one, (size, trained) in zip(rows, ((1, 10), (2, 1200), (6, 10)), strict=True):
        one |= {"bytes": size * 1_000_000, "trained": trained}
    rows.append(row(0.1, 0.4, 0.99))
    result = study_row(rows, 1)
    assert result["quality"] == pytest.approx(0.8)
    assert result["sd"] == pytest.approx(0.1)  # sqrt((0.01 + 0 + 0.01) / 2)
    expected = ["lora", "0.01 (edge)", "0.800 ± 0.100", "0.400 ± 0.050", "3", "1,200", "3.00"]
    assert study_cells([result]) == [expected]
    rows[0]["failed"] = NAN
    (cells,) = study_cells([study_row(rows, 1)])
    assert cells[2:5] == ["0.850 ± 0.071", "0.425 ± 0.035", "2 of 3"]  # sqrt(0.005)
    alone = study_row([row(0.01, 0.5, 0.7) | {"global_test": None}], 1)
    assert study_cells([alone])[0][2:5] == ["0.700", "-", "1"]


def test_files_of_a_study(tmp_path: Path) -> None:
    def result(lr: float, seed: int) -> Outcome:
        if lr == 0.1:
            return RuntimeError(NAN)
        return summary_of(0.6 + seed / 10, lr, baseline={"client_test_baseline": 0.2 + seed / 5})

    study = Study(tmp_path, [], ["lora", "scl"], [0.001, 0.01, 0.1], [0, 1])
    results = save_study(study, study.finish(Fake(result)), ACCURACY, "fedpeft study")
    text = (tmp_path / "study.md").read_text()
    assert (
        "\n| lora | 0.01 | 0.650 ± 0.071 | 0.550 ± 0.071 | 2 | 1,200 | 4.00 |\n| scl | 0.01 |"
        in text
    )
    assert text.count(f"\nFailed: lora, lr 0.1, seed 1: {NAN}\n") == 1
    assert "commonest label scores 0.300." in text and results.baseline == pytest.approx(0.3)
    assert text.endswith("\nMade by: fedpeft study\n")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    names = "method lr seed chosen quality quality_unweighted quality_worst quality_p10 global_test"
    assert list(rows[0]) == [*names.split(), *"validation trained bytes seconds failed".split()]
    values = "lora 0.01 1 True 0.7 0.375 0.125 0.25 0.6 0.01 1200 4000000 1.5".split()
    assert list(rows[3].values()) == [*values, ""]
    assert list(rows[5].values()) == ["lora", "0.1", "1", "False", *[""] * 9, NAN]
    chosen = [
        tmp_path / entry / "lr=0.01" / f"seed={i}" for entry in ("lora", "scl") for i in (0, 1)
    ]
    (tmp_path / "report/tables").mkdir(parents=True)
    (tmp_path / "report/tables/runs.csv").write_text("setting,seed\nlora,0\n")  # of a report
    assert chosen_runs([tmp_path]) == chosen
    assert "last round, mean weighted by rows (runs.csv has the unweighted one too)" in text
    assert len(rows) == 12


def test_further_measures_on_test_rows_stand_below_the_table(tmp_path: Path) -> None:
    """A personal model has none on the server's rows; spreads over clients are no measures.

    The quality stands in the table itself.
    """

    def result(lr: float, seed: int) -> Outcome:
        measures = {"client_test_loss": 1.0 + seed, "client_test_loss_worst": 9.0}
        of_server = {"test_accuracy": 0.5, "test_loss": 3.0 - seed, "test_baseline": 0.1}
        summary = summary_of(0.7, 0.8)
        summary["final"] |= measures | (of_server if lr == 0.1 else {})
        return summary

    study = Study(tmp_path, [], ["lora+lr=0.1", "fedsa_lora+lr=0.2", "scl+lr=1"], [], [0, 1])
    save_study(study, study.finish(Fake(result)), ACCURACY, "fedpeft study")
    text = (tmp_path / "study.md").read_text()
    clients, of_server = "Clients' own rows, more measures", "The data's test rows, more measures"
    assert f"\n{clients}\n\n| method | validation accuracy | loss |\n" in text
    assert "| lora+lr=0.1 | 0.800 ± 0.000 | 1.500 ± 0.707 |\n" in text
    assert f"\n{of_server} of the server's model\n\n| method | loss |\n" in text
    assert "| lora+lr=0.1 | 2.500 ± 0.707 |\n| fedsa_lora+lr=0.2 | - |\n" in text
    assert "\n\n\n" not in text
    assert all(path.is_dir() for path in chosen_runs([tmp_path]))  # 1 is a float too


@pytest.mark.parametrize(
    "text",
    [
        "method,lr,seed\nlora,0.1,0\n",  # written by an earlier version
        "",
        "method,lr,seed,chosen,quality\n",
        "method,lr,seed,chosen,quality\nlora,0.1,0,True,0.5\nlora,0.1,1,Tr",
        "method,lr,seed,chosen,quality\nlora,0.1,0,True,0.5\nlora,0.1,1,True",
        "method,lr,seed,chosen,quality\nlora,0.1,0,True,0.5\nlora,0.1,1,True,0.",
        "method,lr,seed,chosen,quality\nlora,0.1,0,True,0.5\nlora,0.1,1,True\n",
    ],
)
def test_a_report_of_the_chosen_runs_needs_a_whole_study(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="holds no study: none of its folders has study.md"):
        chosen_runs([tmp_path])
    (tmp_path / "study.md").write_text("")
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(ValueError, match="does not say of each run whether it was chosen"):
        chosen_runs([tmp_path])


@pytest.mark.parametrize(("sign", "first"), [(1, 0.02), (-1, 0.01)])
def test_the_best_quality_comes_first(tmp_path: Path, sign: int, first: float) -> None:
    study = Study(tmp_path, [], ["lora+lr=0.01", "lora+lr=0.02"], flat=True)
    done = study.finish(Fake(lambda lr, seed: summary_of(lr, 0.5)))
    for save in (save_study, save_comparison):
        results = save(study, done, ACCURACY._replace(quality_sign=sign), "")
        assert [row["quality"] for row in results.rows] == [first, pytest.approx(0.03 - first)]


def test_a_method_whose_runs_all_fail_is_named_and_a_study_of_such_ends(tmp_path: Path) -> None:
    def result(lr: float, seed: int) -> Outcome:
        return summary_of(0.5, 0.5) if lr == 0.02 else ValueError("no biases\nin its blocks")

    study = Study(tmp_path, [], ["lora", "bitfit+lr=0.02"])
    results = save_study(study, study.finish(Fake(result)), ACCURACY, "")
    assert results.page.cells[1] == ["lora", "-", "failed", "-", "0 of 1", "-", "-"]
    assert "Failed: lora, lr 0.003, seed 0: no biases in its blocks" in results.page.notes
    alone = Study(tmp_path, [], ["lora"])
    for save in (save_study, save_comparison):
        with pytest.raises(RuntimeError, match="no run came to its end. Failed: lora, lr 0.003"):
            save(alone, alone.finish(Fake(result)), ACCURACY, "")


def test_a_mean_without_all_clients_is_no_result() -> None:
    late = "evaluation: no reply within runtime.round_timeout=9 s"
    run = StudyRun("lora", 0.1, 0, Path("x"), [], OmegaConf.create())

    def failed(**more: Any) -> str | None:
        return run_rows([Done(run, summary_of(0.5, 0.5, **more))], ACCURACY)[0]["failed"]

    assert failed() is None
    assert failed(refused={"1": {"0": late}}) is None
    assert failed(refused={"2": {"0": "training loss is nan"}}) is None
    assert failed(refused={"2": {"0": late}}) == late
    assert failed(final={"round": 2}) == "client_test_accuracy was not measured"
    tested = {"round": 2, "client_test_accuracy": 0.5}
    assert failed(final=tested) is None
    searched = [Done(run._replace(lr=lr), summary_of(0.5, 0.5, final=tested)) for lr in (0.1, 0.2)]
    assert (
        run_rows(searched, ACCURACY)[1]["failed"] == "client_validation_accuracy was not measured"
    )


def test_runs_that_the_table_leaves_out_are_counted(tmp_path: Path) -> None:
    """A smaller study writes a smaller table over the larger one."""
    for lrs, others in (([0.1, 0.2], 0), ([0.2], 1)):
        study = Study(tmp_path, [], ["lora"], lrs, [0])
        page = save_study(study, study.finish(Fake(steady)), ACCURACY, "fedpeft study").page
        said = [note for note in page.notes if note.startswith("Not in this table")]
        assert said == [f"Not in this table: 1 run in {tmp_path}."][:others]


def test_a_comparison_counts_bytes_by_each_run_s_own_cohort(tmp_path: Path) -> None:
    study = Study(tmp_path, ["num_clients=4"], ["lora", "lora+clients_per_round=0.5"], flat=True)
    done = study.finish(Fake(steady))
    results = save_comparison(study, done, ACCURACY, "fedpeft compare num_clients=4")
    up = [one["up_bytes_per_client_round"] for one in results.rows]
    assert up == [3_000_000 / 2 / 4, 3_000_000 / 2 / 2]
    text = (tmp_path / "comparison.md").read_text()
    assert (
        "\n| lora | 0.500 | 0.400 | 0.250 | 0.300 | 1 | 1,200 | 375.0 | 125.0 | 4.00 | 2 |\n"
        in text
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "comparison.csv",
        "comparison.md",
        "comparison.png",
        "lora",
        "lora+clients_per_round=0.5",
    ]


def test_a_method_that_sends_nothing_has_a_line_in_the_picture(tmp_path: Path) -> None:
    """A point at 0 MB would be outside of a logarithmic axis, and nothing but zeros has no axis."""

    def drawn(name: str, quality: float, sent: int) -> bytes:
        rows: Rows = [
            {"method": "lora", "quality": 0.5, "sd": 0.1, "bytes": sent},
            {"method": "floor", "quality": quality, "sd": 0.1, "bytes": 0},
        ]
        plot_study(tmp_path / name, rows, "accuracy", 0.3)
        return (tmp_path / name).read_bytes()

    assert drawn("a.png", 0.40, 1_000_000) != drawn("b.png", 0.45, 1_000_000)
    assert drawn("c.png", 0.40, 0) != drawn("d.png", 0.45, 0)  # and warns of nothing


# --- runs of a study -----------------------------------------------------------------------------


def test_every_run_has_its_directory_and_configuration(tmp_path: Path) -> None:
    entries = ["scl", "lora+strategy=local_only+method.targets=[q,v]"]
    study = Study(tmp_path, ["num_rounds=3", "strategy=fedadam"], entries, [1e-5, 0.1], [0, 4])
    runs = study.runs()
    assert [str(run.path.relative_to(tmp_path)) for run in runs[:4]] == [
        "scl/lr=1e-05/seed=0",
        "scl/lr=1e-05/seed=4",
        "scl/lr=0.1/seed=0",
        "scl/lr=0.1/seed=4",
    ]
    last = composed(runs[-1].overrides)
    assert (last.lr, last.seed, last.num_rounds, last.run_dir) == (0.1, 4, 3, str(runs[-1].path))
    assert last.strategy._target_.endswith("LocalOnly")
    assert composed(runs[0].overrides).strategy._target_.endswith("FedAdam")
    plain = Study(tmp_path, [], ["scl", "lora"])
    assert [run.lr for run in plain.runs()] == [composed([f"method={m}"]).lr for m in plain.entries]
    assert Study(tmp_path, [], ["scl"], flat=True).runs()[0].path == tmp_path / "scl"


def test_the_same_command_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def stops(lr: float, seed: int) -> Outcome:
        if seed == 1:
            raise KeyboardInterrupt
        return summary_of(0.7, 0.7)

    study = Study(tmp_path, [], ["lora"], [0.001], [0, 1])
    with pytest.raises(KeyboardInterrupt):
        study.finish(Fake(stops))
    (tmp_path / "lora/lr=0.001/seed=1").mkdir()
    (run,) = study.runs()[1:]
    RunDirectory(str(run.path), composed(run.overrides)).append({"round": 0})
    again = Fake(steady)
    done = study.finish(again)
    assert again.launched == [("LoRA", 0.001, 1)]
    assert [one.outcome["final"]["client_test_accuracy"] for one in done] == [0.7, 0.5]  # type: ignore[index]
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 3
    more = Fake(steady)
    Study(tmp_path, [], ["lora", "scl"], [0.001], [1, 0, 2]).finish(more)
    assert more.launched == [("LoRA", 0.001, 2), *(("SCL", 0.001, seed) for seed in (1, 0, 2))]


def test_nothing_is_launched_where_all_runs_are_there(tmp_path: Path) -> None:
    study = Study(tmp_path, [], ["lora"])
    first = study.finish(Fake(steady))

    def launches(runs: list[list[str]], _: Any) -> list[Outcome]:
        raise AssertionError(runs)

    assert study.finish(launches) == first


def test_training_that_diverged_is_not_run_again_and_other_failures_are(tmp_path: Path) -> None:
    def result(lr: float, seed: int) -> Outcome:
        return RuntimeError(NAN) if seed == 0 else RuntimeError("the worker that was at it died")

    study = Study(tmp_path, [], ["lora"], [0.1], [0, 1, 2])
    first = Fake(result)
    assert [str(one.outcome)[:10] for one in study.finish(first)] == [NAN[:10], *["the worker"] * 2]
    again = Fake(steady)
    outcomes = [one.outcome for one in study.finish(again)]
    assert str(outcomes[0]) == NAN and isinstance(outcomes[0], RuntimeError)
    assert again.launched == [("LoRA", 0.1, 1), ("LoRA", 0.1, 2)]


UNMEASURED = {"refused": {"2": {"1": "evaluation: no reply came in time"}}}


@pytest.mark.parametrize("command", ["study", "compare"])
@pytest.mark.parametrize("why", [RuntimeError("disk is full"), summary_of(0.5, 0.5, **UNMEASURED)])
def test_a_command_of_which_a_run_failed_has_status_2_unless_training_diverged(
    command: str,
    why: Outcome,
    fedpeft: Callable[..., str],
    base: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error names the command that tries again a run that did not come to its end."""
    by_lr: dict[float, Outcome] = {2.0: RuntimeError(NAN), 3.0: why}
    fake = Fake(lambda lr, _: by_lr.get(lr, summary_of(0.5, 0.5)))
    monkeypatch.setattr("fedpeft.simulation.launch.run_all", lambda runs, *rest: fake(runs))
    methods = ["--methods", "lora+lr=1,lora+lr=2,lora+lr=3", "method.rank=4"]
    with pytest.raises(SystemExit) as ended:
        fedpeft(command, *methods, *(o for o in base if not o.startswith("method")))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "fedpeft: 1 run failed, for the reasons in the" in said
    again = shlex.split(said.partition(" is tried again by: fedpeft ")[2])
    fake = Fake(lambda *_: summary_of(0.5, 0.5))
    if isinstance(why, Exception):
        fedpeft(*again)
        assert [lr for _, lr, _ in fake.launched] == [3.0]


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_another_configuration_is_refused_and_kept(tmp_path: Path, finished: bool) -> None:
    outcome = summary_of(0.5, 0.5) if finished else RuntimeError("the worker that was at it died")
    Study(tmp_path, ["num_rounds=2"], ["lora"], flat=True).finish(Fake(lambda *_: outcome))
    other = Study(tmp_path, ["num_rounds=3"], ["lora"], flat=True)
    rule = "lora holds a run with num_rounds=2, and now it is 3: give another run_dir, or remove"
    with pytest.raises(ValueError, match=rule):
        other.finish(Fake(steady))
    assert (tmp_path / "lora/metrics.jsonl").exists()
    added = Study(tmp_path, ["num_rounds=2", "method.bias=x"], ["lora"], flat=True)
    with pytest.raises(ValueError, match="method.bias=-, and now it is x"):
        added.finish(Fake(steady))


@pytest.mark.parametrize(
    ("study", "says"),
    [
        (Study(Path(), [], ["lora", "lora"]), "named once, got lora/lr=0.003/seed=0 twice"),
        (Study(Path(), [], ["lora"], [0.1, 0.10]), "got lora/lr=0.1/seed=0 twice"),
        (Study(Path(), ["lr=0.1"], ["lora"], [0.1]), "lr must be given once, got lr=0.1 and --lrs"),
        (Study(Path(), [], ["lora+seed=3"], [], [1]), "given once, got seed=3 and --seeds"),
        (Study(Path(), [], ["lora+runtime=ray"]), "same for all runs of a study, got runtime=ray"),
        (Study(Path(), [], ["lora+lrr=3"]), "unknown key lrr"),
        (Study(Path(), [], ["nope"]), "method must be one of .* got nope"),
    ],
)
def test_studies_that_are_refused(study: Study, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        study.runs()


def test_lists_of_the_command_line() -> None:
    assert listed("lora,hetlora+method.ranks=[4,8],scl") == [
        "lora",
        "hetlora+method.ranks=[4,8]",
        "scl",
    ]
    assert numbers("--lrs", "1e-4,3e-3", float) == [1e-4, 3e-3]
    assert numbers("--seeds", "", int) == []
    with pytest.raises(ValueError, match="--seeds must be numbers by commas, got 0,x"):
        numbers("--seeds", "0,x", int)


def test_reading_results_needs_no_torch() -> None:
    code = "import sys, fedpeft.commands.results, fedpeft.commands.saved, fedpeft.commands.study"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- with real runs ------------------------------------------------------------------------------


def times_of(folder: Path) -> dict[str, int]:
    """Return the times at which the lines of the runs below a folder were written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("metrics.jsonl")}


@pytest.mark.slow
def test_a_real_study_with_runs_that_diverge(fedpeft: Callable[..., str], base: list[str]) -> None:
    rest = [o for o in base if not o.startswith("method=")]
    methods = ["--methods", "scl,scl+strategy=local_only", "method.rank=8"]
    arguments = ["study", *methods, "--lrs=1e30,1e-3,1e-2", "--seeds", "0,1", *rest]
    text = fedpeft(*arguments)
    folder = Path("runs/study")
    rows = list(csv.DictReader((folder / "runs.csv").read_text().splitlines()))
    assert [bool(one["failed"]) for one in rows] == [float(one["lr"]) > 1 for one in rows]
    assert "training loss is nan" in rows[0]["failed"]
    assert "no client's reply was usable; client 0: " in text
    for one in rows[2:6]:
        path = folder / "scl" / f"lr={one['lr']}" / f"seed={one['seed']}"
        final = json.loads((path / "summary.json").read_text())["final"]
        assert float(one["quality"]) == final["client_test_accuracy"]
        assert float(one["validation"]) == final["client_validation_accuracy"]
    up = {one["method"]: float(one["bytes"]) for one in rows if not one["failed"]}
    assert up["scl+strategy=local_only"] < up["scl"] / 2

    table, times = (folder / "study.md").read_text(), times_of(folder)
    assert len(times) == len(rows) == 12
    results = json.loads(fedpeft(*arguments, "--json"))
    assert times_of(folder) == times  # nothing ran again
    assert [one["of"] for one in results["rows"]] == [2, 2]
    assert (folder / "study.md").read_text() == table


def test_a_run_alone_that_diverges_ends_the_command(
    fedpeft: Callable[..., str], base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        fedpeft("run", *base, "method.rank=4", "lr=1e30")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("fedpeft: no client's reply was usable; client 0: ")
