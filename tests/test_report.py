"""``fedpeft report``: its numbers, its files, and values that must not become markup."""

import csv
import json
import re
import shlex
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from fedpeft.config.compose import CONF, composed, leaves
from fedpeft.config.overrides import split
from fedpeft.reporting.figures import pyplot
from fedpeft.reporting.report.chart import BarChart, HeatChart, Line, LineChart
from fedpeft.reporting.report.charts import _level, charts, norm_bound, thinned
from fedpeft.reporting.report.commands import command
from fedpeft.reporting.report.held import held_charts
from fedpeft.reporting.report.pairs import holm, t_test
from fedpeft.reporting.report.pictures import WIDTH, draw, save_pictures
from fedpeft.reporting.report.plotly_form import form
from fedpeft.reporting.report.published import published_table
from fedpeft.reporting.report.related import correlation, related_charts
from fedpeft.reporting.report.series import Curve, in_lines, megabytes
from fedpeft.reporting.report.settings import Runs
from fedpeft.reporting.report.table import Table
from fedpeft.reporting.report.tables import (
    cost_table,
    diagnostics_table,
    differences_table,
    pairs_tables,
    runs_table,
)
from fedpeft.reporting.report.write import write_report
from fedpeft.reporting.run_directory import RunDirectory
from fedpeft.reporting.run_files import SUMMARY
from fedpeft.reporting.saved_runs import SavedRun, saved_runs
from fedpeft.reporting.tables import as_code

EVIL = "<script>alert(1)</script>"
QUALITY = {"lora": (0.50, 0.60, 0.70), "scl": (0.40, 0.45, 0.65)}


def _save(
    path: Path,
    name: str,
    of_seed: int,
    quality: float,
    held: str | None = "p",
    rows: str = "data",
    **config: Any,
) -> Path:
    """Write the directory of an imagined run of two rounds with two clients.

    Args:
        path: the run's directory.
        name: the method's name, ``lora`` or ``scl``.
        of_seed: the run's seed.
        quality: the clients' accuracy on test rows after round 2.
        held: hash of who holds which rows.
        rows: hash of the rows.
        config: more values.
    """
    path.mkdir(parents=True)
    target = {"lora": "fedpeft.methods.lora.LoRA", "scl": "fedpeft.methods.scl.SCL"}[name]
    tree = {"seed": of_seed, "lr": 0.1, "num_clients": 2, "num_rounds": 2, "local_steps": 5}
    tree |= {"method": {"_target_": target, "rank": 8}, "note": EVIL} | config
    (path / "config.yaml").write_text(json.dumps(tree))
    (path / "overrides.yaml").write_text(json.dumps([f"method={name}", f"note='{EVIL}'"]))
    key = "client_test_accuracy"
    spread = {f"{key}_unweighted": quality - 0.01, f"{key}_worst": 0.1, f"{key}_p10": 0.2}
    lines = [
        {"round": 0, key: 0.25},
        {"round": 1, "uplink_bytes": 1_000_000, "downlink_bytes": 2_000_000},
        {"round": 2, "uplink_bytes": 3_000_000, "downlink_bytes": 4_000_000, key: quality},
    ]
    for line in lines[1:]:
        line |= {"update_norm_mean": 2.0 + of_seed, "update_cosine": 0.5}
    lines[1]["interference"] = {"lora": 0.2, "scl": 0.4}[name]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = dict.fromkeys(("trained", "sent_up", "sent_down", "bytes_up", "bytes_down"), [10, 20])
    summary = {
        "method": name,
        "headline": "accuracy",
        "selected_by": "validation_accuracy",
        "final": {"round": 2, key: quality, "test_accuracy": quality + 0.1} | spread,
        "baseline": {"client_test_baseline": 0.3},
        "refused": {},
        "parameters": counts | {"total": 1000},
        "bytes": {"uplink_bytes": 4_000_000, "downlink_bytes": 6_000_000},
        "seconds": 1.5,
        "data": {"sha256": rows},
        "partition_sha256": held,
    }
    (path / "summary.json").write_text(json.dumps(summary))
    clients = [{"round": 2, "client": i, "test_accuracy": quality - i / 10} for i in range(2)]
    (path / "clients.jsonl").write_text("".join(json.dumps(row) + "\n" for row in clients))
    return path


