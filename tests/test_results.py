"""``fedpeft results``: runs on the disk as rows, filtered, sorted, averaged and exported."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config.choices import choices
from fedpeft.config.compose import composed, leaves
from fedpeft.reporting.brief import below, brief
from fedpeft.reporting.conditions import Condition
from fedpeft.reporting.listing import Listing, narrow_page
from tests.conftest import ROOT

Command = Callable[..., str]
# By directory: learning rate, seed, quality. The last one did not come to its end.
RUNS = {"a": (0.1, 0, 0.5), "b": (0.1, 1, 0.7), "c": (0.01, 0, 0.9), "d": (0.01, 1, None)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two learning rates and two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (lr, seed, quality) in RUNS.items():
        path = folder / name
        path.mkdir()
        method = {"_target_": "fedpeft.methods.lora.LoRA", "rank": 8}
        config = {"lr": lr, "seed": seed, "method": method, "layers": [0, 1]}
        (path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML, too
        lines = [{"round": r, "validation_accuracy": r / 10, "refused": {}} for r in range(2)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        if quality is not None:
            (path / "summary.json").write_text(json.dumps(_summary(quality)))
    return folder


def _summary(quality: float) -> dict[str, Any]:
    """Return the summary of a run whose unweighted quality is a tenth less, and the worst two."""
    tested = {"": 0, "_unweighted": 0.1, "_worst": 0.2}
    measures = {f"client_test_accuracy{k}": quality - less for k, less in tested.items()}
    return {
        "selected_by": "validation_accuracy",
        "final": {"round": 1, "validation_accuracy": 0.1, "test_accuracy": 0.25, **measures},
        "best": {"round": 0},
        "baseline": {"client_test_baseline": 0.9 * quality, "test_baseline": 0.125},
        "bytes": {"uplink_bytes": 3_000_000, "downlink_bytes": 1_000_000},
        "parameters": {"trained": [10, 10]},
        "seconds": 1.5,
    }


def test_a_run_is_a_row(fedpeft: Command, folder: Path) -> None:
    rows = json.loads(fedpeft("results", str(folder), "--json"))
    assert [row["path"] for row in rows] == [str(folder / name) for name in RUNS]
    whole = "path status lr seed rounds quality baseline quality_unweighted quality_worst"
    assert list(rows[0]) == [
        *whole.split(),
        *("global_test", "selection", "best_round", "bytes", "seconds"),
    ]
    assert list(rows[0].values())[1:] == pytest.approx(
        ["completed", 0.1, 0, 1, 0.5, 0.45, 0.4, 0.3, 0.25, 0.1, 0, 4_000_000, 1.5]
    )
    unfinished = {"path": str(folder / "d"), "status": "unfinished", "lr": 0.01, "seed": 1}
    assert rows[3] == unfinished | {"rounds": 1}
    text = fedpeft("results", str(folder), "--columns", "lr,quality,bytes")
    assert "│ 0.1  │   0.500 │ 4.00 │" in text and "│ 0.01 │       - │    - │" in text
    assert "quality: accuracy on the clients' own test rows" in text


def test_seeds_are_one_row_with_their_mean_and_deviation(fedpeft: Command, folder: Path) -> None:
    one, other = json.loads(fedpeft("results", str(folder), "--over-seeds", "--json"))
    assert (one["lr"], one["quality"], one["seeds"]) == (0.1, pytest.approx(0.6), "2")
    assert one["quality_sd"] == pytest.approx(0.02**0.5)  # sample: 0.1² + 0.1² over 1
    assert (other["quality"], other["quality_sd"], other["seeds"]) == (0.9, None, "1 of 2")
    assert "path" not in one and "seed" not in one
    text = fedpeft("results", str(folder), "--over-seeds")
    assert "0.600 ± 0.141" in text and "1 of 2" in text
    assert "commonest label" in text and "0.540 ± 0.127" in text  # nine tenths of the quality


def test_the_commonest_label_is_that_of_the_rows_which_were_measured(
    fedpeft: Command, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "a", tmp_path / "a")
    summary = _summary(0.5)
    del summary["final"]["client_test_accuracy"]
    (tmp_path / "a" / "summary.json").write_text(json.dumps(summary))
    (row,) = json.loads(fedpeft("results", str(tmp_path), "--json"))
    assert row["baseline"] == 0.125 and "quality" not in row


# --- narrow tables -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one learning rate whose data have long paths and long prompts."""
    mixed = tmp_path_factory.mktemp("mixed") / ("deep" * 20)
    for name, data in {"a": "news", "b": "mail"}.items():
        shutil.copytree(folder / name, mixed / name)
        file = mixed / name / "config.yaml"
        config = json.loads(file.read_text())
        prompt = f"{data} is the kind of text that follows, and here it is: {{{{ text }}}}"
        config["data"] = {"path": f"/archive/of/all/our/texts/{data}/rows.csv", "prompt": prompt}
        file.write_text(json.dumps(config))
    return mixed


