"""Runs on the disk: found, read and grouped by what sets them apart."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedpeft.reporting.saved_runs import by_setting, differing, saved_runs


def _saved(path: Path, ended: bool = True, failed: str = "", **values: Any) -> Path:
    """Write a run's directory."""
    path.mkdir(parents=True)
    config = {"seed": 0, "lr": 0.1, "run_dir": str(path), "method": {"rank": 2}} | values
    (path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML, too
    if failed:
        (path / "failed.txt").write_text(failed)
        return path
    (path / "metrics.jsonl").write_text('{"round": 0}\n{"round": 1}\n{"rou')
    if ended:
        (path / "summary.json").write_text('{"final": {"round": 1}}')
    return path


def test_runs_are_found_once_with_what_their_files_say(tmp_path: Path) -> None:
    b, a = _saved(tmp_path / "s" / "b", ended=False), _saved(tmp_path / "s" / "a")
    c = _saved(tmp_path / "s" / "c", failed="client 0's training loss is nan")
    (tmp_path / "s" / "other").mkdir()
    runs = saved_runs([tmp_path / "s", b])
    assert [run.path for run in runs] == [a, b, c]
    assert [run.status for run in runs] == ["completed", "unfinished", "diverged"]
    assert runs[0].lines == [{"round": 0}, {"round": 1}]  # a last line that was cut off is left out
    assert runs[2].lines == []
    assert (runs[0].summary, runs[1].summary) == ({"final": {"round": 1}}, None)
    assert runs[0].settings == {"seed": 0, "lr": 0.1, "method.rank": 2}  # without run_dir


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run: none of its folders has metrics.jsonl"):
        saved_runs([tmp_path])
    with pytest.raises(ValueError, match="nowhere is no folder"):
        saved_runs([tmp_path / "nowhere"])


def test_hashes_tell_what_changes_results(tmp_path: Path) -> None:
    one, same, seed, rank = saved_runs(
        [
            _saved(tmp_path / "0"),
            _saved(
                tmp_path / "1",
                resume=True,
                runtime={"num_cpus": 2},
                logger={"wandb": {"mode": "offline"}},
            ),
            _saved(tmp_path / "2", seed=1),
            _saved(tmp_path / "3", method={"rank": 4}),
        ]
    )
    assert one.hash == same.hash != seed.hash
    assert one.hash_but_seed == same.hash_but_seed == seed.hash_but_seed != rank.hash_but_seed
    assert len(one.hash) == 12


def test_runs_are_grouped_by_all_but_the_seed(tmp_path: Path) -> None:
    for name, values in {
        "0": {"seed": 1},
        "1": {"lr": 0.2},
        "2": {"seed": 0},
        "3": {"lr": 0.2, "seed": 1, "frozen": None},
    }.items():
        _saved(tmp_path / name, **values)
    runs = saved_runs([tmp_path])
    assert [[run.path.name for run in group] for group in by_setting(runs)] == [
        ["2", "0"],
        ["1"],
        ["3"],
    ]
    # A key that one run lacks is not the same as null.
    assert differing(runs) == ["frozen", "lr", "seed"]
    assert differing(runs[:1]) == []