def _study(folder: Path) -> Path:
    for method, values in QUALITY.items():
        for seed, quality in enumerate(values):
            _save(folder / method / str(seed), method, seed, quality)
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report: two methods with three seeds, a run that failed, one cut off."""
    folder = _study(tmp_path_factory.mktemp("study"))
    failed = _save(folder / "x_failed", "lora", 7, 0.5)
    (failed / "summary.json").unlink()
    (failed / "failed.txt").write_text(f"loss is nan {EVIL}\n")
    cut = _save(folder / "y_cut", "lora", 8, 0.5)
    (cut / "summary.json").unlink()
    held = {"client": [0, 0, 1], "label": ["a", EVIL, "a"], "rows": [3, 4, 5]}
    directory = RunDirectory.__new__(RunDirectory)
    directory.path = folder / "lora" / "0"
    directory.save_partition(held)
    write_report([folder], folder / "report")
    return folder / "report"


def _rows(report: Path, name: str) -> list[dict[str, str]]:
    with (report / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- numbers -------------------------------------------------------------------------------------


def test_the_summary_has_means_and_sample_deviations(report: Path) -> None:
    lora, scl = _rows(report, "summary")  # the best first
    assert (lora["setting"], lora["seeds"], scl["setting"]) == ("lora", "3", "scl")
    assert float(lora["quality"]) == pytest.approx(0.6)
    assert float(lora["quality_sd"]) == pytest.approx(0.1)  # sqrt((0.01 + 0 + 0.01) / 2)
    assert float(scl["quality"]) == pytest.approx(0.5)
    assert float(scl["quality_sd"]) == pytest.approx(0.0175**0.5)  # (.01 + .0025 + .0225) / 2
    assert float(lora["quality_unweighted"]) == pytest.approx(0.59)
    assert [lora[f"quality_{key}"] for key in ("worst", "p10")] == ["0.1", "0.2"]
    assert float(lora["global_test"]) == pytest.approx(0.7)
    assert (lora["bytes"], lora["trained"], lora["seconds"]) == ("10000000", "20", "1.5")
    text = (report / "tables" / "summary.md").read_text()
    assert f"| lora | 3 of {lora['of']} | 0.600 ± 0.100 | 0.590 ± 0.100 |" in text
    assert (lora["of"], scl["of"]) == ("5", "3")  # one diverged and one was cut off


def test_curves_are_over_seeds_and_bytes_are_summed_up(report: Path) -> None:
    runs = Runs.of(saved_runs([report.parent]))
    curve = Curve.of(runs.settings[0], in_lines("client_test_accuracy"))
    assert curve.rounds == [0, 2]
    assert curve.means == pytest.approx([0.25, 0.6])
    assert curve.low == pytest.approx([0.25, 0.5]) and curve.high == pytest.approx([0.25, 0.7])
    assert megabytes(runs.settings[0].runs[0]) == {0: 0.0, 1: 3.0, 2: 10.0}
    drawn = {chart.name: form(chart) for _, section in charts(runs) for chart in section}
    band, line = drawn["quality_by_megabytes"]["data"][:2]
    assert line["x"] == [0.0, 10.0] and band["x"] == [0.0, 10.0, 10.0, 0.0]
    box = drawn["clients"]["data"][0]
    assert box["x"] == pytest.approx([0.5, 0.4, 0.6, 0.5, 0.7, 0.6])
    assert box["text"][1] == "client 1, seed 0"
    moved = drawn["moved"]["data"][1]
    assert moved["y"] == [0.0, 3.0, 6.0]  # norms 2, 3 and 4 by seed
    assert drawn["held_0"]["data"][0]["z"] == [[4, 3], [0, 5]]  # "<" comes before "a"


def test_of_many_clients_a_few_are_drawn_and_their_extremes_stay() -> None:
    values = [((i * 7919 % 10_000) / 10_000, f"client {i}") for i in range(10_000)]
    few = thinned(values)
    assert len(few) == 300 and (few[0], few[-1]) == (min(values), max(values))
    assert [few[i][0] for i in (75, 150, 224)] == pytest.approx([0.25, 0.5, 0.75], abs=0.003)
    assert thinned(values[:300]) == values[:300]


def test_who_holds_what_needs_no_matrix_of_all_clients(tmp_path: Path) -> None:
    labels = [f"l{i:03}" for i in range(150)]
    saved = {"client": [0, 10**12, *[1] * 150], "label": ["l149", "l149", *labels]}
    for seed, first in enumerate((5, 6)):
        directory = RunDirectory.__new__(RunDirectory)
        directory.path = _save(tmp_path / str(seed), "lora", seed, 0.5)
        directory.save_partition(saved | {"rows": [first, 7, *[1] * 150]})
    one, other = held_charts(Runs.of(saved_runs([tmp_path])))
    assert one.counts.shape == (200, 100) and one.labels == [*labels[:99], "l149"]
    assert one.counts.sum() == 5 + 100 and one.counts[0, 99] == 5 and other.counts[0, 99] == 6
    assert one.notes[-1].startswith(f"Of {10**12 + 1} clients and 150 labels")


def _with_interference(folder: Path, values: list[float], qualities: list[list[float]]) -> Runs:
    """Return runs of a setting for each value, with a run for each of its qualities."""
    for place, (value, of_seeds) in enumerate(zip(values, qualities, strict=True)):
        for seed, quality in enumerate(of_seeds):
            path = _save(folder / f"{place}_{seed}", "lora", seed, quality, lr=1.0 + place)
            lines = (path / "metrics.jsonl").read_text()
            (path / "metrics.jsonl").write_text(
                lines.replace('"interference": 0.2', f'"interference": {value}')
            )
    return Runs.of(saved_runs([folder]))


def test_diagnostics_stand_beside_quality_with_their_rank_correlation(tmp_path: Path) -> None:
    """Seeds of a setting count once; the updates' cosine is the same in all runs, so not drawn.

    The means fall with interference but for two neighbours, so rho is -(1 - 6 x 2 / 990).
    """
    means = [0.9, 0.8, 0.7, 0.6, 0.5, 0.35, 0.4, 0.3, 0.2, 0.1]
    spread = [[mean - 0.09, mean + 0.09] for mean in means]
    runs = _with_interference(tmp_path, [i / 10 for i in range(10)], spread)
    (chart,) = related_charts(runs)
    assert chart.name == "interference_and_quality" and chart.names[1] == "lora lr=2.0"
    assert chart.points[1] == [(0.1, pytest.approx(0.71)), (0.1, pytest.approx(0.89))]
    start = "Spearman's rank correlation of accuracy and interference, each the mean of a setting's"
    both = (
        "-0.99 on the clients' test rows (p 9.3e-08, 10 settings); -0.99 on the server's test rows"
    )
    assert chart.notes[1].startswith(f"{start} seeds: {both} (p 9.3e-08, 10 settings)")
    table = diagnostics_table(runs)
    assert table is not None and chart.notes[1] in table.notes


def test_where_nothing_is_averaged_there_is_no_interference(tmp_path: Path) -> None:
    values = [i / 10 for i in range(11)]
    runs = _with_interference(tmp_path, values, [[value] for value in values])
    assert "+1.00 on the clients' test rows" in correlation(runs, "interference")
    for place in (9, 10):  # one client trains there: nine settings are left
        lines = tmp_path / f"{place}_0/metrics.jsonl"
        lines.write_text(lines.read_text().replace('"update_cosine": 0.5', '"update_cosine": null'))
    assert "needs 10 settings" in correlation(Runs.of(saved_runs([tmp_path])), "interference")


def test_means_that_differ_by_rounding_alone_are_a_tie(tmp_path: Path) -> None:
    notes: set[str] = set()
    for name, third in (("equal", 0.3), ("rounded", 0.1 + 0.2)):
        qualities = [[0.3], [0.9], [third], *([place / 100] for place in range(7))]
        runs = _with_interference(tmp_path / name, [i / 10 for i in range(10)], qualities)
        notes.add(correlation(runs, "interference"))
    assert len(notes) == 1


def test_rounding_is_no_interference_and_few_settings_have_no_correlation(tmp_path: Path) -> None:
    exact = _with_interference(tmp_path / "exact", [1e-7, 2e-6, 0.0], [[0.1], [0.2], [0.3]])
    assert not list(related_charts(exact))
    few = _with_interference(tmp_path / "few", [0.1, 0.2, 0.3], [[0.1], [0.2], [0.3]])
    (chart,) = related_charts(few)
    needs = "needs 10 settings, and values that differ."
    assert chart.notes[1] == f"A rank correlation of accuracy and interference {needs}"
    table = diagnostics_table(few)
    assert table is not None and len(set(table.notes)) == len(table.notes)


def test_a_curve_with_one_seed_has_no_band(tmp_path: Path) -> None:
    runs = Runs.of(saved_runs([_save(tmp_path / "a", "lora", 0, 0.5)]))
    curve = Curve.of(runs.settings[0], in_lines("client_test_accuracy"))
    assert curve.low is None and curve.high is None


def test_paired_tests_are_those_of_scipy_with_holms_correction(report: Path) -> None:
    from scipy import stats

    (row,) = _rows(report, "pairs")
    expected: Any = stats.ttest_rel(QUALITY["lora"], QUALITY["scl"])
    assert (row["a"], row["b"], row["n"]) == ("lora", "scl", "3")
    assert float(row["difference"]) == pytest.approx(0.1)  # 0.10, 0.15 and 0.05
    assert float(row["p"]) == pytest.approx(expected.pvalue) == float(row["p_holm"])
    # The mean's standard error is 0.05 / sqrt(3), and t is 4.302653 with two degrees of freedom.
    assert float(row["low"]) == pytest.approx(0.1 - 4.302653 * 0.05 / 3**0.5, abs=1e-6)
    assert t_test([1.0, 2.0, 3.0])["high"] == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-6)
    assert holm([0.03, 0.01, 0.04]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_the_servers_rows_are_tested_too(report: Path) -> None:
    """In every run the server's rows give .1 more than the clients', but for one run of SCL."""
    folder = report.parent
    saved = json.loads((folder / "scl" / "0" / "summary.json").read_text())
    (clients, server) = pairs_tables(Runs.of(saved_runs([folder])))
    assert server.name == "pairs_on_the_servers_rows"
    assert server.rows[0] == pytest.approx(clients.rows[0])
    saved["final"]["test_accuracy"] -= 0.3
    changed = folder.parent / "changed"
    shutil.copytree(folder, changed)
    (changed / "scl" / "0" / "summary.json").write_text(json.dumps(saved))
    (clients, server) = pairs_tables(Runs.of(saved_runs([changed])))
    assert clients.rows[0]["difference"] == pytest.approx(0.1)
    assert server.rows[0]["difference"] == pytest.approx(0.2)  # .1 and a third of .3


def test_commands_in_markdown_are_code_that_can_be_copied(tmp_path: Path) -> None:
    path = _save(tmp_path / "runs" / "a", "lora", 0, 0.5)
    given = ["study.cells=['data=sst2']", "data.prompt='{{ a | upper }}`'"]
    (path / "overrides.yaml").write_text(json.dumps(given))
    write_report([tmp_path / "runs"], tmp_path / "report")
    line = (tmp_path / "report/tables/runs.md").read_text().splitlines()[2]
    code = line.partition("`` ")[2].partition(" ``")[0].replace("\\|", "|")
    assert shlex.split(code) == ["fedpeft", "run", *given]
    assert as_code("") == "" and as_code("a\nb|c") == r"a b\|c"  # no span has line breaks


def test_a_page_unfolds_the_rows_beyond_the_first(tmp_path: Path) -> None:
    """Eight settings with three seeds make 28 pairs, of which 20 are shown at once."""
    qualities = [[0.1 * i, 0.1 * i + 0.02 * i**2, 0.5] for i in range(8)]
    _with_interference(tmp_path / "runs", [0.1] * 8, qualities)
    page, *_ = write_report([tmp_path / "runs"], tmp_path / "report")
    section = page.read_text().partition('<h2 id="paired-tests">')[2].partition("</section>")[0]
    first, folded = section.partition("<summary>8 more rows</summary>")[::2]
    assert first.count("<tr>") == 21 and folded.partition("</details>")[0].count("<tr>") == 9


def test_diagnostics_are_means_over_rounds_and_seeds(tmp_path: Path) -> None:
    """The first run's cosine is .2 in one round and .5 in the other."""
    runs = _with_interference(tmp_path, [0.1, 0.3], [[0.5, 0.6], [0.7]])
    path = runs.settings[0].runs[0].path / "metrics.jsonl"
    lines = path.read_text().replace('"interference": 0.1', '"interference": 0.3')
    path.write_text(lines.replace('"update_cosine": 0.5', '"update_cosine": 0.2', 1))
    table = diagnostics_table(Runs.of(saved_runs([tmp_path])))
    assert table is not None
    first, second = table.rows
    assert first["interference"] == pytest.approx(0.2)  # mean of .3 and .1
    assert first["interference_sd"] == pytest.approx(0.02**0.5)
    assert (second["interference"], second["interference_sd"]) == (0.3, None)
    assert first["update_cosine"] == pytest.approx((0.35 + 0.5) / 2)
    assert table.cells[1] == ["lora lr=2.0", "0.300", "0.500"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_clients": 3}, "they differ in num_clients, so a seed makes no pair"),
        ({"seed": 5}, "a test needs 3 common seeds of the same rows by client, got 2"),
        ({"held": "q"}, "a test needs 3 common seeds of the same rows by client, got 0"),
        ({"rows": "edited"}, "a test needs 3 common seeds of the same rows by client, got 0"),
        (
            {"held": None},
            "sites hold rows of their own, so nobody knows that both had the same rows",
        ),
    ],
)
def test_without_common_seeds_and_clients_no_pair_is_tested(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    for seed, quality in enumerate(QUALITY["lora"]):
        _save(tmp_path / f"a{seed}", "lora", seed, quality)
        more = {} if "seed" in change and seed < 2 else change
        _save(tmp_path / f"b{seed}", "scl", more.get("seed", seed), quality - 0.1 * seed, **more)
    tables = pairs_tables(Runs.of(saved_runs([tmp_path])))
    assert len(tables) == 2
    for table in tables:
        assert table.rows == []
        assert table.notes[-1] == f"Not tested, because {sentence}: lora and scl."
        assert table.save(tmp_path) == []  # there is nothing to write


def test_runs_that_did_not_save_who_holds_what_are_no_pair_if_they_divide_otherwise(
    tmp_path: Path,
) -> None:
    """An earlier version saved no hash of the partition."""
    for seed, quality in enumerate(QUALITY["lora"]):
        for name, alpha in (("lora", 0.1), ("scl", 1.0)):
            run = _save(tmp_path / f"{name}{seed}", name, seed, quality)
            config, summary = (json.loads((run / f).read_text()) for f in ("config.yaml", SUMMARY))
            (run / "config.yaml").write_text(json.dumps(config | {"partition": {"alpha": alpha}}))
            del summary["partition_sha256"]
            (run / SUMMARY).write_text(json.dumps(summary))
    for table in pairs_tables(Runs.of(saved_runs([tmp_path]))):
        assert not table.rows
        assert "they differ in partition.alpha, so a seed makes no pair" in table.notes[-1]


def test_the_number_of_clients_rows_that_are_measured_concerns_their_table_alone(
    tmp_path: Path,
) -> None:
    for seed, quality in enumerate(QUALITY["lora"]):
        _save(tmp_path / f"a{seed}", "lora", seed, quality)
        few = {"max_client_rows": 9}
        _save(tmp_path / f"b{seed}", "scl", seed, quality - 0.1 * seed, evaluation=few)
    clients, server = pairs_tables(Runs.of(saved_runs([tmp_path])))
    assert "differ in evaluation.max_client_rows" in clients.notes[-1] and not clients.rows
    assert server.rows[0]["difference"] == pytest.approx(0.1)  # mean of 0, .1 and .2


def test_a_method_without_a_global_model_is_not_tested_on_the_servers_rows(tmp_path: Path) -> None:
    for path in _study(tmp_path).glob("scl/*/summary.json"):
        summary = json.loads(path.read_text())
        del summary["final"]["test_accuracy"]
        path.write_text(json.dumps(summary))
    clients, server = pairs_tables(Runs.of(saved_runs([tmp_path])))
    assert len(clients.rows) == 1 and not server.rows
    reason = "Not tested, because scl was not measured on these rows: lora and scl."
    assert server.notes[1:] == [reason]


def test_runs_without_clients_tests_have_the_servers_table_alone(tmp_path: Path) -> None:
    for path in _study(tmp_path).glob("*/*/summary.json"):
        summary = json.loads(path.read_text())
        for key in [key for key in summary["final"] if key.startswith("client_test")]:
            del summary["final"][key]
        path.write_text(json.dumps(summary))
    (server,) = pairs_tables(Runs.of(saved_runs([tmp_path])))
    assert server.rows[0]["difference"] == pytest.approx(0.1)


def test_pairs_of_runs_that_did_not_save_the_partition_say_so(tmp_path: Path) -> None:
    for path in _study(tmp_path).glob("*/*/summary.json"):
        summary = json.loads(path.read_text())
        del summary["partition_sha256"]
        path.write_text(json.dumps(summary))
    table, _ = pairs_tables(Runs.of(saved_runs([tmp_path])))
    assert [row["n"] for row in table.rows] == [3]
    assert table.notes[2].startswith("6 of the runs are of an earlier version")


def test_the_bound_is_known_for_plain_sgd_with_clipped_gradients(tmp_path: Path) -> None:
    plain = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "max_grad_norm": 2.0}
    fedavg = {"_target_": "fedpeft.algorithms.base.FedAvg"}
    sgd = _save(tmp_path / "a", "scl", 0, 0.5, optimizer=plain, strategy=fedavg)
    assert norm_bound(SavedRun(sgd)) == pytest.approx({1: 1.0, 2: 2.0})  # 0.1 x 2 x 5 steps
    momentum = _save(
        tmp_path / "b", "scl", 0, 0.5, optimizer=plain | {"momentum": 0.9}, strategy=fedavg
    )
    assert norm_bound(SavedRun(momentum)) == {}
    pooled = {"_target_": "fedpeft.algorithms.bounds.Centralized"}  # takes more steps a round
    assert (
        norm_bound(SavedRun(_save(tmp_path / "c", "scl", 0, 0.5, optimizer=plain, strategy=pooled)))
        == {}
    )