def test_what_all_runs_share_stands_once_above_the_table(fedpeft: Command, mixed: Path) -> None:
    head, _, table = fedpeft("results", str(mixed)).partition("2 rows")
    assert f"runs below {mixed}\n" in head
    assert "all of them: method lora, status completed, rounds 1, " in head
    assert "status" not in table and "deep" not in table and "│ a " in table
    assert "…/news/rows.csv" in table and "archive" not in table


def test_named_columns_have_whole_values(fedpeft: Command, mixed: Path) -> None:
    text = fedpeft("results", str(mixed), "--columns", "path,status,data.path")
    assert str(mixed / "a") in text and "/archive/of/all/our/texts/news/rows.csv" in text
    assert text.count("completed") == 2 and "all of them" not in text


@pytest.mark.parametrize(
    ("room", "seeds", "out"),
    [
        (80, False, "quality_unweighted, quality_worst, data.prompt"),
        (60, False, "quality_unweighted, quality_worst, data.prompt"),
        (80, True, "quality_unweighted, quality_worst"),
        (100, True, ""),
        (None, False, ""),
    ],
)
def test_a_terminal_has_room_for_every_line(
    mixed: Path, room: int | None, seeds: bool, out: str
) -> None:
    listing = Listing.of([mixed])
    rows = listing.over_seeds() if seeds else listing.whole
    page = narrow_page(rows, [c for c in listing.shown if c in rows[0]], [], room)
    said = f"No room for: {out} (--columns A,B shows what it names)."
    assert page.notes == ([said] if out else [])
    cells = zip(page.header, *page.cells, strict=True)
    widths = [3 + max(map(len, [*head.split(), *rest])) for head, *rest in cells]
    assert room is None or sum(widths) + 1 <= room
    assert "quality" in page.header and "commonest label" in page.header


@pytest.mark.parametrize(
    ("values", "forms"),
    [
        (["lora", 0.1, None], ["lora", "0.1", "None"]),
        ([f"/a/{'b' * 40}/train.csv", "c.csv"], ["…/train.csv", "c.csv"]),
        ([f"/{'b' * 40}/x/1/r.csv", f"/{'b' * 40}/y/1/r.csv"], ["…/x/1/r.csv", "…/y/1/r.csv"]),
        ([f"/a/{x}/{'b' * 40}.csv" for x in "xy"], ["…/x/…", "…/y/…"]),
        ([f"x{'y' * 40}z"], [f"x{'y' * 14}…{'y' * 15}z"]),
        (
            [f"x{'y' * 40}{c}{'y' * 40}z" for c in "aba"],
            [f"x{'y' * 14}…{'y' * 15}z ({i})" for i in (1, 2, 1)],
        ),
        (["two\n lines"], ["two lines"]),
    ],
)
def test_long_values_have_short_forms_that_differ(values: list[Any], forms: list[str]) -> None:
    assert brief(values) == forms


def test_paths_stand_below_their_common_folder() -> None:
    assert below(["/x/runs/a/1", "/x/runs/b"]) == ("/x/runs", ["a/1", "b"])
    assert below(["runs/a"]) == ("runs", ["a"])
    assert below(["/x/a", "b"]) == ("", ["/x/a", "b"])


def test_seeds_have_means_of_the_data_s_own_metrics(
    fedpeft: Command, folder: Path, tmp_path: Path
) -> None:
    for name, value in {"a": 0.2, "b": 0.4}.items():
        shutil.copytree(folder / name, tmp_path / name)
        file = tmp_path / name / "summary.json"
        summary = json.loads(file.read_text())
        summary["final"]["client_test_f1"] = value
        file.write_text(json.dumps(summary))
    shown = ["results", str(tmp_path), "--over-seeds", "--columns", "method,client_test_f1"]
    (row,) = json.loads(fedpeft(*shown, "--json"))
    assert row["client_test_f1"] == pytest.approx(0.3)
    assert row["client_test_f1_sd"] == pytest.approx(0.02**0.5)
    assert "0.300 ± 0.141" in fedpeft(*shown)


