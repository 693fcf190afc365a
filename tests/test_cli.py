"""The command line: its output, its files, and one sentence for wrong input."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft import cli
from fedpeft.commands import planning
from fedpeft.commands.study import METHODS
from fedpeft.config.compose import CONF

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
    assert set(METHODS.split(",")) <= set(counts)
    assert counts["fedtt"]["sent_up"] == [60_634, 60_634]
    assert counts["fedsa_lora"]["sent_up"] == [147_456, 147_456]
    text = fedpeft("params", "model=roberta_base", "data=sst2", "method=fedtt_plus")
    assert "15,298-20,098" in text and "20,098-39,898" in text


def test_params_names_the_methods_that_do_not_fit(
    fedpeft: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "every_method", lambda: ["bitfit", "lora"])
    text = fedpeft("params", "model=tinyllama", "data=docstrings_lm")
    assert "bitfit: LlamaForCausalLM has no biases in its blocks" in text and "lora" in text


def test_partition_counts_and_draws(fedpeft: Command, base: list[str]) -> None:
    overrides = [o for o in base if o.startswith(("data", "num_clients", "partition"))]
    counts = json.loads(fedpeft("partition", "--json", *overrides))
    assert [sum(column) for column in zip(*counts["counts"], strict=True)] == [60] * 4
    assert len(counts["counts"]) == 3
    fedpeft("partition", *overrides)
    assert Path("partition.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "lrr=1"], "lrr"),
        (["run", "method=nope"], "nope"),
        (["run", "method=scl", "method.rnak=3", "runtime=inprocess"], "method.rnak"),
        (["params", "method.rank=3"], "method.rank=3 needs method=NAME"),
        (["compare", "--methods"], "--methods needs a value"),
        (["study", "--methods", "lora", "--lrs="], "--lrs needs a value"),
        (["study", "--seeds", ""], "--seeds needs a value"),
        (["study", "--lrs", "1", "--lrs=2"], "--lrs must be given once, got 1 and 2"),
        (["run", "model.path=/nowhere", "runtime=inprocess"], "/nowhere"),
        (["partition", "num_clients=2000", "data=table", "data.path=/nowhere"], "/nowhere"),
        (["study", "method=scl"], "the methods are given by --methods scl, got method=scl"),
        (["compare", "method=scl"], "the methods are given by --methods scl, got method=scl"),
        (["predict", "runs/x", "a text"], "on standard input, one a line: echo 'a text' | fedpeft"),
        (["study", "--data", "/nowhere", "data=sst2"], "--data: there is no folder /nowhere"),
        (["show", "runs/x", "--round", "1,2"], "--round must be one whole number, got 1,2"),
        (["study", "--extend", "1,5"], "--extend must be one whole number, got 1,5"),
        (["deploy"], "deploy must be followed by trial, got ''"),
        (["deploy", "trail", "num_rounds=1"], "deploy must be followed by trial, got 'trail'"),
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


@pytest.mark.parametrize(
    ("word", "advice"), [("fly", "must be one of run, compare"), ("runn", "did you mean run?\n")]
)
def test_unknown_command(
    fedpeft: Command, capsys: pytest.CaptureFixture[str], word: str, advice: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        fedpeft(word)
    assert ended.value.code == 2
    assert f"fedpeft: unknown command {word}, {advice}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["check", "lr=abc"], ["params", "method.rank=3"], ["study", "--lrs", "x"]], ids=str
)
def test_wrong_words_do_not_wait_for_torch(words: list[str]) -> None:
    code = f"import sys; sys.argv = ['fedpeft', *{words}]; from fedpeft.cli import main\n"
    code += "try: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "False\n")


def test_a_package_that_is_not_installed_is_named() -> None:
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['fedpeft', 'export', 'x']\n"
    code += "from fedpeft.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "torch" in done.stderr and "no attribute" not in done.stderr


def test_brackets_in_titles_are_no_markup(fedpeft: Command) -> None:
    given = ("model=minilm", "data=sst2", "method.targets=[q,v]", "method.rank=4")
    assert "method.targets=[q,v] method.rank=4: " in fedpeft("params", "method=lora", *given)


def test_each_command_shows_how_it_is_used(fedpeft: Command) -> None:
    for line in cli.USAGE.splitlines():
        if match := re.match("  ([a-z]+) ", line):
            name = match[1]
            if name not in cli.OWN_HELP:
                said = fedpeft(name, "--help")
                assert said == fedpeft(name, "method=lora", "-h")
                assert said.startswith(f"{name} ") and f"fedpeft {name}" in said
    assert "fedpeft run -m method" in fedpeft("run", "-h") and "study" not in fedpeft("run", "-h")


def test_deploy_shows_its_help_without_the_word_trial(
    fedpeft: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--help"], ["trial", "-h"]):
        with pytest.raises(SystemExit) as ended:
            fedpeft("deploy", *words)
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith("usage: fedpeft deploy trial ")


def odd(folder: Path, source: Path) -> Path:
    """Return a copy of a folder whose name Hydra's grammar cannot read."""
    return Path(shutil.copytree(source, folder / f"{source.name} (1), [ä] 病"))