def test_an_older_run_without_some_counts_has_dashes(tmp_path: Path) -> None:
    file = _save(tmp_path / "a", "lora", 0, 0.5) / "summary.json"
    summary = json.loads(file.read_text())
    summary["parameters"] = {"total": 1000, "trained": [10, 20]}
    del summary["data"], summary["headline"]
    file.write_text(json.dumps(summary))
    table = cost_table(Runs.of(saved_runs([tmp_path])))
    assert table.cells == [["lora", "20", "2.000%", "-", "-", "4.00", "6.00", "0.00", "2"]]


# --- runs that are not counted -------------------------------------------------------------------


def test_runs_without_an_end_are_listed_with_the_reason(report: Path) -> None:
    failed, cut = _rows(report, "left_out")
    assert (failed["state"], failed["reason"]) == ("diverged", f"loss is nan {EVIL}")
    assert cut["state"] == "unfinished" and cut["reason"].startswith("after round 2 of 2: it still")


def test_a_copy_of_a_run_counts_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _save(tmp_path / name, "lora", 0, 0.5)
    runs = Runs.of(saved_runs([tmp_path]))
    assert [len(setting.runs) for setting in runs.settings] == [1]
    (copy,) = runs.left_out
    assert copy.reason == f"the same configuration and seed as {tmp_path / 'a'}"