def test_validation_is_that_of_clients_and_a_round_has_no_mean(
    fedpeft: Command, folder: Path, tmp_path: Path
) -> None:
    for name, value, best in (("a", 0.2, 3), ("b", 0.4, 1)):
        shutil.copytree(folder / name, tmp_path / name)
        summary = _summary(0.5)
        summary["final"]["client_validation_accuracy"] = value
        summary["best"]["round"] = best
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    (row,) = json.loads(fedpeft("results", str(tmp_path), "--over-seeds", "--json"))
    assert row["validation"] == pytest.approx(0.3)
    assert row["selection"] == summary["final"]["validation_accuracy"]
    assert row["best_round"] == "1-3"


def test_a_run_without_quality_says_why(fedpeft: Command, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "a", tmp_path / "a")
    why = "clients were not measured, evaluation.clients=always does"
    assert why not in " ".join(fedpeft("results", str(tmp_path)).split())
    summary = _summary(0.5)
    del summary["final"]["client_test_accuracy"]
    (tmp_path / "a" / "summary.json").write_text(json.dumps(summary))
    assert why in " ".join(fedpeft("results", str(tmp_path)).split())


def test_a_seed_that_ran_twice_counts_once(fedpeft: Command, folder: Path, tmp_path: Path) -> None:
    for name, of in {"a": "a", "again": "a", "b": "b"}.items():
        shutil.copytree(folder / of, tmp_path / name)
    (one,) = json.loads(fedpeft("results", str(tmp_path), "--over-seeds", "--json"))
    assert (one["quality"], one["seeds"]) == (pytest.approx(0.6), "2")
    assert one["quality_sd"] == pytest.approx(0.02**0.5)


def test_seeds_that_ended_after_different_rounds_are_one_row(
    fedpeft: Command, folder: Path, tmp_path: Path
) -> None:
    for name in "ab":
        shutil.copytree(folder / name, tmp_path / name)
    summary = _summary(0.7)
    summary["final"]["round"] = 4
    (tmp_path / "b" / "summary.json").write_text(json.dumps(summary))
    (one,) = json.loads(fedpeft("results", str(tmp_path), "--over-seeds", "--json"))
    assert one["quality"] == pytest.approx(0.6) and "rounds" not in one


def test_a_setting_that_differs_within_one_choice_is_shown(
    fedpeft: Command, folder: Path, tmp_path: Path
) -> None:
    for name, (method, rank) in {
        "a": ("lora.LoRA", 4),
        "b": ("lora.LoRA", 8),
        "c": ("scl.SCL", 8),
    }.items():
        shutil.copytree(folder / "a", tmp_path / name)
        config = json.loads((tmp_path / name / "config.yaml").read_text())
        config["method"] = {"_target_": f"fedpeft.methods.{method}", "rank": rank}
        (tmp_path / name / "config.yaml").write_text(json.dumps(config))
    rows = json.loads(fedpeft("results", str(tmp_path), "--json"))
    assert [(row["method"], row["method.rank"]) for row in rows] == [
        ("lora", 4),
        ("lora", 8),
        ("scl", 8),
    ]


@pytest.mark.parametrize(
    ("conditions", "names"),
    [
        (["lr<0.1"], "cd"),
        (["lr<=1e-1", "seed=0"], "ac"),
        (["method=lora", "quality>0.6"], "bc"),
        (["method=LORA", "method.rank=8", "seed!=0", "status=completed"], "b"),
        (["quality!=0.5"], "bcd"),
        (["client_test_accuracy_worst>=0.4"], "bc"),
        (["layers=[0, 1]", "lr>0.05"], "ab"),
    ],
)
def test_conditions_on_columns_settings_and_measures(
    fedpeft: Command, folder: Path, conditions: list[str], names: str
) -> None:
    rows = json.loads(
        fedpeft("results", str(folder), "--json", "--columns", "path", "--where", *conditions)
    )
    assert [Path(row["path"]).name for row in rows] == list(names)


def test_order_and_those_without_a_value_last(fedpeft: Command, folder: Path) -> None:
    def order(*options: str) -> str:
        rows = json.loads(fedpeft("results", str(folder), "--json", *options))
        return "".join(Path(row["path"]).name for row in rows)

    assert order("--sort", "quality") == "abcd"
    assert order("--sort", "quality", "--reverse") == "cbad"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_one_row_a_run_is_exported(fedpeft: Command, folder: Path, kind: str) -> None:
    assert "saved runs." in fedpeft("results", str(folder), "--to", f"runs.{kind}")
    rows = _read(Path(f"runs.{kind}"))
    assert [row["quality"] for row in rows] == [0.5, 0.7, 0.9, None]
    first = {"method": "lora", "method.rank": 8, "lr": 0.1, "seed": 0, "layers": "[0, 1]"}
    assert {key: rows[0][key] for key in first} == first
    assert rows[0]["client_test_accuracy_worst"] == pytest.approx(0.3)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_one_row_a_run_round_and_measure_is_exported(
    fedpeft: Command, folder: Path, kind: str
) -> None:
    fedpeft("results", str(folder), "--where", "lr=0.1", "--rounds", "--to", f"out/x.{kind}")
    rows = _read(Path(f"out/x.{kind}"))
    assert [tuple(row.values())[1:] for row in rows] == [
        (seed, r, "validation_accuracy", r / 10) for seed in (0, 1) for r in (0, 1)
    ]
    assert list(rows[0]) == ["path", "seed", "round", "measure", "value"]


