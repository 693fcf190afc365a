"""Files that change, are lost or are damaged between two commands are named; nothing is mixed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from fedpeft.export.load import load
from fedpeft.simulation.launch import run
from tests.conftest import Stopping, cut, quiet

Command = Callable[..., str]


@pytest.fixture
def here(base: list[str], tmp_path: Path, checkpoint: Path, table: Path) -> list[str]:
    """``base`` with rows and weights of its own, in the folders ``table`` and ``bert``."""
    shutil.copytree(table, tmp_path / "table")
    shutil.copytree(checkpoint, tmp_path / "bert")
    of_method = (f"model.path={tmp_path / 'bert'}", f"data.path={tmp_path / 'table'}")
    return [*(o for o in base if not o.startswith(("method", "model.p", "data.p"))), *of_method]


def fewer_rows(folder: Path) -> None:
    file = folder / "train.parquet"
    pd.read_parquet(file)[:-30].to_parquet(file)


def other_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({n: torch.flip(v, (0,)).contiguous() for n, v in tensors.items()}, file)


def failed(capsys: pytest.CaptureFixture[str], command: Command, *words: str) -> str:
    """Return the error with which a command ends."""
    with pytest.raises(SystemExit):
        command(*words)
    return capsys.readouterr().err


# --- runs that are compared ----------------------------------------------------------------------


@pytest.mark.parametrize("what", ["rows", "weights"])
@pytest.mark.parametrize("command", ["study", "compare"])
def test_a_study_does_not_go_on_with_other_rows_or_weights(
    command: str,
    what: str,
    here: list[str],
    fedpeft: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [command, *here, "num_rounds=1", f"run_dir={tmp_path / 'out'}", "--methods"]
    fedpeft(*words, "lora")
    if what == "rows":
        fewer_rows(tmp_path / "table")
    else:
        other_weights(tmp_path / "bert")
    fedpeft(*words, "lora")  # makes the table again, and reads neither
    error = failed(capsys, fedpeft, *words, "lora,bitfit")
    assert f"was made from other {what} (SHA-256 " in error and "than there are now (" in error
    assert not (tmp_path / "out" / "bitfit").exists()


def test_finished_runs_with_other_rows_make_no_table(
    here: list[str], fedpeft: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", *here, "num_rounds=1", f"run_dir={tmp_path / 'out'}", "--methods"]
    fedpeft(*words, "lora,bitfit")
    file = tmp_path / "out" / "bitfit" / "summary.json"
    summary = json.loads(file.read_text())
    file.write_text(json.dumps(summary | {"data": summary["data"] | {"sha256": "0" * 64}}))
    error = failed(capsys, fedpeft, *words, "lora,bitfit")
    assert "out/lora was made from other rows" in error and "out/bitfit (000000000000)" in error


def test_a_second_command_on_the_same_runs_ends_and_counts_none_as_failed(
    here: list[str], fedpeft: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", *here, "num_rounds=1", f"run_dir={tmp_path / 'out'}"]
    words += ["--methods", "lora,bitfit"]
    (tmp_path / "out" / "lora").mkdir(parents=True)
    with FileLock(tmp_path / "out" / "lora" / ".lock"):
        error = failed(capsys, fedpeft, *words)
    assert "out/lora: another run writes into it now" in error
    assert not (tmp_path / "out" / "comparison.md").exists()
    fedpeft(*words)
    assert "| lora |" in (tmp_path / "out" / "comparison.md").read_text()


def test_what_a_later_table_holds_is_compared_before_the_first_table_trains(
    here: list[str], fedpeft: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["study", *here, "num_rounds=1", f"run_dir={tmp_path / 'out'}", "--methods", "lora"]
    words.append("study.cells=['num_clients=2','num_clients=3']")
    fedpeft(*words)
    shutil.rmtree(tmp_path / "out" / "num_clients=2")
    error = failed(capsys, fedpeft, *words, "local_steps=3")
    assert "num_clients=3/lora/lr=0.003/seed=0 holds a run with local_steps=2" in error
    assert not (tmp_path / "out" / "num_clients=2").exists()


def test_a_name_that_no_file_system_takes_is_said_before_the_first_run(
    here: list[str], fedpeft: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = ",".join(f"encoder.layer.{i % 2}.attention.self.query" for i in range(8))
    entries = f"bitfit,lora+method.targets=[{targets}]"
    words = ["compare", *here, f"run_dir={tmp_path / 'out'}", "--methods", entries]
    assert "has a name of 317 bytes, and a file system takes 255" in failed(capsys, fedpeft, *words)
    assert not (tmp_path / "out").exists()


# --- a run that goes on ---------------------------------------------------------------------------


@pytest.fixture
def broken(here: list[str], tmp_path: Path) -> list[str]:
    """Overrides that go on with a run which was stopped after round 2 of 4."""
    words = [*here, "num_rounds=4", f"run_dir={tmp_path / 'run'}", "resume=true"]
    with pytest.raises(KeyboardInterrupt):
        run(words, Stopping(3))
    return words


def test_a_run_does_not_go_on_with_other_weights(broken: list[str], tmp_path: Path) -> None:
    other_weights(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"run was trained on weights with SHA-256 \w{12}, and"):
        run(broken, quiet())


def test_a_run_whose_checkpoints_are_lost_keeps_its_rounds(
    broken: list[str], tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    says = "has no checkpoint, although metrics.jsonl beside it has rounds up to 3: bring it back"
    with pytest.raises(ValueError, match=says):
        run(broken, quiet())
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines


# --- a model of a run -----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["evaluate", "export", "predict"])
def test_a_model_is_not_put_together_from_other_weights(
    command: str,
    here: list[str],
    fedpeft: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run([*here, f"run_dir={tmp_path / 'run'}"], quiet())
    fedpeft("export", str(tmp_path / "run"), "--to", "out")
    shutil.copytree(tmp_path / "bert", tmp_path / "moved")
    other_weights(tmp_path / "bert")
    words = [command, str(tmp_path / "run"), *(["--to", "new"] if command == "export" else [])]
    error = failed(capsys, fedpeft, *words)
    assert "run was trained on weights with SHA-256 " in error and "by model.path" in error
    assert not Path("new").exists()
    with pytest.raises(ValueError, match="out was trained on weights with SHA-256"):
        load("out")
    load("out", base=str(tmp_path / "moved"))


def test_a_run_is_not_measured_on_rows_that_have_changed(
    here: list[str], fedpeft: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("validation", "test"):  # set aside from train
        (tmp_path / "table" / f"{name}.parquet").unlink()
    run([*here, f"run_dir={tmp_path / 'run'}"], quiet())
    path = str(tmp_path / "run")
    fedpeft("evaluate", path)
    fewer_rows(tmp_path / "table")
    error = failed(capsys, fedpeft, "evaluate", path)
    assert "have changed since " in error and "by data.path=FOLDER" in error
    assert "test_rows: 210\n" in fedpeft("evaluate", path, f"data.path={tmp_path / 'table'}")


def test_rows_that_train_may_change_where_the_test_has_a_table_of_its_own(
    here: list[str], fedpeft: Command, tmp_path: Path
) -> None:
    run([*here, f"run_dir={tmp_path / 'run'}"], quiet())
    before = fedpeft("evaluate", str(tmp_path / "run"))
    fewer_rows(tmp_path / "table")
    assert fedpeft("evaluate", str(tmp_path / "run")) == before


# --- damaged files --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["summary.json", "overrides.yaml", "config.yaml"])
def test_a_damaged_file_is_named(
    name: str,
    here: list[str],
    fedpeft: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["compare", *here, "num_rounds=1", f"run_dir={tmp_path / 'out'}", "--methods", "lora"]
    fedpeft(*words)
    file = tmp_path / "out" / "lora" / name
    if name == "config.yaml":
        file.write_text("method: [\n")
    else:
        cut(file)
    commands = [("report", str(tmp_path / "out"))]
    if name != "overrides.yaml":
        commands += [("results", str(tmp_path / "out")), tuple(words)]
    for command in commands:
        assert f"{file} is damaged: " in failed(capsys, fedpeft, *command), command
    file.write_text("")
    assert f"{file} is damaged: " in failed(capsys, fedpeft, "report", str(tmp_path / "out"))


def test_a_run_without_lines_or_configuration_is_not_left_out_in_silence(
    here: list[str], fedpeft: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["compare", *here, "num_rounds=1", f"run_dir={out}", "--methods", "lora,bitfit"]
    fedpeft(*words)
    (out / "lora" / "metrics.jsonl").rename(out / "kept")
    assert f"{out}/lora has no metrics.jsonl" in failed(capsys, fedpeft, "report", str(out))
    (out / "kept").rename(out / "lora" / "metrics.jsonl")
    (out / "bitfit" / "config.yaml").unlink()
    assert f"{out}/bitfit has no config.yaml" in failed(capsys, fedpeft, "results", str(out))
