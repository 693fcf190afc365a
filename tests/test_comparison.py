"""``scripts/comparison.py``: what is run, what is chosen, and the numbers of its tables."""

import csv
import importlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config.load import ConfigError, load_config
from fedpeft.engine.session import open_session
from fedpeft.reporting.run_directory import read_metrics

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
comparison = importlib.import_module("comparison")
page = importlib.import_module("comparison_page")
picture = importlib.import_module("comparison_picture")
comparison_rows = importlib.import_module("comparison_rows")
comparison_run = importlib.import_module("comparison_run")

Line = dict[str, Any]
Job = comparison.Job
LOWER, LR, HIGHER = 3e-4, 1e-3, 3e-3  # of comparison.GRID, whose last is 1e-2
QUALITIES = (0.7, 0.8, 0.9)


def line_of(job: Any, quality: float | None, **more: Any) -> Line:
    """A made-up run's line: 1 MB up and as much down by round 4, 2 MB each by round 8."""
    found = job._asdict() | {"overrides": "", "device": "cpu"}
    if quality is None:
        return found | {"failed": "training loss is nan"} | more
    measures = {
        "quality": quality,
        "validation": quality,
        "global_test": quality - 0.1,
        "baseline": {"client_test_baseline": 0.5 + job.seed / 10, "test_baseline": 0.4},
        "curve": [[0, 0, 0.1], [4, 2_000_000, quality - 0.2], [8, 4_000_000, quality]],
        "trained": [10, 10],
        "refused": 0,
        "bytes": {"uplink_bytes": 2_000_000, "downlink_bytes": 2_000_000, "evaluation_bytes": 9},
        "seconds": 1.0,
        "versions": {"torch": "2.13"},
    }
    return found | measures | more


def runs(
    method: str, data: str = "sst2", qualities: Iterable[float | None] = QUALITIES, **more: Any
) -> list[Line]:
    """A method's three seeds at LR."""
    return [
        line_of(Job(method, data, LR, seed), quality, **more)
        for seed, quality in enumerate(qualities)
    ]


def result(*found: list[Line], aliases: dict[str, list[str]] | None = None) -> Any:
    lines = sum(found, [])
    return comparison_rows.Result(lines, {line["method"]: LR for line in lines}, aliases or {})


def row_of(result: Any, method: str, data: str = "sst2") -> Any:
    return next(row for row in comparison_rows.rows(result, data) if row.method == method)


def search(method: str, *validations: float | None, **more: Any) -> list[Line]:
    """The runs at the grid's learning rates, with these measures on validation rows."""
    jobs = [Job(method, "sst2", lr, 0) for lr in comparison.GRID]
    return [
        line_of(job, value, **({} if value is None else {"validation": value}), **more)
        for job, value in zip(jobs, validations, strict=True)
    ]


# --- which learning rate -------------------------------------------------------------------------


def test_the_learning_rate_is_the_best_by_validation_whatever_the_test_rows_say() -> None:
    found = search("scl", 0.6, 0.8, 0.7, 0.5)
    for line, quality in zip(found, (0.6, 0.5, 0.7, 0.99), strict=True):
        line["quality"] = line["global_test"] = quality
    assert comparison.best_lr(found, "scl") == LR


def test_neither_another_seed_nor_the_second_data_set_nor_another_method_chooses() -> None:
    found = search("scl", 0.6, 0.8, 0.7, 0.5)
    found += [line_of(Job("scl", "sst2", HIGHER, 1), 0.99)]
    found += [line_of(Job("scl", "mrpc", HIGHER, 0), 0.99)]
    found += [line_of(Job("lora", "sst2", HIGHER, 0), 0.99)]
    found += [line_of(Job("scl", "sst2", 0.5, 0), 0.99)]  # not of the grid
    assert comparison.best_lr(found, "scl") == LR


def test_of_equals_the_smaller_and_never_a_diverged_one() -> None:
    assert comparison.best_lr(search("scl", 0.6, 0.8, 0.8, 0.8), "scl") == LR
    assert comparison.best_lr(search("scl", None, None, 0.1, None), "scl") == HIGHER
    assert comparison.best_lr(search("scl", None, None, None, None), "scl") is None


# --- the numbers ---------------------------------------------------------------------------------


