"""The lines that a run prints."""

import io
import time

import pytest
from rich.console import Console

from fedpeft.reporting.progress import Display, summary_text


def shown(rounds: list[int], seconds: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the lines of a run of 60 rounds, each of which takes so many seconds."""
    now, text = [0.0], io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display = Display(Console(file=text, soft_wrap=True))
    display.start("LoRA", 60)
    for round in rounds:
        now[0] += seconds
        display.round_done({"round": round, "seconds": seconds})
    return text.getvalue().splitlines()[1:]


def test_the_time_left_counts_the_rounds_of_this_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on after round 50 has not done 51 rounds in the time of one."""
    assert shown([51, 52], 30, monkeypatch)[-1].endswith("about 240 s left")
    assert shown([0, 1, 2], 30, monkeypatch)[-1].endswith("about 2610 s left")


def test_a_measure_that_only_the_last_round_has_has_no_best_round() -> None:
    spread = dict.fromkeys(f"client_test_loss_{of}" for of in ("unweighted", "worst", "p10"))
    final = {"round": 2, "test_loss": 0.5, "test_rouge_l_generated": 0.25}
    final |= {"client_test_loss": None, **spread}  # it was not finite, and JSON has null for it
    text = summary_text(
        {
            "final": final,
            "best": {"round": 1, "test_loss": 0.4},
            "bytes": {"uplink_bytes": 0, "downlink_bytes": 0},
            "weights": "pretrained",
            "data": {"skipped": {}, "cut": {}},
            "seconds": 1.0,
            "shared_state_sha256": "0",
            "run_dir": "runs/x",
        }
    ).splitlines()
    assert text[0].startswith("client_test_loss: not finite; mean by rows. By clients: mean not")
    assert text[1:3] == ["test_loss: 0.5000 (best round 0.4000)", "test_rouge_l_generated: 0.2500"]