def test_runs_of_different_measures_are_refused(tmp_path: Path) -> None:
    _save(tmp_path / "a", "lora", 0, 0.5)
    file = _save(tmp_path / "b", "scl", 0, 0.5) / "summary.json"
    file.write_text(file.read_text().replace('"headline": "accuracy"', '"headline": "f1"'))
    with pytest.raises(ValueError, match=r"one measure, got accuracy \(.*/a\) and f1 \(.*/b\)"):
        Runs.of(saved_runs([tmp_path]))
    file.write_text(file.read_text().replace('"headline": "f1"', '"headline": "accuracy"'))
    summary = json.loads(file.read_text()) | {"higher_is_better": False}
    file.write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=r"and accuracy, of which less is better \(.*/b\)"):
        Runs.of(saved_runs([tmp_path]))
    for name in "ab":
        (tmp_path / name / "summary.json").unlink()
    with pytest.raises(ValueError, match="no run came to its end"):
        Runs.of(saved_runs([tmp_path]))


# --- the page ------------------------------------------------------------------------------------


class _Tags(HTMLParser):
    """Notes the tags of a page, with their attributes; a script's text holds none."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_needs_no_other_file(report: Path) -> None:
    text = (report / "report.html").read_text()
    tags = _Tags(text).tags
    links = [v for _, attrs in tags for k, v in attrs.items() if k in ("src", "href")]
    assert links and all(link and link.startswith("#") for link in links)
    assert [tag for tag, _ in tags].count("script") == 3
    assert "default-src 'none'" in str(tags)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_values_do_not_become_markup(report: Path) -> None:
    text = (report / "report.html").read_text()
    assert EVIL not in text
    assert "loss is nan &lt;script&gt;" in text  # the error of the run that failed
    assert "note=" in text and "&lt;script&gt;alert(1)" in text  # the command
    forms = re.search(r'id="forms">(.*?)</script>', text, re.DOTALL)
    assert forms
    heat = json.loads(forms[1])["held_0"]["data"][0]
    assert heat["x"] == ["&lt;script&gt;ale…(1)&lt;/script&gt;", "a"]  # plotly reads HTML in texts


def test_plotly_knows_every_key_of_the_charts(report: Path) -> None:
    from plotly import graph_objects

    text = (report / "report.html").read_text()
    forms = re.search(r'id="forms">(.*?)</script>', text, re.DOTALL)
    assert forms
    for made in json.loads(forms[1]).values():
        graph_objects.Figure(made)  # raises for an unknown key or value


def test_a_logarithmic_axis_has_plain_numbers(tmp_path: Path) -> None:
    line = Line("a $x$", 0, [1.0, 100.0], [0.0, 1.0])
    save_pictures([LineChart("t", "title", "MB", "y", [line], log_x=True)], tmp_path)
    text = (tmp_path / "t.svg").read_text()
    assert {">10<", ">20<", ">50<"} <= set(re.findall(r">\d+<", text))
    wide = Line("wide", 0, [1.0, 100_000.0], [0.0, 1.0])
    save_pictures([LineChart("w", "title", "MB", "y", [wide], log_x=True)], tmp_path)
    numbers = set(re.findall(r">(\d+)<", (tmp_path / "w.svg").read_text()))
    assert {"10", "100", "1000"} <= numbers and not {"20", "500", "2000"} & numbers
    assert ">a $x$<" in text and "mathdefault" not in text


def test_each_chart_is_a_picture_in_three_formats(report: Path) -> None:
    from PIL import Image

    folder = report / "figures"
    names = {path.stem for path in folder.iterdir()}
    assert names == {
        *("quality_by_round", "quality_by_megabytes", "clients", "bytes", "seconds"),
        *("interference", "drift", "update_norms", "moved", "held_0"),
        "interference_and_quality",
    }
    for name in names:
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert "<svg" in (folder / f"{name}.svg").read_text()
        with Image.open(folder / f"{name}.png") as picture:
            width, height = picture.size
        assert 400 <= width <= 2000 and 300 <= height <= 2000


def test_equal_charts_are_equal_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = LineChart("line", "title", "MB", "y", [Line("a", 0, [1.0, 2.0], [0.0, 1.0])])
    heat = HeatChart("heat", "title", np.array([[3, 0], [1, 2]]), ["a", "b"], "label")
    for day in (1, 2):  # matplotlib takes the date of its files from this variable
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(day * 86_400))
        (tmp_path / str(day)).mkdir()
        assert len(save_pictures([line, heat], tmp_path / str(day))) == 6
    for file in (tmp_path / "1").iterdir():
        assert file.read_bytes() == (tmp_path / "2" / file.name).read_bytes(), file


def test_files_of_an_earlier_report_are_removed_and_no_others(tmp_path: Path) -> None:
    runs, to = _study(tmp_path / "runs"), tmp_path / "report"
    written = write_report([runs], to)
    (to / "figures" / "own.png").write_text("not the report's")
    (to / ".written.json").write_text(
        json.dumps([*json.loads((to / ".written.json").read_text()), "tables/../../mine"])
    )
    (tmp_path / "mine").write_text("outside")
    fewer = write_report([runs / "lora"], to)  # one setting, so no pairs and no differences
    gone = {path.name for path in set(written) - set(fewer)}
    assert {"pairs.csv", "pairs.md", "pairs.tex", "differences.csv"} <= gone
    assert {path for path in to.rglob("[!.]*") if path.is_file()} == {
        *fewer,
        to / "figures" / "own.png",
    }
    assert (tmp_path / "mine").exists()


def test_the_commonest_label_s_line_stands_in_charts_of_test_rows_alone(tmp_path: Path) -> None:
    _save(tmp_path / "run", "lora", 0, 0.5)
    runs = Runs.of(saved_runs([tmp_path]))
    assert _level(runs, "client_test_accuracy") is not None
    assert _level(runs, "validation_accuracy") is None


def test_settings_of_one_colour_have_other_dashes(tmp_path: Path) -> None:
    lines = [Line(f"s{place}", place, [1.0, 2.0], [0.0, 1.0]) for place in range(40)]
    chart = LineChart("t", "title", "round", "y", lines)
    drawn = {json.dumps(trace["line"]) for trace in form(chart)["data"]}
    assert len(drawn) == 40
    save_pictures([chart], tmp_path)
    text = (tmp_path / "t.svg").read_text()
    strokes = re.findall(r"clip-path[^>]*stroke-dasharray: ([\d., ]+)", text)
    assert len(strokes) == 30 and len(set(strokes)) == 3  # all but the first ten


def test_a_title_beside_names_has_lines_that_fit_on_a_phone() -> None:
    bars = BarChart("t", "title", "MB on the wire, <all> clients, both ways", ["a"], {"up": [1.0]})
    text = form(bars)["layout"]["xaxis"]["title"]["text"]
    assert text == "MB on the wire, &lt;all&gt;<br>clients, both ways"
    line = LineChart("t", "title", "round", "accuracy on clients' test rows", [])
    assert "<br>" not in form(line)["layout"]["yaxis"]["title"]["text"]


def test_long_names_and_titles_stay_inside_the_picture() -> None:
    names = [
        f"lora rank={r} method.alpha=16 targets=down_proj strategy=centralized" for r in (8, 9)
    ]
    lines = [Line(name, place, [1.0], [0.0]) for place, name in enumerate(names)]
    title = "rouge l teacher forced on clients' test rows, mean by rows"
    figure, axis = pyplot().subplots(figsize=(WIDTH, 4.2), layout="constrained")
    draw(LineChart("t", "title", "round", title, lines), figure, axis)
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    for artist in (figure.legends[0], axis.yaxis.label):
        box = artist.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height
    assert axis.get_ylabel().replace("\n", " ") == title
    pyplot().close(figure)


def test_the_tables_of_the_page_scroll_and_short_cells_do_not_wrap(report: Path) -> None:
    style = (report / "report.html").read_text().partition("<style>")[2].partition("</style>")[0]
    rules = dict(re.findall(r"^([^{}@\n]+?) \{ ([^{}]*)\}", style, re.MULTILINE))
    assert "overflow-x: auto" in rules[".table"] and "max-width: 100%" in rules[".table"]
    assert "white-space: nowrap" in rules["th, td"] and "td.text" not in rules
    assert "white-space: normal" in rules["td.long"]  # commands


def test_a_logarithmic_axis_has_points_for_bars(tmp_path: Path) -> None:
    bars = {"up": [1.0, 1000.0], "down": [2.0, 0.0]}
    made = {log: form(BarChart("t", "title", "MB", ["a", "b"], bars, log)) for log in (True, False)}
    kinds = {log: [trace["type"] for trace in one["data"]] for log, one in made.items()}
    assert kinds == {True: ["scatter"] * 2, False: ["bar"] * 2}
    assert made[True]["data"][1]["x"] == [2.0, 0.0]
    save_pictures([BarChart("t", "title", "MB", ["a", "b"], bars, True)], tmp_path)
    assert (tmp_path / "t.svg").read_text().count("<use ") >= 4


# --- tables --------------------------------------------------------------------------------------


def test_names_are_escaped_for_each_kind_of_file(tmp_path: Path) -> None:
    name = 'a_b & 50%|c _x_ <i> "q", \\'
    table = Table("t", "title", {"name & so": lambda row: row["name"]}, [{"name": name}], ["n_1|"])
    table.save(tmp_path)
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["name"], [name]]
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert lines[2] == r'| a_b & 50%\|c \_x\_ \<i\> "q", \\ |'
    assert lines[4] == r"n_1\|"
    assert (tmp_path / "t.tex").read_text().splitlines()[2:6] == [
        r"\begin{tabular}{l}",
        r"\hline",
        r"name \& so \\",
        r"\hline",
    ]
    cell = (
        r"a\_b \& 50\%\textbar{}c \_x\_ \textless{}i\textgreater{} \textquotedbl{}q"
        r"\textquotedbl{}, \textbackslash{} \\"
    )
    assert (tmp_path / "t.tex").read_text().splitlines()[6] == cell


def test_the_table_of_runs_fits_on_a_page(report: Path) -> None:
    lines = (report / "tables" / "runs.tex").read_text().splitlines()
    rows = [line for line in lines if line.endswith(r"\\")]
    assert rows[0] == r"setting & seed & accuracy & s \\" and len(rows) == 7
    assert r"\begin{tabular}{llrr}" in lines
    assert "% runs.csv has, too: directory, command." in lines
    assert max(map(len, rows)) < 80 and "command" in _rows(report, "runs")[0]


# --- names and commands --------------------------------------------------------------------------


def test_settings_of_one_method_are_named_by_what_differs(tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        _save(tmp_path / f"lora{lr}", "lora", 0, 0.5, lr=lr)
    _save(tmp_path / "scl", "scl", 0, 0.5, lr=0.7)
    runs = Runs.of(saved_runs([tmp_path]))
    assert [setting.name for setting in runs.settings] == ["lora lr=0.1", "lora lr=0.2", "scl"]


def test_a_long_name_loses_the_learning_rate_and_no_value_of_the_method(tmp_path: Path) -> None:
    target = {"_target_": "fedpeft.methods.scl.SCL", "alpha": 16}
    for lr, start, rank in ((0.1, "normal", 8), (0.3, "zero_last", 10)):
        method = {**target, "rank": rank, "start": start}
        _save(tmp_path / start, "scl", 0, 0.5, lr=lr, rounds_with_a_long_name=lr, method=method)
    assert {setting.name for setting in Runs.of(saved_runs([tmp_path])).settings} == {
        "scl rank=8 start=normal",
        "scl rank=10 start=zero_last",
    }


def test_a_strategy_s_value_tells_its_settings_apart(tmp_path: Path) -> None:
    """A choice explains its values only where each choice has one."""
    of = "fedpeft.algorithms"
    plain, prox = {"_target_": f"{of}.base.FedAvg"}, {"_target_": f"{of}.fedprox.FedProx"}
    strategies = (plain, {**prox, "proximal_mu": 0.01}, {**prox, "proximal_mu": 1.0})
    for place, strategy in enumerate(strategies):
        _save(tmp_path / str(place), "lora", 0, 0.5, strategy=strategy)
    assert [setting.name for setting in Runs.of(saved_runs([tmp_path])).settings] == [
        "lora strategy=fedavg",
        "lora strategy=fedprox proximal_mu=0.01",
        "lora strategy=fedprox proximal_mu=1.0",
    ]


def _mixed(folder: Path) -> Runs:
    """Return runs whose data and models have long paths, and whose prompts differ too."""
    for place, data in enumerate(("news", "mail")):
        tree = {
            "path": f"/archive/of/all/our/texts/{data}/the_whole_table_of_rows.csv",
            "prompt": f"{data}: read the text and say which label fits it best",
        }
        model = {"path": f"/models/{'with-a-long-name' * 2}-{place}"}
        _save(folder / data / "0", "lora", 0, 0.5, data=tree, model=model)
        _save(folder / data / "1", "lora", 1, 0.6, data=tree, model=model)
    return Runs.of(saved_runs([folder]))


def test_names_of_settings_with_long_values_are_short(tmp_path: Path) -> None:
    assert [setting.name for setting in _mixed(tmp_path).settings] == [
        "lora data.path=…/mail/…",
        "lora data.path=…/news/…",
    ]
    several = tmp_path / "several"
    for lr, rows in ((0.1, "news"), (0.2, "news"), (0.1, "mail")):
        data = {"path": f"/archive/of/all/our/texts/{rows}/the_whole_table_of_rows.csv"}
        _save(several / f"{lr} {rows}", "lora", 0, 0.5, lr=lr, data=data, note=rows * 9)
    assert {setting.name for setting in Runs.of(saved_runs([several])).settings} == {
        "lora lr=0.1 note=newsnewsnew…newsnewsnews",
        "lora lr=0.2 note=newsnewsnew…newsnewsnews",
        "lora lr=0.1 note=mailmailmai…mailmailmail",
    }


def test_tables_say_the_folder_once_and_shorten_long_values(tmp_path: Path) -> None:
    runs = _mixed(tmp_path)
    table = runs_table(runs)
    assert [row[2] for row in table.cells] == ["mail/0", "mail/1", "news/0", "news/1"]
    assert table.notes[0] == f"Directories are below {tmp_path}."
    assert table.rows[0]["directory"] == str(tmp_path / "mail" / "0")  # whole in the CSV
    differ = differences_table(runs)
    assert differ is not None and differ.cells[0] == ["data.path", "…/mail/…", "…/news/…"]
    assert differ.rows[0]["lora data.path=…/mail/…"].endswith("/mail/the_whole_table_of_rows.csv")
    assert max(len(cell) for row in differ.cells for cell in row) <= 32
    assert differ.notes[1] == "Long values are shortened (…); differences.csv has them whole."


def test_values_that_are_short_stay_as_they_are(tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        _save(tmp_path / str(lr), "lora", 0, 0.5, lr=lr)
    table = differences_table(Runs.of(saved_runs([tmp_path])))
    assert table is not None and table.cells == [["lr", "0.1", "0.2"]] and len(table.notes) == 1


def test_a_command_is_the_saved_one_or_composes_the_same(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    saved = _save(tmp_path / "a", "lora", 0, 0.5)
    (saved / "overrides.yaml").write_text('["method=lora", "lr=0.2", "run_dir=x", "resume=true"]')
    assert command(SavedRun(saved)) == "fedpeft run method=lora lr=0.2"
    overrides = ["method=fedtt_plus", "partition.alpha=0.1", "data.path=my rows", "layers=[0,1]"]
    tree = composed([*overrides, "optimizer.max_grad_norm=null", "seed=3"])
    old = tmp_path / "old"
    old.mkdir()
    OmegaConf.save(tree, old / "config.yaml")
    line, note = command(SavedRun(old)).split("  # ")
    assert note == "rebuilt from config.yaml"
    assert composed(split(line)[2:]) == tree


def test_the_command_of_a_deployment_is_one_that_flower_reads(tmp_path: Path) -> None:
    from flwr.common.config import parse_config_args

    overrides = ["method=lora", 'data.path=my "rows"', r"data.prompt='it\'s {{ a }} \n'", "a=[0,1]"]
    path = _save(tmp_path / "a", "lora", 0, 0.5)
    (path / "overrides.yaml").write_text(json.dumps([*overrides, "run_dir=/d", "resume=true"]))
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"command": "flwr run"}))
    *start, config = split(command(SavedRun(path)))
    assert start == ["flwr", "run", ".", "--stream", "--run-config"]
    read = parse_config_args([config])
    assert list(read) == ["overrides"] and split(read["overrides"]) == overrides


def test_a_class_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = {"_target_": "fedpeft.gone.Old"}
    old = _save(tmp_path / "a", "lora", 0, 0.5, method=gone)
    (old / "overrides.yaml").unlink()
    assert "no file of conf/method has the class fedpeft.gone.Old" in command(SavedRun(old))


# --- a real run ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_saves_what_its_report_needs(
    run: Any, fedpeft: Callable[..., str], base: list[str], tmp_path: Path
) -> None:
    run("evaluation.clients=always")
    said = fedpeft("report", str(run.run_dir))
    assert said.startswith(f"saved {run.run_dir}/report/report.html, and ")
    (saved,) = saved_runs([run.run_dir])
    assert command(saved).startswith("fedpeft run model=local ") and saved.summary
    assert saved.summary["headline"] == "accuracy"
    (row,) = _rows(run.run_dir / "report", "summary")
    assert float(row["quality"]) == saved.summary["final"]["client_test_accuracy"]
    from pyarrow import parquet

    held = parquet.read_table(run.run_dir / "partition.parquet").to_pydict()
    assert sum(held["rows"]) == 240 and set(held["label"]) == {"food", "music", "sport", "weather"}
    assert set(held["client"]) == {0, 1, 2}


def test_a_report_without_folders_says_how(fedpeft: Callable[..., str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        fedpeft("report", "--top")


# --- published values -----------------------------------------------------------------------------


def _saved_as(folder: Path, *overrides: str) -> Path:
    """Write an imagined run of a composed configuration, whose quality is 0.5."""
    tree: Any = OmegaConf.to_container(composed(list(overrides)), resolve=True)
    return _save(folder / " ".join(overrides), "lora", 0, 0.5, **{**tree, "seed": 0})


def test_measured_values_stand_beside_published_ones(tmp_path: Path) -> None:
    clients, rank = ("data=sst2", "num_clients=3", "partition=iid"), "method.rank=2"
    _saved_as(tmp_path, *clients, "method=lora", rank, "data.path=/x/sst2", "lr=0.1")
    _saved_as(tmp_path, *clients, "method=lora", rank, "partition=dirichlet", "partition.alpha=0.1")
    _saved_as(tmp_path, *clients, "method=rolora", rank, "strategy=fedadam")
    _saved_as(tmp_path, *clients, "method=rolora", "method.rank=4")
    _saved_as(tmp_path, "data=sst2", "num_clients=4", "method=lora", rank, "partition=iid")
    table = published_table(Runs.of(saved_runs([tmp_path])))
    assert table is not None
    (cells,) = table.cells
    measured = ["0.500", "0.600"]  # by the clients and by the server
    source = "RoLoRA, arXiv 2409.02346, Table 2"
    assert cells[1:] == ["RoBERTa-large", source, *measured, "0.956"]


def test_without_published_values_there_is_no_table(tmp_path: Path) -> None:
    _saved_as(tmp_path, "data=sst2", "num_clients=3", "method=bitfit", "partition=iid")
    assert published_table(Runs.of(saved_runs([tmp_path]))) is None


def test_published_values_are_shares_of_known_methods_and_data() -> None:
    entries: Any = OmegaConf.to_container(OmegaConf.load(CONF / "published.yaml"))
    assert len(entries) == 8 + 3 + 12 + 4
    for entry in entries:
        tree = composed([f"data={entry['data']}"])
        assert tree.data._target_ and isinstance(entry["iid"], bool)
        for name, measures in entry["values"].items():
            method, *wanted = name.split("+")
            settings = leaves(composed([f"method={method}"]))
            assert all(w.split("=")[0] in settings for w in wanted)
            assert all(0 < value < 1 for value in measures.values())
    by_hand = [e for e in entries if e["data"] == "dolly" and e["num_clients"] == 4]
    assert by_hand[0]["values"]["scl+method.init=random_pinv"] == {
        "bleu4": 0.3516,
        "rouge_l": 0.4704,
    }