def test_runs_without_a_round_have_no_table_of_rounds(
    fedpeft: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("method: {_target_: fedpeft.methods.lora.LoRA}\n")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit):
        fedpeft("results", str(tmp_path), "--rounds", "--to", "x.csv")
    assert "no run has ended a round yet" in capsys.readouterr().err
    assert not (tmp_path / "x.csv").exists()


def _read(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; CSV's cells as JSON where they are numbers."""
    if file.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(file).to_pylist()
    with file.open(newline="") as opened:
        return [{k: _cell(v) for k, v in row.items()} for row in csv.DictReader(opened)]


def _cell(text: str) -> Any:
    try:
        return float(text) if text else None
    except ValueError:
        return text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--where", "lrr=3"], "no run has a column lrr: did you mean lr?"),
        (["--where", "rank=3"], "no run has a column rank: did you mean method.rank?"),
        (["--where", "lr"], "--where takes conditions such as method=lora or 'lr<0.01', got lr"),
        (["--where", "method<lora"], "method<lora: < compares numbers"),
        (["--where", "lr=7"], "none of 4 runs meets lr=7"),
        (["--sort", "qality"], "no run has a column qality: did you mean quality?"),
        (["--to", "x.xlsx"], "--to must be a file .parquet or .csv, got x.xlsx"),
        (
            ["--over-seeds", "--columns", "seed"],
            "seed differs between the runs that --over-seeds makes one row of",
        ),
        (["--rounds"], "--rounds writes each run's rounds: it goes with --to FILE alone"),
    ],
)
def test_wrong_options_are_one_sentence(
    fedpeft: Command,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    says: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        fedpeft("results", str(folder), *options)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"fedpeft: {says}\n"


def test_the_committed_results_read(fedpeft: Command) -> None:
    quickstart = str(ROOT / "results" / "quickstart")
    rows = json.loads(fedpeft("results", quickstart, "--json", "--sort", "quality"))
    order = "lora scl ffa_lora fedtt fedtt_plus fedsa_lora"
    assert [row["method"] for row in rows] == order.split()
    assert rows[0]["quality"] == pytest.approx(128 / 240)
    assert "method.rank" not in rows[0]  # it differs with the method alone


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["method=lora", "method.rank=4", "lr=0.5"], ("lora", "dirichlet", "fedavg", "none")),
        (["method=flasc"], ("flasc", "dirichlet", "fedadam", "topk_both")),
        (["method=fedprompt", "partition=iid"], ("prompt", "iid", "fedavg", "none")),
        (
            ["method=fedtt_plus", "strategy=multi_krum"],
            ("fedtt_plus", "dirichlet", "multi_krum", "none"),
        ),
    ],
)
def test_the_files_that_a_configuration_comes_from(
    overrides: list[str], names: tuple[str, ...]
) -> None:
    chosen = choices(leaves(composed(overrides)))
    groups = ("method", "partition", "strategy", "compression")
    assert tuple(chosen[group] for group in groups) == names
    assert (chosen["model"], chosen["data"]) == ("minilm", "docstrings")


def test_a_class_that_moved_or_has_no_file() -> None:
    assert choices({"method._target_": "fedpeft.old.LoRA"})["method"] == "lora"
    assert choices({"method._target_": "fedpeft.old.Gone"})["method"] == "Gone"
    assert choices({})["method"] is None


def test_a_condition_on_what_a_run_lacks() -> None:
    assert not Condition.of("lr<3").holds({"lr": None})
    assert not Condition.of("lr=null").holds({})
    assert Condition.of("lr=null").holds({"lr": None})
    assert Condition.of("lr!=3").holds({})


def test_values_that_only_look_alike_are_not_said_to_be_shared() -> None:
    rows = [{"path": "a", "quality": 0.5, "worst": 0.85012}, {"path": "b", "worst": 0.84981}]
    shown = narrow_page(rows, ["path", "quality", "worst"], [], None)
    assert "worst" in shown.header and "all of them" not in shown.above
