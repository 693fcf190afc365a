"""The table of clients: rows of every round, their sums in its line, and ``fedpeft show``."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from rich.console import Console

from fedpeft.client.app import app as client_app
from fedpeft.reporting.clients import ClientTable, read_clients, read_columns
from fedpeft.reporting.observer import SPREAD
from fedpeft.reporting.progress import Display, line_text
from fedpeft.reporting.run_files import read_metrics
from fedpeft.server.evaluation import measured, over_clients
from fedpeft.server.replies import seconds
from fedpeft.server.seen import Asked, Seen
from fedpeft.simulation.launch import run as run_here
from fedpeft.wire import identify
from tests.conftest import Runner, Stopping

MEASURED = {
    0: {"test-num-examples": 1, "test_accuracy": 0.0, "test_loss": 4.0},
    1: {"test-num-examples": 3, "test_accuracy": 1.0, "test_loss": 1.0},
    2: {"test-num-examples": 4, "test_accuracy": 0.5, "test_loss": 2.0},
}


def _sign(name: str) -> int:
    return -1 if name == "loss" else 1


# --- sums over clients ---------------------------------------------------------------------------


def test_sums_of_measures_are_known() -> None:
    assert over_clients(MEASURED, _sign) == {
        "client_test_accuracy": (0 * 1 + 1 * 3 + 0.5 * 4) / 8,
        "client_test_accuracy_unweighted": 0.5,
        "client_test_accuracy_worst": 0.0,
        "client_test_accuracy_p10": 0.1,  # a fifth of the way from 0 to 0.5
        "client_test_loss": (4 * 1 + 1 * 3 + 2 * 4) / 8,
        "client_test_loss_unweighted": 7 / 3,
        "client_test_loss_worst": 4.0,
        "client_test_loss_p10": pytest.approx(3.6),  # of a loss, the end where it is large
    }


def test_the_worst_client_of_a_measure_of_which_less_is_better_has_most() -> None:
    sums = over_clients(MEASURED, lambda name: -1 if name == "accuracy" else 1)
    worst = {key: value for key, value in sums.items() if key.endswith(("worst", "p10"))}
    assert worst == {
        "client_test_accuracy_worst": 1.0,
        "client_test_accuracy_p10": 0.9,
        "client_test_loss_worst": 1.0,
        "client_test_loss_p10": pytest.approx(1.2),
    }


def test_a_measure_that_only_some_clients_have() -> None:
    some = MEASURED | {2: {"test-num-examples": 4, "test_loss": 2.0}}
    assert over_clients(some, _sign)["client_test_accuracy"] == 0.75
    assert over_clients(some, _sign)["client_test_accuracy_unweighted"] == 0.5
    assert over_clients({}, _sign) == {}


def test_the_line_on_the_terminal_has_the_mean_alone() -> None:
    sums = {f"client_validation_accuracy{suffix}": 0.25 for suffix in SPREAD}
    line = {"round": 1, "client_validation_accuracy": 0.5, "seconds": 1.0} | sums
    assert line_text(line, 2) == "round 1/2  clients' accuracy 0.5000  1.0 s"


# --- rows ----------------------------------------------------------------------------------------


def test_rows_join_both_phases() -> None:
    seen = Seen(cohort=[1, 2], weights={2: 1.0})
    seen.asked["train"] = Asked("train", [1, 2], {1, 2}, {1, 2})
    seen.refuse(1, "bad")
    seen.asked["evaluate"] = Asked("evaluate", [0, 2], {2}, {2})
    seen.count("uplink_bytes", 5, 2)
    seen.count("uplink_bytes", 7, 2)
    seen.note(2, test_rows=3)
    assert seen.traffic == {"uplink_bytes": 12}
    assert seen.rows(4) == [
        {"round": 4, "client": 0, "evaluation_outcome": "absent"},
        {"round": 4, "client": 1, "outcome": "refused"},
        {
            "round": 4,
            "client": 2,
            "outcome": "replied",
            "evaluation_outcome": "replied",
            "weight": 1.0,
            "uplink_bytes": 12,
            "test_rows": 3,
        },
    ]


def test_the_bytes_of_a_round_that_failed_count_too() -> None:
    first, second = Seen(), Seen()
    first.count("uplink_bytes", 5, 0)
    first.note(0, update_norm=9.0)
    second.count("uplink_bytes", 7, 0)
    second.count_again(first)
    assert second.traffic == {"uplink_bytes": 12}
    assert second.by_client == {0: {"uplink_bytes": 12}}


@pytest.mark.parametrize(
    ("said", "read"),
    [(1.23456, 1.235), (0.0, 0.0), (-1.0, None), (math.nan, None), (math.inf, None), (3, None)],
)
def test_a_client_s_seconds_are_checked(said: float, read: float | None) -> None:
    identify()
    content = RecordDict({"metrics": MetricRecord({"seconds": said})})
    assert seconds(Message(content, 1, "train")) == read


def test_whole_numbers_of_a_measure_are_read_as_floats() -> None:
    """A column of the table has one type, whatever a client sends."""
    identify()
    rows = {"validation-num-examples": 1, "test-num-examples": 2}
    content = RecordDict({"metrics": MetricRecord({**rows, "test_mine": 2**60})})
    read = measured(Message(content, 1, "evaluate"), {"mine": (-math.inf, math.inf)}, None)
    assert read == {**rows, "test_mine": 2.0**60}
    assert [type(value) for value in read.values()] == [int, int, float]


def test_the_table_holds_what_the_messages_held(run: Runner) -> None:
    summary = run("method=fedsa_lora", "method.rank=4", "clients_per_round=2")
    assert not (run.run_dir / "clients.jsonl").exists()
    rows = {(row["round"], row["client"]): row for row in read_clients(run.run_dir)}
    assert len(rows) == 9  # three clients measure in rounds 0, 1 and 2
    trained = run.recorder.of("train")
    assert len(trained) == 4
    for sent in trained:
        row, before, after = rows[sent.round, sent.client], sent.down_state(), sent.up_state()
        norm = math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in after))
        assert row["update_norm"] == pytest.approx(norm, rel=1e-5)
        said = sent.up.content.metric_records["metrics"]
        assert row["train_rows"] == said["num-examples"]
        assert row["train_loss"] == said["loss"]
        assert row["train_seconds"] == pytest.approx(said["seconds"], abs=6e-4)
        assert row["train_seconds"] > 0
    for sent in run.recorder.of("evaluate"):
        row = rows[sent.round - 1, sent.client]
        said = sent.up.content.metric_records["metrics"]
        assert row["test_accuracy"] == said["test_accuracy"]
        assert row["validation_rows"] == said["validation-num-examples"]
        assert row["evaluation_seconds"] == pytest.approx(said["seconds"], abs=6e-4)
    lines = run.lines()
    for line in lines:
        of_round = [row for (number, _), row in rows.items() if number == line["round"]]
        for key in (key for key in line if key.endswith("_bytes")):
            assert sum(row.get(key, 0) for row in of_round) == line[key]
        trainers = [row["client"] for row in of_round if "outcome" in row]
        assert trainers == line.get("cohort", [])
        accuracy = [row["test_accuracy"] for row in of_round]
        assert line["client_test_accuracy_worst"] == min(accuracy)
        mean = pytest.approx(sum(accuracy) / 3, rel=1e-12)
        assert line["client_test_accuracy_unweighted"] == mean
    for key in ("client_test_accuracy", *(f"client_test_accuracy{s}" for s in SPREAD)):
        assert summary["final"][key] == lines[-1][key]


def test_a_client_that_is_left_out_has_a_row(run: Runner) -> None:
    def answer(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise ValueError("no")
        return client_app(message=message, context=context)  # type: ignore[call-arg]

    run("method.rank=4", "num_rounds=1", answer=answer)
    rows = read_clients(run.run_dir)
    assert [row["outcome"] for row in rows] == ["replied", "refused", "replied"]
    assert "update_norm" not in rows[1] and "uplink_bytes" not in rows[1]
    assert rows[1]["downlink_bytes"] == rows[0]["downlink_bytes"]


# --- broken off and gone on with -----------------------------------------------------------------


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


def test_rounds_that_are_done_again_replace_their_rows(base: list[str], tmp_path: Path) -> None:
    given = [*base, "num_rounds=4", "method=fedsa_lora", "method.rank=4", "checkpoint.every=2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_here([*given, f"run_dir={whole}"], Display(Console(quiet=True)))
    with pytest.raises(KeyboardInterrupt):
        run_here([*given, f"run_dir={broken}"], Stopping(3))
    rows = read_clients(whole)
    killed = read_clients(broken)
    assert [row["round"] for row in killed] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert without_seconds(killed) == without_seconds(rows[:12])
    for folder in (whole, broken):  # packed, and not yet
        assert without_seconds(read_clients(folder, 2)) == without_seconds(rows[6:9])
        columns = read_columns(folder, ("client", "round", "none"))
        assert sorted(columns.column_names) == ["client", "round"]
    with (broken / "clients.jsonl").open("a") as file:
        file.write('{"round": 4, "cli')  # a line that the kill cut off
    assert read_clients(broken) == killed
    run_here([*given, f"run_dir={broken}", "resume=true"], Display(Console(quiet=True)))
    assert without_seconds(read_clients(broken)) == without_seconds(rows)
    assert len(rows) == 15


# --- fedpeft show --------------------------------------------------------------------------------

ROWS = [
    {"round": 0, "client": 0, "test_rows": 2, "test_accuracy": 0.5},
    {
        "round": 1,
        "client": 0,
        "outcome": "replied",
        "uplink_bytes": 1500,
        "evaluation_uplink_bytes": 100,
        "downlink_bytes": 2000,
        "train_rows": 20,
        "train_loss": 1.25,
        "update_norm": 0.5,
        "train_seconds": 1.5,
        "test_rows": 2,
        "test_accuracy": 1.0,
        "test_baseline": 0.5,
        "evaluation_seconds": 0.25,
    },
    {"round": 1, "client": 1, "outcome": "late", "downlink_bytes": 2000},
    {"round": 2, "client": 1, "outcome": "replied", "train_rows": 7},
]
LINE = {
    "round": 1,
    "client_test_accuracy": 0.75,
    "client_test_accuracy_unweighted": 0.625,
    "client_test_accuracy_worst": 0.125,
    "client_test_accuracy_p10": 0.375,
}


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The directory of a run that was killed after round 2."""
    folder = tmp_path / "killed"
    folder.mkdir()
    (folder / "clients.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "metrics.jsonl").write_text(json.dumps(LINE) + "\n")
    return folder


def test_show_has_a_row_a_client_and_the_sums(killed: Path) -> None:
    page = ClientTable.of(killed).page()  # the last round in which clients measured
    assert page.title == f"{killed}, round 1"
    assert page.header == (
        *("client", "rows", "train loss", "test accuracy"),
        *("update norm", "kB up", "kB down", "s"),
    )
    assert page.cells == [
        ["0", "20", "1.2500", "1.0000", "0.5000", "1.6", "2.0", "1.8"],
        ["1 late (train)", "-", "-", "-", "-", "0.0", "2.0", "-"],
        ["mean by rows", "", "", "0.7500", "", "", "", ""],
        ["mean by client", "", "", "0.6250", "", "", "", ""],
        ["10th percentile", "", "", "0.3750", "", "", "", ""],
        ["worst", "", "", "0.1250", "", "", "", ""],
    ]


def test_show_on_the_command_line(fedpeft: Callable[..., str], killed: Path) -> None:
    text = fedpeft("show", str(killed))
    assert "1 late (train)" in text and "10th percentile" in text
    assert f"All rounds and columns: {killed}/clients.jsonl" in text
    table = json.loads(fedpeft("show", str(killed), "--round=2", "--json"))
    assert table == {"round": 2, "clients": [ROWS[3]], "summed": {}}


def test_show_says_how_a_run_ended(killed: Path) -> None:
    before = list(ClientTable.of(killed).page().notes)
    summary: dict[str, Any] = {"selected_by": "validation_f1", "best": {"round": 1}}
    summary["stopped_early"] = {"round": 2, "reason": "why"}
    (killed / "summary.json").write_text(json.dumps(summary))
    notes = list(ClientTable.of(killed).page().notes)
    ended = ["Best round by validation_f1: 1.", "Ended early after round 2: why."]
    assert notes == [*before[:-1], *ended, before[-1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--round", "3"], "has no clients in round 3; rounds with clients: 0, 1, 2"),
        (["--round", "x"], "--round"),
        (["other"], "show needs the directory of one run: fedpeft show RUN"),
    ],
)
def test_show_says_what_is_wrong(
    fedpeft: Callable[..., str],
    killed: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit, match="2"):
        fedpeft("show", str(killed), *arguments)
    assert message in capsys.readouterr().err


def test_show_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no clients.parquet and no clients.jsonl: give"):
        ClientTable.of(tmp_path)


def test_a_new_run_does_not_go_on_with_the_rows_of_a_killed_one(run: Runner) -> None:
    folder = run.folder / "stale"
    folder.mkdir()
    (folder / "clients.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    run("method.rank=4", "num_rounds=1", f"run_dir={folder}")
    assert [row["round"] for row in read_clients(folder)] == [1, 1, 1]
    assert [line["round"] for line in read_metrics(folder)] == [0, 1]


def test_no_client_of_rows_of_its_own_weighs_more_than_a_share() -> None:
    """It says how many rows it has, and the mean chooses the best round."""
    said = {
        client: {"test-num-examples": rows, "test_accuracy": accuracy}
        for client, rows, accuracy in ((0, 10, 0.5), (1, 10, 0.7), (2, 10**9, 1.0))
    }
    sums = over_clients(said, _sign, most=0.5)
    assert sums["client_test_accuracy"] == pytest.approx(0.5 * 1.0 + 0.25 * 0.5 + 0.25 * 0.7)
    assert over_clients(said, _sign)["client_test_accuracy"] == pytest.approx(1, abs=1e-6)


def test_a_client_of_rows_of_its_own_says_no_more_than_anybody_has() -> None:
    identify()
    message = Message(RecordDict(), 1, "evaluate")
    metrics = {"validation-num-examples": 5, "test-num-examples": 10**18, "test_accuracy": 1.0}
    record = MetricRecord(metrics)
    reply = Message(RecordDict({"metrics": record}), reply_to=message)
    with pytest.raises(ValueError, match="000, but the client measures 1000000000 rows at most$"):
        measured(reply, {"accuracy": (-1.0, 1.0)}, None)


# --- lines ---------------------------------------------------------------------------------------


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"round": 0}\n{"round": 1}\n{"rou')
    assert read_metrics(tmp_path) == [{"round": 0}, {"round": 1}]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"rou\x00\x00', "is damaged: Invalid control character"),
        (b"", "is damaged: Expecting value"),
        (b"\xff\xfe", "is damaged: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "is damaged: maximum recursion depth"),
        (b"3", "must be an object, got 3"),
    ],
)
def test_a_damaged_line_is_named(line: bytes, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"round": 0}\n' + line + b'\n{"round": 2}\n')
    with pytest.raises(ValueError, match=f"^{file} line 2 {sentence}"):
        read_metrics(tmp_path)
