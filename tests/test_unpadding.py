"""Training on real tokens alone is what training with padding is."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from fedpeft.algorithms.base import Term
from fedpeft.engine.plan import Trained, Work
from fedpeft.engine.probing import unpadding
from fedpeft.engine.session import Session
from fedpeft.state import State
from tests.test_runs import METHODS

Opened = Callable[..., Session]
# Their tokens are more than the mask of the rows says.
PADDED = {"prompt", "fedprompt", "p_tuning", "prefix"}
STEPS = ("num_clients=2", "local_steps=3", "batch_size=12", "bucketing=false")
SGD = ("optimizer.name=sgd", "lr=0.1")


def trained(session: Session) -> tuple[Trained, State, set[int]]:
    """A client's round, and how many rows a block's linear layer saw in its passes."""
    session.set_trainable(1)
    session._unpadding  # noqa: B018  # tried out now, not in the passes
    rows: set[int] = set()
    linear = next(
        m for n, m in session.model.named_modules() if ".layer.0." in n and isinstance(m, nn.Linear)
    )
    hook = linear.register_forward_pre_hook(lambda _, x: rows.add(x[0].shape[0]))
    (found,) = session.train([Work(0, session.initial, Term())], 1)
    hook.remove()
    assert not isinstance(found, Exception)
    return *found, rows


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_as_with_padding(opened: Opened, method: str) -> None:
    given = (f"method={method}", *STEPS, *SGD)
    plain, sparing = opened(*given, "unpadding=false"), opened(*given, "unpadding=true")
    theirs, right, padded = trained(plain)
    ours, state, rows = trained(sparing)
    assert padded == {12}
    assert rows == ({12} if method in PADDED else {1})
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    for name, value in state.items():
        moved = float((right[name] - plain.initial[name]).abs().max())
        assert float((value - right[name]).abs().max()) <= 2e-3 * moved + 1e-7, name


def test_bfloat16_too(opened: Opened) -> None:
    given = ("method=lora", *STEPS, *SGD, "precision=bf16")
    (theirs, _, _), (ours, _, rows) = (
        trained(opened(*given, more)) for more in ("unpadding=false", "unpadding=true")
    )
    assert rows == {1}
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-2)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("bert", "gradient checkpointing computes blocks again in the backward pass"),
        ("deberta", "The expanded size of the tensor"),
    ],
)
def test_a_model_that_cannot_says_so(
    opened: Opened, model: str, reason: str, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = ["model.gradient_checkpointing=true"]
    if model == "deberta":
        widths = "hidden_size:32,pooler_hidden_size:32,intermediate_size:64"
        small = f"{{{widths},num_attention_heads:4,num_hidden_layers:1}}"
        given = ["model=deberta_base", "model.path=null", "model.random=true"]
        given += [f"model.settings={small}", f"model.tokenizer_path={checkpoint}"]
    session = opened("method=bitfit", *STEPS, *given)
    session.set_trainable(1)
    with caplog.at_level(logging.INFO):
        assert session._unpadding is None
    assert f"padded tokens are computed too, for {reason}" in caplog.text


def test_rows_of_one_length_or_none_have_nothing_to_spare(opened: Opened) -> None:
    session = opened("method=lora", *STEPS)
    rows = session.examples("train")
    for chosen in (rows.rows[:0], rows.rows[rows.lengths == rows.lengths[0]]):
        assert unpadding(session.config, session.model, rows.select(chosen)) is None
    session.set_trainable(1)
    assert unpadding(session.config, session.model, rows) is not None


def test_gradients_that_differ_are_not_trusted(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def other_draws(_: object, x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
        return F.dropout(x, p, training, inplace)

    monkeypatch.setattr("fedpeft.engine.unpadded._Unpadded._dropout", other_draws)
    session = opened("method=lora", *STEPS)
    session.set_trainable(1)
    with caplog.at_level(logging.INFO):
        assert session._unpadding is None
    assert "padded tokens are computed too, for gradients differ by" in caplog.text
