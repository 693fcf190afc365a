"""A run says how it goes on: a line a round, a log for other programs, numbers for Prometheus."""

import json
import re
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from fedpeft.client.app import app as client_app
from fedpeft.deployment.processes import free_ports
from fedpeft.reporting.json_log import JsonLog
from fedpeft.reporting.observer import Line
from fedpeft.reporting.progress import line_text
from fedpeft.reporting.prometheus import Metrics
from fedpeft.server.seen import Asked, RoundFailed
from fedpeft.simulation.grid import InProcessGrid
from tests.conftest import ROOT, Answer, Runner

COUNTS = ("replied_clients", "late_clients", "refused_clients", "absent_clients")


def failing(*clients: int) -> Answer:
    """Answer, but fail the trainings of some clients."""

    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            if context.node_config.get("partition-id") in clients:
                raise RuntimeError("no reply within the hour")  # a text like that of the late
        return client_app(message=message, context=context)  # type: ignore[call-arg]

    return answer


class Silent(InProcessGrid):
    """Node 3 never answers a training."""

    def _in_parcels(self, group: list[Message]) -> Any:
        silent = [m for m in group if m.metadata.message_type == "train"]
        parcels = super()._in_parcels(group)
        return [p for p in parcels if p[0] not in silent or p[0].metadata.dst_node_id != 3]


class Leaving(InProcessGrid):
    """Node 2 is gone after the first question."""

    asked = 0

    def get_node_ids(self) -> list[int]:
        self.asked += 1
        return [1, 2, 3] if self.asked == 1 else [1, 3]


def counts(line: Line, start: str = "") -> list[int]:
    return [line[start + name] for name in COUNTS]


# --- the line a round ------------------------------------------------------------------------


def test_an_outcome_is_that_of_the_message() -> None:
    asked = Asked("train", clients=range(5), sent={0, 1, 2, 4}, answered={0, 2})
    asked.refused = dict.fromkeys((1, 2, 3, 4), "no reply within runtime.round_timeout=1 s")
    expected = ["replied", "late", "refused", "absent", "late"]
    assert [asked.outcome(client) for client in range(5)] == expected
    assert list(asked.counts()) == list(COUNTS) and counts(asked.counts()) == [1, 2, 1, 1]
    assert counts(Asked("evaluate", [7]).counts(), "evaluation_") == [0, 0, 0, 1]


def test_all_replied(run: Runner) -> None:
    run("method=fedsa_lora")
    assert [counts(line) for line in run.lines()[1:]] == [[3, 0, 0, 0]] * 2
    assert [counts(line, "evaluation_") for line in run.lines()] == [[3, 0, 0, 0]] * 3
    assert "replied" not in line_text(run.lines()[1], 2)


def test_a_client_that_fails_is_refused_and_none_that_was_silent(run: Runner) -> None:
    run("num_rounds=1", answer=failing(1))
    start, line = run.lines()
    assert counts(line) == [2, 0, 1, 0] and not any(name in start for name in COUNTS)
    assert line_text(line, 1).startswith("round 1/1  2 of 3 replied  train loss")


def test_a_client_that_is_silent_is_late(run: Runner) -> None:
    run("num_rounds=1", "runtime.round_timeout=2", grid=Silent)
    line = run.lines()[1]
    assert counts(line) == [2, 1, 0, 0] and list(line["refused"]) == ["2"]


def test_a_client_without_a_node_is_absent(run: Runner) -> None:
    run("num_rounds=1", "evaluation.clients=always", grid=Leaving)
    line = run.lines()[1]
    assert counts(line) == [2, 0, 0, 1] == counts(line, "evaluation_")
    assert "  2 of 3 replied  2 of 3 measured  " in line_text(line, 1)


# --- logs ------------------------------------------------------------------------------------