def test_mean_and_spread_over_the_seeds() -> None:
    found = runs("scl")
    for line, sent, trained in zip(found, (1, 2, 6), ([5, 9], [4, 8], [5, 7]), strict=True):
        line["bytes"] = {"uplink_bytes": sent * 10**6, "downlink_bytes": 10**6, "evaluation": 9}
        line["trained"] = trained
    row = row_of(result(found), "scl")
    assert row.quality == pytest.approx(0.8)
    assert row.quality_sd == pytest.approx(0.1)  # sqrt((0.01 + 0 + 0.01) / 2)
    assert (row.quality_min, row.quality_max) == (0.7, 0.9)
    assert row.global_test == pytest.approx(0.7)
    assert row.bytes == 4_000_000  # (2 + 3 + 7) / 3
    assert row.trained == (4, 9)
    cells = page.cells(result(found), row)
    assert cells == ["scl", "0.001", "0.800 ± 0.100", "0.700", "4-9", "4.0", "-"]


def test_a_personal_method_has_no_global_test() -> None:
    found = result(runs("fedsa_lora", global_test=None))
    assert page.cells(found, row_of(found, "fedsa_lora"))[3] == "-"


def test_diverged_runs_are_left_out_and_counted() -> None:
    found = result(runs("lora"), runs("scl", qualities=(0.7, None, 0.8)))
    row = row_of(found, "scl")
    assert (row.runs, row.diverged) == (3, 1)
    assert page.cells(found, row)[2] == "0.750 ± 0.071 (2 of 3)"  # 0.05 sqrt(2)
    found = result(runs("lora"), runs("scl", qualities=(None, None, None)))
    cells = page.cells(found, row_of(found, "scl"))
    assert cells == ["scl", "0.001", "diverged", "-", "-", "-", "-"]


def test_rows_stand_by_mean_quality_with_the_baseline_among_them() -> None:
    found = result(
        runs("diverged", qualities=(None, None, None)),
        runs("poor", qualities=(0.4, 0.5, 0.6)),
        runs("lora"),
        runs("best", qualities=(0.9, 0.9, 0.9)),
    )
    rows = comparison_rows.rows(found, "sst2")
    names = [row.method for row in rows]
    assert names == ["best", "lora", comparison_rows.BASELINE, "poor", "diverged"]
    assert rows[2].quality == pytest.approx(0.6)  # 0.5, 0.6 and 0.7 by seed
    assert page.cells(found, rows[2])[1:] == ["-", "0.600 ± 0.100", "0.400", "-", "-", "-"]


# --- bytes to 95 % of LoRA's quality -------------------------------------------------------------


def test_bytes_until_the_first_evaluation_that_is_good_enough() -> None:
    curve = [[0, 0, 0.1], [4, 10, 0.5], [8, 20, 0.4], [12, 30, 0.6]]
    assert comparison_rows.bytes_to(0.5, curve) == 10
    assert comparison_rows.bytes_to(0.51, curve) == 30
    assert comparison_rows.bytes_to(0.61, curve) is None
    assert comparison_rows.bytes_to(None, curve) is None


def test_bytes_to_the_share_are_the_median_over_the_seeds_that_reach_it() -> None:
    """LoRA's mean is 0.8, its share 0.76."""
    curves = (
        [[4, 3_000_000, 0.75], [8, 6_000_000, 0.77]],
        [[4, 2_000_000, 0.77], [8, 4_000_000, 0.70]],
        [[4, 1_000_000, 0.75], [8, 2_000_000, 0.759]],
    )
    two = runs("scl")
    for line, curve in zip(two, curves, strict=True):
        line["curve"] = curve
    found = result(runs("lora"), two, runs("bitfit", qualities=(0.7, 0.75, 0.759)))
    assert comparison_rows.threshold(found, "sst2") == pytest.approx(0.76)
    row = row_of(found, "scl")
    assert (row.bytes_to_goal, row.reached) == (4_000_000, 2)
    assert page.cells(found, row)[-1] == "4.0 (2/3)"
    row = row_of(found, "bitfit")
    assert (row.bytes_to_goal, row.reached) == (None, 0)
    assert page.cells(found, row)[-1] == "-"
    row = row_of(found, "lora")  # seeds 0.8 and 0.9, both in round 8
    assert page.cells(found, row)[-1] == "4.0 (2/3)"


def test_all_three_reach_it_and_the_median_is_the_middle_one() -> None:
    found = result(runs("lora"), runs("scl", qualities=(0.8, 0.8, 0.96)))
    found.found[-1]["curve"][1][2] = 0.761
    found.found[-2]["curve"][2][1] = 9_000_000
    assert row_of(found, "scl").bytes_to_goal == 4_000_000  # of 4, 9 and 2 million
    assert row_of(found, "scl").reached == 3


