"""The command line: its output, its files, and one sentence for wrong input."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft import cli
from fedpeft.config.load import CONF

Command = Callable[..., str]
TWO_METHODS = ["--methods", "fedsa_lora,ffa_lora", "method.rank=4"]


def test_run_prints_and_returns_its_summary(fedpeft: Command, base: list[str]) -> None:
    summary = json.loads(fedpeft("run", "--json", *base, "method.rank=4"))
    saved = json.loads((Path(summary["run_dir"]) / "summary.json").read_text())
    assert saved == summary
    text = fedpeft("run", *base, "method.rank=4", "run_dir=again")
    assert summary["shared_state_sha256"] in text
    assert f"test_accuracy: {summary['final']['test_accuracy']:.4f}" in text


def test_compare_sorts_by_quality_and_saves(fedpeft: Command, base: list[str]) -> None:
    rest = [o for o in base if not o.startswith("method=")]
    text = fedpeft("compare", *TWO_METHODS, *rest, "run_dir=out")
    folder = Path("out")
    rows = (folder / "comparison.csv").read_text().splitlines()
    assert rows[0].startswith("method,quality,quality_unweighted,quality_worst,global_test,")
    cells = [row.split(",") for row in rows[1:]]
    quality = {name: float(value) for name, value, *_ in cells}
    others = {name: [float(v) for v in values] for name, _, *values in (c[:4] for c in cells)}
    assert list(quality.values()) == sorted(quality.values(), reverse=True)
    for name, value in quality.items():
        summary = json.loads((folder / name / "summary.json").read_text())
        assert value == summary["final"]["client_test_accuracy"]
        assert others[name] == [
            summary["final"][f"client_test_accuracy_{kind}"] for kind in ("unweighted", "worst")
        ]
        assert ("test_accuracy" in summary["final"]) == (name == "ffa_lora")
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "comparison.md").read_text()
    assert all(f"{value:.3f}" in text and name in text for name, value in quality.items())
    assert table.count("\n| ") == 2


@pytest.mark.matrix
def test_params_of_all_methods(fedpeft: Command) -> None:
    counts = json.loads(fedpeft("params", "--json", "model=roberta_base", "data=sst2"))
    assert list(counts) == sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
    assert set(cli.METHODS.split(",")) <= set(counts)
    assert counts["fedtt"]["sent_up"] == [60_634, 60_634]
    assert counts["fedsa_lora"]["sent_up"] == [147_456, 147_456]
    text = fedpeft("params", "model=roberta_base", "data=sst2", "method=fedtt_plus")
    assert "15,298-20,098" in text and "20,098-39,898" in text


def test_params_names_the_methods_that_do_not_fit(
    fedpeft: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "every_method", lambda: ["bitfit", "lora"])
    text = fedpeft("params", "model=tinyllama", "data=docstrings_lm")
    assert "bitfit: LlamaForCausalLM has no biases in its blocks" in text and "lora" in text


def test_partition_counts_and_draws(fedpeft: Command, base: list[str]) -> None:
    overrides = [o for o in base if o.startswith(("data", "num_clients", "partition"))]
    counts = json.loads(fedpeft("partition", "--json", *overrides))
    assert [sum(column) for column in zip(*counts["counts"], strict=True)] == [60] * 4
    assert len(counts["counts"]) == 3
    fedpeft("partition", *overrides)
    assert Path("partition.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_runs_each_choice(fedpeft: Command, base: list[str]) -> None:
    rest = [o for o in base if not o.startswith("method=")]
    fedpeft("run", "-m", *rest, "method=lora,ffa_lora", "method.rank=4")
    summaries = sorted(Path("runs").glob("*_sweep/*/summary.json"))
    methods = [json.loads(path.read_text())["method"] for path in summaries]
    assert methods == ["LoRA", "FFALoRA"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "lrr=1"], "lrr"),
        (["run", "method=nope"], "nope"),
        (["run", "method=scl", "method.rnak=3", "runtime=inprocess"], "method.rnak"),
        (["params", "method.rank=3"], "method.rank=3 needs method=NAME"),
        (["compare", "--methods"], "--methods needs a value"),
        (["run", "model.path=/nowhere", "runtime=inprocess"], "/nowhere"),
        (["partition", "num_clients=2000", "data=table", "data.path=/nowhere"], "/nowhere"),
    ],
)
def test_wrong_input_is_one_sentence_and_status_2(
    fedpeft: Command, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        fedpeft(*arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("fedpeft: ") and error.count("\n") == 1


def test_unknown_command(fedpeft: Command) -> None:
    with pytest.raises(SystemExit, match="unknown command fly, must be one of run, compare"):
        fedpeft("fly")
