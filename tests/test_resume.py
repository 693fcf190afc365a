"""A run that was stopped goes on from its last checkpoint and ends with the same bits."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from flwr.app import Context, Message
from omegaconf import DictConfig, OmegaConf
from pyarrow import parquet

from fedpeft.client.app import app as client_app
from fedpeft.config.load import load_config
from fedpeft.data.partitions.saved import Saved, write_partition
from fedpeft.engine.engine import Engine, open_engine
from fedpeft.reporting.run_directory import RunDirectory
from fedpeft.reporting.run_files import check_same, read_metrics
from fedpeft.server import run
from fedpeft.server.checkpoint import NOTES, Checkpoints
from fedpeft.server.seen import RoundFailed
from fedpeft.simulation import launch
from fedpeft.simulation.grid import InProcessGrid
from fedpeft.simulation.launch import run as run_here
from fedpeft.state import read_with_notes, save
from tests.conftest import TOPICS, Stopping, cut, without_time
from tests.grids import own_rows


@pytest.fixture
def launched(base: list[str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``launched(folder, overrides, stop=3)`` runs in this process in a folder of that name."""

    def launch(folder: str, *overrides: str, stop: int = -1) -> dict[str, Any]:
        given = [*base, "num_rounds=5", *overrides, f"run_dir={tmp_path / folder}"]
        return run_here(given, Stopping(stop))

    return launch


Launched = Callable[..., dict[str, Any]]
CASES = {
    "lora": ["method=lora"],
    "personal": ["method=fedsa_lora", "clients_per_round=2"],
    "server memory": ["strategy=fedadam"],
    "controls": ["strategy=scaffold", "optimizer.name=sgd", "optimizer.momentum=0"],
    "error feedback": ["compression=topk"],
    "moments": ["optimizer.keep_state=true", "clients_per_round=2"],
    "lossy down": ["compression=topk_both"],
    "first gradient": ["method=fed_sb", "method.rank=4"],
    "shrinking ranks": ["method=hetlora", "method.rank=4", "method.prune=0.5"],
    "base weights": ["method=fedex_lora", "method.rank=4"],
    "alternating": ["method=rolora", "method.rank=4", "clients_per_round=0.5"],
    "nothing sent": ["strategy=local_only"],
}


@pytest.mark.matrix
@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_the_same_bits(overrides: list[str], launched: Launched, tmp_path: Path) -> None:
    whole = launched("whole", *overrides)
    for stop in (2, 4, 5):
        with pytest.raises(KeyboardInterrupt, match=r"stopped after round \d: the same command"):
            launched("broken", *overrides, "resume=true", stop=stop)
    resumed = launched("broken", *overrides, "resume=true")
    assert without_time(resumed) == without_time(whole)
    lines = [without_time(read_metrics(tmp_path / name)) for name in ("whole", "broken")]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("every", [2, 3])
def test_rounds_since_the_last_checkpoint_are_done_again(launched: Launched, every: int) -> None:
    given = ["method=fedsa_lora", "method.rank=4", f"checkpoint.every={every}"]
    whole = launched("whole", *given)
    with pytest.raises(KeyboardInterrupt):
        launched("broken", *given, stop=4)
    resumed = launched("broken", *given, "resume=true")
    assert resumed["shared_state_sha256"] == whole["shared_state_sha256"]


def test_a_broken_checkpoint_gives_way_to_the_one_before(
    launched: Launched, tmp_path: Path
) -> None:
    whole = launched("whole", "method=fedsa_lora", "method.rank=4")
    with pytest.raises(KeyboardInterrupt):
        launched("broken", "method=fedsa_lora", "method.rank=4", stop=4)
    folder = tmp_path / "broken" / "checkpoints"
    assert sorted(p.name for p in folder.glob("round*")) == [
        "round_00002.safetensors",
        "round_00003.safetensors",
    ]
    cut(folder / "round_00003.safetensors")
    resumed = launched("broken", "method=fedsa_lora", "method.rank=4", "resume=true")
    assert resumed["shared_state_sha256"] == whole["shared_state_sha256"]