def test_the_ends_of_the_table_have_no_bytes() -> None:
    found = result(runs("lora"), runs("local_only"), runs("centralized"))
    for name in comparison.BOUNDS:
        cells = page.cells(found, row_of(found, name))
        assert cells == [name, "0.001", "0.800 ± 0.100", "0.700", "10", "-", "-"]


def test_the_page_says_where_the_goal_lies_below_the_commonest_label() -> None:
    """LoRA's share is 0.76 of 0.8 and 0.57 of 0.6, the commonest label has 0.6."""
    found = result(runs("lora"), runs("lora", "mrpc", (0.6, 0.6, 0.6)))

    def note(data: str) -> str:
        return " ".join(page.goal_notes(found, data, comparison_rows.rows(found, data)))

    assert note("sst2") == "95 % of LoRA's quality is 0.760."
    assert note("mrpc").startswith("95 % of LoRA's quality is 0.570. **The commonest label alone")
    alone = result(runs("scl"))
    assert row_of(alone, "scl").bytes_to_goal is None
    rows = comparison_rows.rows(alone, "sst2")
    assert page.goal_notes(alone, "sst2", rows) == ["lora is not there: no bytes to its quality."]


# --- the page ------------------------------------------------------------------------------------


def test_learning_rates_with_the_chosen_one_bold_and_the_edge_marked() -> None:
    found = search("lora", 0.6, 0.8, 0.7, None) + search("full", 0.9, 0.8, 0.7, 0.6)
    found += search("scl", 0.6, 0.7, 0.8, 0.9) + search("flora", None, None, None, None)
    chosen = {name: comparison.best_lr(found, name) for name in ("scl", "lora", "full", "flora")}
    table = page.lr_table(comparison_rows.Result(found, chosen, {"scl": ["alike"]})).splitlines()
    assert table[0] == "| method | 0.0003 | 0.001 | 0.003 | 0.01 | chosen |"
    assert table[2:] == [
        "| flora | diverged | diverged | diverged | diverged | - |",
        "| full | **0.900** | 0.800 | 0.700 | 0.600 | 0.0003 (edge) |",
        "| lora | 0.600 | **0.800** | 0.700 | diverged | 0.001 |",
        "| scl = alike | 0.600 | 0.700 | 0.800 | **0.900** | 0.01 (edge) |",
    ]
    edge = comparison_rows.Result(runs("scl"), {"scl": 1e-2}, {})
    assert page.cells(edge, row_of(edge, "scl"))[1] == "0.01 (edge)"


def whole(method: str, *validations: float | None, **more: Any) -> list[Line]:
    """All runs of a method whose chosen learning rate is LR."""
    found = search(method, *validations, **more)
    known = {comparison.job_of(line) for line in found}
    found += [
        line_of(job, 0.8, **more) for job in comparison.repeats([method], found) if job not in known
    ]
    return found