def events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Return what was written to standard error; every line must be an object."""
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_each_event_is_an_object_a_line(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    run("num_rounds=1", "evaluation.clients=always", "logs=json", answer=failing(1))
    log, (_, line) = events(capsys), run.lines()
    names = ["run_begun", "phase_begun", "round_done"]
    names += ["phase_begun", "client_left_out", "phase_begun", "round_done", "run_ended"]
    assert [entry["event"] for entry in log] == names
    assert {entry["run_dir"] for entry in log} == {str(run.run_dir)}
    times = [datetime.fromisoformat(entry["time"]) for entry in log]
    assert times == sorted(times) and {time.utcoffset() for time in times} == {timedelta()}
    assert log[0]["rounds"] == 1 and log[0]["title"] == f"LoRA: {run.run_dir}"
    assert [(e["phase"], e["clients"]) for e in log if e["event"] == "phase_begun"] == [
        ("evaluate", 3),
        ("train", 3),
        ("evaluate", 3),
    ]
    left_out = {"phase": "train", "client": 1, "outcome": "refused"}
    assert log[4].items() >= left_out.items() and "no reply within the hour" in log[4]["reason"]
    assert counts(log[6]) == [2, 0, 1, 0]
    for key in ("round", "seconds", "uplink_bytes", "downlink_bytes", "validation_loss"):
        assert log[6][key] == line[key]
    assert log[-1]["status"] == "completed" and "reason" not in log[-1]


def test_the_end_says_why_a_run_failed(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    with pytest.raises(RoundFailed) as failed:
        run("logs=json", answer=failing(0, 2))
    log = events(capsys)
    left_out = [(e["client"], e["outcome"]) for e in log if e["event"] == "client_left_out"]
    assert left_out == [(0, "refused"), (2, "refused")] * 2  # the round and its repetition
    assert log[-1]["event"] == "run_ended" and log[-1]["status"] == "failed"
    assert log[-1]["reason"] == str(failed.value)


def test_the_end_says_how_a_stopped_run_goes_on(
    run: Runner, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(JsonLog, "round_done", interrupted)
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt) as stopped:
        run("logs=json")
    end = events(capsys)[-1]
    assert end["event"] == "run_ended" and end["status"] == "stopped"
    assert end["reason"] == str(stopped.value) and end["reason"].endswith("resume=true goes on")


def test_each_phase_says_whom_it_left_out(run: Runner, capsys: Any) -> None:
    capsys.readouterr()
    run("num_rounds=1", "evaluation.clients=always", "logs=json", grid=Leaving)
    left_out = [entry for entry in events(capsys) if entry["event"] == "client_left_out"]
    assert [(e["phase"], e["client"], e["outcome"]) for e in left_out] == [
        ("train", 1, "absent"),
        ("evaluate", 1, "absent"),
    ]


def test_logs_and_metrics_change_nothing(run: Runner, tmp_path: Path) -> None:
    """Clients do not get these keys, and a run may go on with others."""

    def sent() -> object:
        return run.recorder.of("train")[0].down.content.config_records["config"]["overrides"]

    text, before, folder = run(), sent(), f"run_dir={tmp_path / 'json'}"
    assert run("logs=json", folder)["shared_state_sha256"] == text["shared_state_sha256"]
    assert sent() == before
    (tmp_path / "json" / "summary.json").unlink()
    again = run(folder, "resume=true", f"metrics_port={free_ports(1)[0]}")
    assert again["shared_state_sha256"] == text["shared_state_sha256"]


# --- Prometheus ------------------------------------------------------------------------------


def scraped(port: int) -> dict[str, float]:
    """Return the numbers by their names."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = [line for line in answer.read().decode().splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_prometheus_reads_a_run(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    port, read = free_ports(1)[0], dict[int, dict[str, float]]()
    done = Metrics.round_done

    def noted(self: Metrics, line: Line) -> None:
        done(self, line)
        read[line["round"]] = scraped(port)

    monkeypatch.setattr(Metrics, "round_done", noted)
    run("evaluation.clients=always", f"metrics_port={port}", answer=failing(1))
    lines, last = run.lines(), read[2]
    assert [read[r]["fedpeft_round"] for r in range(3)] == [0, 1, 2]
    assert last["fedpeft_rounds"] == 2
    outcomes = {"replied": 4, "refused": 2, "late": 0, "absent": 0}
    for outcome, number in outcomes.items():
        assert last[f'fedpeft_clients_total{{outcome="{outcome}",phase="train"}}'] == number
    assert last['fedpeft_clients_total{outcome="replied",phase="evaluate"}'] == 9
    for direction in ("up", "down"):
        for phase, start in (("train", ""), ("evaluate", "evaluation_")):
            total = sum(line.get(f"{start}{direction}link_bytes", 0) for line in lines)
            assert total > 0
            name = f'fedpeft_bytes_total{{direction="{direction}",phase="{phase}"}}'
            assert last[name] == total
    assert last["fedpeft_round_seconds_count"] == 3
    seconds = sum(line["seconds"] for line in lines)
    assert last["fedpeft_round_seconds_sum"] == pytest.approx(seconds)
    for name in ("validation_accuracy", "client_validation_accuracy", "train_loss"):
        assert last[f'fedpeft_measure{{name="{name}"}}'] == lines[2][name]
    documented = set(re.findall(r"fedpeft_\w+", (ROOT / "docs" / "operating.md").read_text()))
    assert documented < {name.partition("{")[0] for name in last} and len(documented) == 6
    with pytest.raises(urllib.error.URLError):  # it ends with the run
        scraped(port)


def test_the_next_run_has_the_port(run: Runner) -> None:
    port = f"metrics_port={free_ports(1)[0]}"
    with pytest.raises(RoundFailed):
        run(port, answer=failing(0, 1, 2))
    assert run(port)["refused"] == {}


def test_a_port_in_use(fedpeft: Callable[..., str], base: list[str], capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as ended:
            fedpeft("run", *base, f"metrics_port={port}", "run_dir=run")
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"fedpeft: metrics_port={port} cannot be opened on 127.0.0.1: Address already in use\n"
    )
    assert "results: run" in fedpeft("run", *base, f"metrics_port={port}", "run_dir=run")


def test_without_the_extra(run: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ValueError, match=r"pip install 'fedpeft\[metrics\]'$"):
        run("metrics_port=9100", f"run_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()