def test_an_older_checkpoint_is_whole_after_a_resume(launched: Launched, tmp_path: Path) -> None:
    """Clients keep what the checkpoints count on, also those from before the resume."""
    given = ["method=fedsa_lora", "method.rank=4"]
    whole = launched("whole", *given)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            launched("broken", *given, "resume=true", stop=3)
    cut(tmp_path / "broken" / "checkpoints" / "round_00002.safetensors")
    resumed = launched("broken", *given, "resume=true")
    assert resumed["shared_state_sha256"] == whole["shared_state_sha256"]


def test_the_seconds_of_a_resumed_run_are_those_of_its_parts(
    launched: Launched, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        launched("run", "num_rounds=2", stop=2)
    file = tmp_path / "run" / "checkpoints" / "round_00001.safetensors"
    tensors, notes = read_with_notes(file)
    save(file, tensors, {NOTES: json.dumps(json.loads(notes[NOTES]) | {"seconds": 1000.0})})
    assert 1000 < launched("run", "num_rounds=2", "resume=true")["seconds"] < 1100


def test_no_checkpoint_that_can_be_read_is_said(launched: Launched, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        launched("broken", stop=3)
    for path in (tmp_path / "broken" / "checkpoints").glob("round*"):
        cut(path)
    with pytest.raises(ValueError, match="no checkpoint can be read: .*round_00002.*is broken"):
        launched("broken", "resume=true")


def best_round(folder: Path) -> int:
    """Return the round whose state lies beside the checkpoints as the best."""
    (path,) = (folder / "checkpoints").glob("best*")
    return int(path.stem.removeprefix("best_"))


def test_a_lost_best_state_changes_no_later_round(
    launched: Launched, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The best of three rounds is the first one, because the others learn nothing."""
    given = ["lr=1e-30", "num_rounds=4"]
    whole = launched("whole", *given)
    with pytest.raises(KeyboardInterrupt):
        launched("broken", *given, stop=4)
    assert whole["best"]["round"] == best_round(tmp_path / "broken") == 0
    cut(tmp_path / "broken" / "checkpoints" / "best_00000.safetensors")
    resumed = launched("broken", *given, "resume=true")
    assert resumed["shared_state_sha256"] == whole["shared_state_sha256"]
    assert resumed["best"]["round"] == 3
    for key in ("validation_accuracy", "test_accuracy"):
        assert resumed["best"][key] == whole["best"][key]
    said = "round 0 was the best so far, but its state is lost: from now on the best one is chosen "
    assert f"{said}from round 3 on" in caplog.messages


def test_a_lost_best_state_stays_lost(launched: Launched, tmp_path: Path) -> None:
    """The lines of a second resume would choose round 0 again, whose state nobody has."""
    given = ["lr=1e-30", "num_rounds=6"]
    with pytest.raises(KeyboardInterrupt):
        launched("broken", *given, stop=4)
    cut(tmp_path / "broken" / "checkpoints" / "best_00000.safetensors")
    with pytest.raises(KeyboardInterrupt):
        launched("broken", *given, "resume=true", stop=5)
    assert launched("broken", *given, "resume=true")["best"]["round"] == 3


@pytest.mark.parametrize("damage", ["gone", "empty", "one"])
def test_a_run_does_not_go_on_without_its_lines(
    damage: str, launched: Launched, tmp_path: Path
) -> None:
    """The summary would take round 3 for the initial one."""
    with pytest.raises(KeyboardInterrupt):
        launched("run", stop=3)
    file = tmp_path / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.unlink()
    if damage != "gone":
        file.write_text("".join(lines[:1] if damage == "one" else []))
    for overrides, rule in (
        ((), "already holds a run: give another, or resume=true to go on"),
        (("resume=true", "lr=0.5"), "holds a run with lr=0.003, and now it is 0.5"),
        (("resume=true",), "metrics.jsonl must have a line for each round from 0 to 2, the "),
    ):
        with pytest.raises(ValueError, match=rule):
            launched("run", *overrides)


# --- the end of a run ----------------------------------------------------------------------------

ENDS = ("pack_clients", "save_partition", "finish", "error_at_start", "drop_clients")
FILES = ("clients.parquet", "partition.parquet", "summary.json")


@pytest.mark.parametrize("end", ENDS)
def test_a_run_that_is_killed_after_its_last_round(
    end: str, launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No node is asked any more, and yet all files are written."""
    whole = launched("whole", "num_rounds=2")
    owner = run if end == "error_at_start" else RunDirectory

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, end, killed)
        launched("broken", "num_rounds=2")
    resumed = launched("broken", "num_rounds=2", "resume=true")
    assert without_time(resumed) == without_time(whole) and resumed["initial_error"]
    folders = tmp_path / "whole", tmp_path / "broken"
    clients, held = (
        [untimed(folder / name) for folder in folders]
        for name in ("clients.parquet", "partition.parquet")
    )
    assert clients[0] == clients[1] and {row["round"] for row in clients[1]} == {1, 2}
    assert held[0] == held[1] and {row["client"] for row in held[1]} == {0, 1, 2}


def untimed(file: Path) -> list[dict[str, Any]]:
    """Return a table's rows without their times."""
    rows = parquet.read_table(file).to_pylist()
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def test_all_files_are_there_before_the_base_model_is_built(
    launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may lack for it; the summary then has all but how far the modules start from it."""

    def no_memory(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(run, "error_at_start", no_memory)
    with pytest.raises(MemoryError):
        launched("run", "num_rounds=1")
    assert all((tmp_path / "run" / name).exists() for name in FILES)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["final"]["round"] == 1 and "initial_error" not in summary


def test_a_finished_run_is_not_run_again(launched: Launched, tmp_path: Path) -> None:
    first = launched("run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert launched("run", "resume=true", stop=0) == first
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_run_that_another_process_ended_meanwhile_stays_as_it_is(
    launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process asks before the other one ends, and takes the directory after it."""
    first = launched("run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    monkeypatch.setattr(launch, "finished", lambda _: None)
    assert launched("run", "resume=true", "logs=json") == first
    assert {path: path.read_bytes() for path in before} == before
    launched("run", "resume=true")  # the directory is free again


def test_a_run_without_its_summary_keeps_its_clients(launched: Launched, tmp_path: Path) -> None:
    whole = launched("run")
    table = parquet.read_table(tmp_path / "run" / "clients.parquet")
    (tmp_path / "run" / "summary.json").unlink()
    assert without_time(launched("run", "resume=true")) == without_time(whole)
    assert parquet.read_table(tmp_path / "run" / "clients.parquet").equals(table)
    assert table.num_rows == 15


@pytest.mark.parametrize("stop", [-1, 3])
def test_another_configuration_does_not_go_on(launched: Launched, stop: int) -> None:
    try:
        launched("run", stop=stop)
    except KeyboardInterrupt:
        assert stop == 3
    with pytest.raises(ValueError, match=r"holds a run with lr=0.003, and now it is 0.5"):
        launched("run", "resume=true", "lr=0.5")


@pytest.mark.parametrize(
    "override",
    [
        "runtime.min_replies=1",
        "runtime.round_timeout=9",
        "checkpoint.every=2",
    ],
)
def test_keys_that_change_no_result_may_change(launched: Launched, override: str) -> None:
    """A user may change them, for example to go on after a round had too few replies."""
    with pytest.raises(KeyboardInterrupt):
        launched("run", stop=2)
    assert launched("run", "resume=true", override)["shared_state_sha256"]


def test_a_run_may_go_on_on_another_cluster(tmp_path: Path) -> None:
    def tree(address: str | None, lr: float) -> DictConfig:
        return OmegaConf.create({"runtime": {"address": address}, "lr": lr})

    check_same(tree(None, 0.1), tree("10.0.0.1:6379", 0.1), tmp_path)
    with pytest.raises(ValueError, match=r"with lr=0.1, and now it is 0.2"):
        check_same(tree(None, 0.1), tree("10.0.0.1:6379", 0.2), tmp_path)


def test_resume_begins_where_nothing_is(launched: Launched) -> None:
    assert (
        launched("new", "resume=true")["shared_state_sha256"]
        == launched("other")["shared_state_sha256"]
    )


def test_resume_wants_a_run_dir(base: list[str]) -> None:
    with pytest.raises(ValueError, match="resume=true goes on with a run: give its run_dir"):
        run_here([*base, "resume=true"])


def test_the_checkpoint_before_stays_until_the_next_is_complete(
    launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full while round 3's is written."""
    whole = launched("whole")
    with monkeypatch.context() as patch:
        from fedpeft import state as files

        save_file = files.save_file

        def full(tensors: Any, path: Path, metadata: Any) -> None:
            save_file(tensors, path, metadata)
            if "round_00003" in str(path):
                path.write_bytes(path.read_bytes()[:100])
                raise OSError(28, "No space left on device", str(path))

        patch.setattr(files, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            launched("run")
    folder = tmp_path / "run" / "checkpoints"
    assert "round_00002.safetensors" in {p.name for p in folder.iterdir()}
    resumed = launched("run", "resume=true")
    assert resumed["shared_state_sha256"] == whole["shared_state_sha256"]


# --- rows ----------------------------------------------------------------------------------------


def edit(file: Path) -> None:
    """Change one text of a table, as an editor does between two commands."""
    rows = parquet.read_table(file).to_pydict()
    rows["text"][7] += " bread"
    parquet.write_table(pyarrow.table(rows), file)
    open_engine.cache_clear()  # a new process reads the rows again


def stripped(checkpoint: Path) -> None:
    """Take the hashes of rows out of a checkpoint, as earlier versions wrote it."""
    tensors, notes = read_with_notes(checkpoint)
    kept = {k: v for k, v in json.loads(notes[NOTES]).items() if k not in ("data", "partition")}
    save(checkpoint, tensors, {NOTES: json.dumps(kept)})


@pytest.fixture
def own_table(table: Path, tmp_path: Path) -> Path:
    """A copy of the table that a test may change."""
    return Path(shutil.copytree(table, tmp_path / "table"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_run_does_not_go_on_with_rows_that_were_edited(
    split: str, launched: Launched, own_table: Path
) -> None:
    given = [f"data.path={own_table}", "resume=true", "num_rounds=2"]
    with pytest.raises(KeyboardInterrupt):
        launched("run", *given, stop=2)
    edit(own_table / f"{split}.parquet")
    with pytest.raises(
        ValueError,
        match=r"^the rows of the data set have changed since round 1 of .*/run \(SHA-256 "
        r"[0-9a-f]{12}, now [0-9a-f]{12}\): bring back what it was, or give another run_dir$",
    ):
        launched("run", *given)


def test_a_finished_run_is_returned_whatever_its_rows_are_now(
    launched: Launched, own_table: Path
) -> None:
    given = [f"data.path={own_table}", "resume=true", "num_rounds=1"]
    first = launched("run", *given)
    edit(own_table / "train.parquet")
    assert launched("run", *given) == first


def test_the_same_rows_elsewhere_in_time_go_on(launched: Launched, own_table: Path) -> None:
    given = [f"data.path={own_table}", "resume=true", "num_rounds=2"]
    whole = launched("whole", *given)
    with pytest.raises(KeyboardInterrupt):
        launched("run", *given, stop=2)
    for file in own_table.iterdir():
        os.utime(file, (1, 1))
    open_engine.cache_clear()
    assert launched("run", *given)["shared_state_sha256"] == whole["shared_state_sha256"]


def test_a_checkpoint_of_an_earlier_version_goes_on(launched: Launched, tmp_path: Path) -> None:
    whole = launched("whole", "num_rounds=2")
    with pytest.raises(KeyboardInterrupt):
        launched("run", "num_rounds=2", stop=2)
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("round_*"):
        stripped(checkpoint)
    resumed = launched("run", "num_rounds=2", "resume=true")
    assert resumed["shared_state_sha256"] == whole["shared_state_sha256"]


def test_a_run_does_not_go_on_with_another_partition(
    launched: Launched, base: list[str], tmp_path: Path
) -> None:
    """Two clients exchange a row; the rows of the data set stay."""
    file, clients = tmp_path / "partition.json", np.split(np.arange(240), 3)
    labels = Engine(load_config(base)).task.group_numbers(None)
    given = ["partition=saved", f"partition.file={file}", "resume=true", "num_rounds=2"]
    write_partition(file, Saved(), labels, 0, clients)
    with pytest.raises(KeyboardInterrupt):
        launched("run", *given, stop=2)
    clients[0][5], clients[1][5] = clients[1][5], clients[0][5]
    write_partition(file, Saved(), labels, 0, clients)
    open_engine.cache_clear()
    with pytest.raises(ValueError, match="^the partition, which says who holds which rows, has"):
        launched("run", *given)


def test_a_run_remembers_who_had_rows_of_its_own(run: Any, own_table: Path, tmp_path: Path) -> None:
    """The server knows of them by the checkpoint, because client 1's node is not back yet."""
    given = [f"data.labels=[{','.join(TOPICS)}]", "num_rounds=1", f"run_dir={tmp_path / 'own'}"]
    assert run(*given, grid=own_rows(1, own_table))["partition_sha256"] is None
    again = run(*given, "resume=true")
    assert again["partition_sha256"] is None
    held = parquet.read_table(tmp_path / "own" / "partition.parquet")["client"].to_pylist()
    assert set(held) == {0, 2}


def test_a_resumed_run_remembers_how_many_rows_a_client_said(
    run: Any, own_table: Path, tmp_path: Path
) -> None:
    """The server cannot count them, so the first number is the most that client 1 may say."""

    stopped = False

    def more(message: Message, context: Context) -> Message:
        nonlocal stopped
        config = message.content.config_records.get("config", {})
        second = message.metadata.message_type == "train" and config["round"] == 2
        if second and not stopped:
            stopped = True
            raise KeyboardInterrupt
        reply = client_app(message=message, context=context)  # type: ignore[call-arg]
        if second and context.node_config["partition-id"] == 1:
            reply.content.metric_records["metrics"]["num-examples"] += 1  # type: ignore[operator]
        return reply

    given = [f"data.labels=[{','.join(TOPICS)}]", "num_rounds=2", f"run_dir={tmp_path / 'said'}"]
    with pytest.raises(KeyboardInterrupt):
        run(*given, answer=more, grid=own_rows(1, own_table))
    refused = run(*given, "resume=true", answer=more, grid=own_rows(1, own_table))["refused"]
    rows = re.fullmatch(r"num-examples is (\d+), but the client has (\d+)", refused["2"]["1"])
    assert rows and int(rows[1]) == int(rows[2]) + 1


def test_a_resumed_run_goes_on_without_a_node_that_does_not_come(run: Any, tmp_path: Path) -> None:
    """A new run would wait for all nodes and then end."""

    class Fewer(InProcessGrid):
        def get_node_ids(self) -> list[int]:
            return [1, 2]

    def stopping(message: Message, context: Context) -> Message:
        if message.content.config_records.get("config", {}).get("round") == 2:
            raise KeyboardInterrupt
        return client_app(message=message, context=context)

    given = [f"run_dir={tmp_path / 'fewer'}", "num_rounds=2", "runtime.join_timeout=0.3"]
    with pytest.raises(KeyboardInterrupt):
        run(*given, answer=stopping)
    assert list(run(*given, "resume=true", grid=Fewer)["refused"]["2"]) == ["2"]


def test_what_clients_say_of_the_servers_rows_is_not_remembered(run: Any, tmp_path: Path) -> None:
    """After a stop, a client's node may come back with more rows of its own."""
    run("num_rounds=1", f"run_dir={tmp_path / 'shared'}")
    assert Checkpoints(tmp_path / "shared" / "checkpoints", 1).load()[-1].said == {}


def test_a_client_whose_own_rows_have_changed_is_refused(run: Any, own_table: Path) -> None:
    """Only the node of client 1 knows them, and the method keeps nothing there."""
    file = own_table / "train.parquet"
    parquet.write_table(parquet.read_table(file).slice(0, 40), file)

    def answer(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            config = {**context.node_config, "data-path": str(own_table)}
            context = Context(1, context.node_id, config, context.state, {})
            round = message.content.config_records["config"]["round"]
            if (message.metadata.message_type, round) == ("train", 2):
                edit(file)
        return client_app(message=message, context=context)  # type: ignore[call-arg]

    labels = f"data.labels=[{','.join(TOPICS)}]"
    summary = run(labels, "num_rounds=3", "evaluation.clients=always", answer=answer)
    reason = (
        "this client's rows have changed since it first took part in this run: give its node the "
        "rows that it had, or begin another run"
    )
    both = f"{reason}; evaluation: {reason}"  # it neither trains nor measures
    assert summary["refused"] == {"2": {"1": both}, "3": {"1": both}}


# --- what a client keeps -------------------------------------------------------------------------


def test_a_lost_reply_never_happened_on_the_client(run: Any, tmp_path: Path) -> None:
    """Client 1's reply to round 2 is lost after training: round 3 starts from its round 1."""

    def losing(message: Message, context: Context) -> Message:
        reply = client_app(message=message, context=context)  # type: ignore[call-arg]
        config = message.content.config_records.get("config", {})
        if message.metadata.message_type == "train" and config["round"] == 2:
            if context.node_config["partition-id"] == 1:
                raise RuntimeError("the line was cut")
        return reply

    def absent(message: Message, context: Context) -> Message:
        config = message.content.config_records.get("config", {})
        if message.metadata.message_type == "train" and config["round"] == 2:
            if context.node_config["partition-id"] == 1:
                raise RuntimeError("the line was cut")
        return client_app(message=message, context=context)  # type: ignore[call-arg]

    given = ["method=fedsa_lora", "num_rounds=3"]
    lost, never = run(*given, answer=losing), run(*given, answer=absent)
    assert lost["refused"] == {"2": {"1": "the line was cut"}}
    assert lost["shared_state_sha256"] == never["shared_state_sha256"]
    assert lost["final"] == never["final"]


def forgetting(folder: Path) -> Callable[[Message, Context], Message]:
    """Answer as clients do, but before each message of round 2 client 1 loses its files."""

    def answer(message: Message, context: Context) -> Message:
        config = message.content.config_records.get("config")
        client = context.node_config["partition-id"]
        if config is not None and (client, config["round"]) == (1, 2):
            for file in Path(str(context.node_config["state-folder"])).glob("*/client_1/*"):
                file.unlink()
        return client_app(message=message, context=context)  # type: ignore[call-arg]

    return answer


def test_a_lost_state_is_refused(run: Any, tmp_path: Path) -> None:
    summary = run("method=fedsa_lora", "num_rounds=3", answer=forgetting(tmp_path))
    reason = summary["refused"]["2"]["1"]
    assert reason.startswith(
        "the server goes on from generation 1 of this client's kept state, but"
    )
    assert summary["restarted"] == {}
    assert "1" in summary["refused"]["3"]


def test_a_lost_state_begins_anew_where_that_is_asked_for(run: Any, tmp_path: Path) -> None:
    summary = run(
        "method=fedsa_lora",
        "num_rounds=3",
        "runtime.lost_state=restart",
        answer=forgetting(tmp_path),
    )
    # lost when it was evaluated after round 1, and again when it trained in round 2
    assert summary["refused"] == {} and summary["restarted"] == {"1": [1], "2": [1]}
    assert [line.get("restarted") for line in run.lines()] == [None, [1], [1], None]


def test_a_step_that_overflows_is_not_kept(run: Any, tmp_path: Path) -> None:
    """The loss of the only step is finite, and its gradient is too, but the step is not."""
    step = ("optimizer.name=sgd", "optimizer.max_grad_norm=null", "local_steps=1", "lr=1e38")
    reason = r"classifier\.\w+ holds values that are not finite after training: lower lr"
    with pytest.raises(RoundFailed, match=reason):
        run(
            "method=fedsa_lora",
            *step,
            "optimizer.weight_decay=1e10",
            f"run_dir={tmp_path / 'run'}",
        )
    assert not list(tmp_path.rglob("client_*/*.safetensors"))