def test_files_of_all_methods_whose_runs_are_there(tmp_path: Path) -> None:
    found = whole("lora", 0.6, 0.8, 0.7, None) + whole("scl", 0.5, 0.8, 0.7, 0.6)
    found += whole("bitfit", 0.5, 0.8, 0.7, 0.6)[:-1] + whole("flora", None, None, None, None)
    found[1]["device"], found[2]["refused"] = "GPU", 3
    comparison.write(tmp_path, found, {"scl": ["alike"], "lora": [], "bitfit": [], "flora": []})
    text = (tmp_path / "comparison.md").read_text()
    assert text.count("\n| lora | 0.001 | 0.800 ± 0.000 | 0.700 | 10 | 4.0 | 4.0 (3/3) |\n") == 2
    assert text.count("\n| scl = alike | 0.001 | 0.800 ± 0.000 |") == 2
    assert text.count("\n| flora | - | diverged | - | - | - | - |\n") == 2
    assert "\n- Runs by device: cpu: 29, GPU: 1.\n" in text  # 9 + 9 + 8 + 4
    assert "\n- Versions of 25 runs that came to an end: torch 2.13.\n" in text
    assert "training diverged: lora sst2 lr 0.003 seed 0.\n" in text
    assert "not all of their runs are there: bitfit, local_only, centralized.\n" in text
    assert "\n| bitfit" not in text
    assert "\n- lora sst2 lr 0.01 seed 0: training loss is nan\n" in text
    config = load_config("experiment=comparison")
    assert f", {config.num_rounds} rounds of {config.local_steps} steps of " in text
    with (tmp_path / "comparison.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "lora"]
    assert [(row["data"], row["reached"], row["trained"]) for row in rows] == [
        ("sst2", "3", "10"),
        ("mrpc", "3", "10"),
    ]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert f"num_rounds: {config.num_rounds}\n" in (tmp_path / "config.yaml").read_text()


def test_names_of_one_configuration_are_run_once() -> None:
    names = comparison.different_methods()
    assert [name for name, others in names.items() if others] == ["fedprompt"]
    assert names["fedprompt"] == ["prompt"] and "prompt" not in names
    assert {"lora", "flasc", "hetlora", "flexlora"} <= names.keys()


def test_names_in_the_picture_cover_neither_points_nor_each_other() -> None:
    boxes = [picture.Box.around(100 + 3 * i, 100 + 2 * i, 8, 8) for i in range(9)]
    taken = picture.Taken(list(boxes), [])
    panel = picture.Box(0, 0, 140, 300)  # no room on the right
    for point in boxes:
        x, y = point.left + 4, point.bottom + 4
        places = picture.places(x, y, 40, 10)
        name = picture.cheapest(places, x, y, taken, panel)
        assert name.within(panel) and not any(name.meets(other) for other in taken.solid)
        taken.solid.append(name)


# --- the runs ------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """Lists of the jobs of each pass, in place of whose runs lines are made up."""
    passes: list[list[Any]] = []

    def run_all(function: Callable[..., str], tasks: list[Any], processes: int) -> list[Any]:
        passes.append([job for job, _ in tasks])
        for job, paths in tasks:
            quality = None if job.method == "full" else 1 - abs(job.lr - LR)
            with paths.runs.open("a") as file:
                file.write(json.dumps(line_of(job, quality)) + "\n")
        return []

    monkeypatch.setattr(comparison, "run_all", run_all)
    return passes


def test_two_passes_that_run_nothing_twice_and_then_only_the_tables(
    asked: list[list[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = ["comparison.py", "data", "--methods", "scl,lora,full", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(comparison, "different_methods", lambda: {"lora": []})  # takes seconds
    monkeypatch.setattr(comparison, "draw", lambda path, result: None)  # as well
    comparison.main()
    searched, repeated = asked
    assert searched == [
        Job(name, "sst2", lr, 0) for name in ("scl", "lora", "full") for lr in comparison.GRID
    ]
    assert sorted(repeated) == sorted(
        Job(name, data, LR, seed)
        for name in ("scl", "lora")
        for data, seeds in (("sst2", (1, 2)), ("mrpc", (0, 1, 2)))
        for seed in seeds
    )
    before = (tmp_path / "runs.jsonl").read_bytes()
    table = (tmp_path / "comparison.md").read_bytes()
    (tmp_path / "comparison.md").unlink()
    comparison.main()
    assert asked[2:] == [[], []]
    assert (tmp_path / "runs.jsonl").read_bytes() == before
    assert (tmp_path / "comparison.md").read_bytes() == table


def test_slow_methods_first_and_before_them_those_without_a_run() -> None:
    found = [
        line_of(Job("quick", "sst2", LR, 0), 0.5, seconds=2.0),
        line_of(Job("slow", "sst2", LR, 0), 0.5, seconds=9.0),
        line_of(Job("slow", "sst2", HIGHER, 0), None),
    ]
    jobs = [Job(name, "mrpc", LR, 0) for name in ("quick", "new", "slow", "newer")]
    names = [job.method for job in comparison.slow_first(jobs, found)]
    assert names == ["new", "newer", "slow", "quick"]
    assert comparison.slow_first(jobs, []) == jobs


def test_a_process_that_dies_takes_only_its_own_run(capsys: pytest.CaptureFixture[str]) -> None:
    died = "__import__('os')._exit(1)"
    assert comparison.run_all(eval, ["'one'", died, "'two'"], 1) == [died]
    assert capsys.readouterr().out == "one\ntwo\n"
    assert sorted(comparison.run_all(eval, [died, "'three'", died], 2)) == [died, died]
    assert capsys.readouterr().out == "three\n"


def test_the_command_says_whose_process_died(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(comparison, "run_all", lambda function, tasks, processes: tasks[:1])
    jobs = comparison.searches(["scl"])
    with pytest.raises(SystemExit, match="in scl sst2 lr 0.0003 seed 0: give the command"):
        comparison.finish(jobs, comparison.Paths(tmp_path, tmp_path / "runs.jsonl"), 1)


def test_an_error_ends_the_command_and_names_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        comparison.run_all(eval, ["'one'", "1 / 0", "'late'"], 1)
    assert caught.value.__notes__ == ["in 1 / 0"]
    assert capsys.readouterr().out == "one\n"


def test_after_an_error_other_processes_begin_nothing_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The first of two processes goes on only when what has not begun was thrown away."""
    thrown = tmp_path / "thrown"

    def throw(*args: Any, **settings: Any) -> None:
        deque(*args, **settings)
        thrown.touch()

    monkeypatch.setattr(comparison, "deque", throw)
    pause, seen = "__import__('time').sleep(0.01)", f"__import__('os').path.exists('{thrown}')"
    waits = f"next('begun' for _ in range(6000) if {pause} or {seen})"
    with pytest.raises(ZeroDivisionError):
        comparison.run_all(eval, [waits, "1 / 0", "'late'"], 2)
    assert capsys.readouterr().out == "begun\n"


def test_other_weights_are_refused(checkpoint: Path) -> None:
    with pytest.raises(
        SystemExit, match=f"sha256 {load_config().model.sha256}, got [0-9a-f]{{64}}"
    ):
        comparison.check_weights(checkpoint)


def test_a_line_has_the_device_and_no_path_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[str] = []

    def measured(given: list[str], folder: Path, measure: str) -> Line:
        seen.extend([*given, measure])
        return {"quality": 0.5}

    monkeypatch.setattr(comparison_run, "measured", measured)
    monkeypatch.setattr(comparison_run, "device", lambda: "a GPU")
    paths = comparison.Paths(tmp_path / "glue", tmp_path / "runs.jsonl", tmp_path / "minilm")
    job = Job("local_only", "mrpc", LR, 2)
    assert comparison.run_one((job, paths)) == "local_only mrpc lr 0.001 seed 2: 0.500"
    assert f"data.path='{tmp_path}/glue/mrpc'" in seen
    assert f"model.path='{tmp_path}/minilm'" in seen and seen[-1] == "f1"
    (line,) = comparison.lines(paths.runs)
    assert line["device"] == "a GPU" and str(tmp_path) not in json.dumps(line)
    assert comparison.job_of(line) == job
    assert "method=lora strategy=local_only data=mrpc lr=0.001 seed=2" in line["overrides"]
    config = load_config(line["overrides"])
    assert (config.num_clients, config.partition.alpha, config.lr, config.seed) == (10, 0.5, LR, 2)


@pytest.fixture
def given(base: list[str], tmp_path: Path) -> list[str]:
    open_session.cache_clear()
    return [*base, "evaluation.clients=always", "evaluation.every=2", f"run_dir={tmp_path / 'run'}"]


def test_a_run_counts_the_bytes_of_training_alone(given: list[str], tmp_path: Path) -> None:
    found = comparison_run.measured(given, tmp_path / "run", "accuracy")
    size = found["bytes"]
    sent = size["uplink_bytes"] + size["downlink_bytes"]
    assert size["evaluation_downlink_bytes"] > 0
    assert [(round, sent) for round, sent, _ in found["curve"]] == [(0, 0), (2, sent)]
    last = read_metrics(tmp_path / "run")[-1]
    assert found["quality"] == found["curve"][-1][2] == last["client_test_accuracy"]
    assert found["validation"] == last["client_validation_accuracy"]
    assert 0 < found["global_test"] < 1 and found["refused"] == 0


def test_only_training_that_diverges_is_a_result(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(comparison_run.Diverged, match="no client's reply was usable"):
        comparison_run.measured([*given, "lr=1e30"], tmp_path / "run", "accuracy")
    with pytest.raises(ConfigError, match="unknown key wrong"):
        comparison_run.measured([*given, "wrong=1"], tmp_path / "run", "accuracy")

    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fedpeft.engine.session.Session.train", fails)
    again = [*given[:-1], f"run_dir={tmp_path / 'again'}"]
    with pytest.raises(RuntimeError, match="client 0: out of memory"):
        comparison_run.measured(again, tmp_path / "again", "accuracy")


def test_replies_that_were_refused() -> None:
    nan, odd = "training loss is nan: lower lr", "the reply carries no arrays"
    late = "evaluation: loss must be a finite number, got nan"
    check = comparison_run.check_refused
    assert check([{"round": 0}, {"refused": {"1": nan, "2": nan}}, {"refused": {"1": nan}}]) == 3
    assert check([{"refused": {"0": late}}, {"round": 2}]) == 1
    with pytest.raises(comparison_run.Diverged, match="evaluation: loss must be"):
        check([{"round": 1}, {"refused": {"0": late}}])
    with pytest.raises(RuntimeError, match="refused: the reply carries no arrays"):
        check([{"refused": {"0": odd}}, {"round": 2}])
