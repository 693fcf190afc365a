"""A run that was stopped goes on from its last checkpoint and ends with the same bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from fedpeft.client.app import app as client_app
from fedpeft.reporting.progress import Display
from fedpeft.reporting.run_directory import check_same, read_metrics
from fedpeft.server.seen import RoundFailed
from fedpeft.simulation.launch import run as run_here
from tests.conftest import without_time


class Stopping(Display):
    """Stops a run at a round, before its checkpoint (as Ctrl-C would) or after."""

    def __init__(self, round: int) -> None:
        super().__init__(Console(quiet=True))
        self.round = round

    def round_done(self, line: Any) -> None:
        if line["round"] == self.round:
            raise KeyboardInterrupt


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
    for stop in (2, 4):
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


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


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
    spoil(folder / "round_00003.safetensors")
    resumed = launched("broken", "method=fedsa_lora", "method.rank=4", "resume=true")
    assert resumed["shared_state_sha256"] == whole["shared_state_sha256"]


def test_no_checkpoint_that_can_be_read_is_said(launched: Launched, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        launched("broken", stop=3)
    for path in (tmp_path / "broken" / "checkpoints").glob("round*"):
        spoil(path)
    with pytest.raises(ValueError, match="no checkpoint can be read: .*round_00002.*is broken"):
        launched("broken", "resume=true")


def test_a_finished_run_is_not_run_again(launched: Launched, tmp_path: Path) -> None:
    first = launched("run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert launched("run", "resume=true", stop=0) == first
    assert {p: p.stat().st_mtime_ns for p in before} == before


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
    """For example to go on after a round had too few replies."""
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
        import safetensors.torch as files

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