def test_paths_as_the_shell_gives_them(
    fedpeft: Command, base: list[str], checkpoint: Path, table: Path, tmp_path: Path
) -> None:
    paths = [f"model.path={odd(tmp_path, checkpoint)}", f"data.path={odd(tmp_path, table)}"]
    summary = json.loads(fedpeft("run", "--json", *base, *paths, "run_dir=aus (1) ü"))
    assert summary["run_dir"] == "aus (1) ü" and Path("aus (1) ü/summary.json").exists()


def test_a_study_tries_every_method_before_its_first_run(
    fedpeft: Command, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rest = [o for o in base if not o.startswith("method=")]
    methods = "lora,scl+method.rank=33,adapter+method.bottleneck=65,lora+method.rank=99"
    with pytest.raises(SystemExit):
        fedpeft("compare", "--methods", methods, *rest, "run_dir=out")
    error = capsys.readouterr().err
    assert "scl+method.rank=33: method.rank must be <= 32" in error and error.count("\n") == 1
    assert "; adapter+method.bottleneck=65: method.bottleneck must be <= 64" in error
    assert "; lora+method.rank=99: method.rank must be <= 32" in error
    assert not Path("out").exists()
    with pytest.raises(SystemExit):
        fedpeft("study", "--methods", "scl+method.rank=33", "--lrs", "1e-3,1e-2", *rest)
    assert capsys.readouterr().err.startswith("fedpeft: scl: method.rank must")


def test_an_error_that_nobody_expected_leaves_its_traceback(
    fedpeft: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(arguments: list[str]) -> None:
        [][len(arguments)]

    monkeypatch.setattr("fedpeft.commands.run.run", broken)
    with pytest.raises(SystemExit) as ended:
        fedpeft("run")
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("fedpeft: IndexError: list index out of range (the whole traceback is")
    trace = Path(error.strip().removesuffix(")").rpartition(" ")[2])
    assert "in broken" in trace.read_text()
    trace.unlink()
    monkeypatch.setenv("FEDPEFT_TRACEBACK", "1")
    with pytest.raises(IndexError):
        fedpeft("run")


def test_a_run_directory_is_checked_first(
    fedpeft: Command, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a").touch()
    for place in ("a", "a/b/c"):
        with pytest.raises(SystemExit):
            fedpeft("run", *base, f"run_dir={place}", "model.path=nowhere")
        said = f"fedpeft: run_dir={place} cannot be made, because a is a file\n"
        assert capsys.readouterr().err == said
    with pytest.raises(SystemExit):
        fedpeft("run", *base, "run_dir=/proc/x", "model.path=nowhere")
    assert capsys.readouterr().err.startswith("fedpeft: run_dir=/proc/x cannot be made, because")
