"""One client's steps, by hand, and evaluation that does not depend on how it is cut up."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedpeft.config.optimization import Optimization
from fedpeft.data.batching import Batch, Examples, within
from fedpeft.engine.passes import Passes, evaluate, train
from fedpeft.engine.session import Session
from tests.conftest import Runner


class Weights(nn.Module):
    """Two numbers to train and one that is frozen."""

    def __init__(self, start: tuple[float, float] = (1.0, -2.0)) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start))
        self.frozen = nn.Parameter(torch.tensor([5.0]), requires_grad=False)


def squares(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over the batch of sum_i (w_i - x_i)^2 / 2: its gradient is w - mean(x)."""
    assert isinstance(model, Weights)
    return ((model.w - batch["x"]) ** 2).sum(-1).mean() / 2


def batches(*points: tuple[float, float]) -> list[Batch]:
    return [{"x": torch.tensor([point])} for point in points]


def sgd(**fields: Any) -> Optimization:
    return Optimization(**{"name": "sgd", "max_grad_norm": None} | fields)


def test_one_sgd_step() -> None:
    model = Weights()
    loss = train(Passes(model, squares), batches((0.0, 1.0)), sgd(), lambda _: 0.1)
    # gradient (1, -3): w = (1, -2) - 0.1 (1, -3)
    torch.testing.assert_close(model.w.data, torch.tensor([0.9, -1.7]))
    assert loss == 5.0  # (1 + 9) / 2, before the step
    assert model.frozen.item() == 5.0 and model.frozen.grad is None
    assert model.w.grad is not None and not model.w.grad.any()


def test_gradients_of_a_training_that_failed_are_forgotten() -> None:
    model = Weights()
    passes = Passes(model, squares)
    passes.run(batches((5.0, 5.0))[0])  # and no step
    train(passes, batches((0.0, 1.0)), sgd(), lambda _: 0.1)
    torch.testing.assert_close(model.w.data, torch.tensor([0.9, -1.7]))


def test_steps_are_taken_one_after_another_and_the_loss_is_their_mean() -> None:
    model = Weights()
    loss = train(Passes(model, squares), batches((0.0, 0.0), (2.0, 0.0)), sgd(), lambda _: 0.5)
    # w: (1, -2) -> (.5, -1) -> (.5 + .75, -.5)
    torch.testing.assert_close(model.w.data, torch.tensor([1.25, -0.5]))
    assert loss == pytest.approx((2.5 + (1.5**2 + 1) / 2) / 2)


def test_the_rate_is_that_of_the_step() -> None:
    model = Weights((1.0, 1.0))
    train(
        Passes(model, squares),
        batches((0.0, 0.0), (0.0, 0.0)),
        sgd(),
        lambda step: (0.5, 0.1)[step],
    )
    torch.testing.assert_close(model.w.data, torch.full((2,), 0.5 * 0.9))


def test_momentum_and_weight_decay() -> None:
    model = Weights((1.0, 1.0))
    train(Passes(model, squares), batches((0.0, 0.0), (0.0, 0.0)), sgd(momentum=0.5), lambda _: 0.1)
    # velocity 1, then 0.5 + 0.9 = 1.4
    torch.testing.assert_close(model.w.data, torch.full((2,), 1 - 0.1 - 0.14))
    model = Weights((1.0, 1.0))
    train(Passes(model, squares), batches((1.0, 1.0)), sgd(weight_decay=0.2), lambda _: 0.1)
    torch.testing.assert_close(model.w.data, torch.full((2,), 1 - 0.1 * 0.2))


def test_one_adamw_step() -> None:
    model = Weights()
    optimization = Optimization(weight_decay=0.1, max_grad_norm=None)
    train(Passes(model, squares), batches((0.0, 1.0)), optimization, lambda _: 0.01)
    # the first step of Adam is lr times the gradient's sign; decay is decoupled
    decayed = torch.tensor([1.0, -2.0]) * (1 - 0.01 * 0.1)
    torch.testing.assert_close(model.w.data, decayed - 0.01 * torch.tensor([1.0, -1.0]))


def test_each_round_has_a_fresh_optimizer() -> None:
    once, twice = Weights((1.0, 1.0)), Weights((1.0, 1.0))
    point = (0.0, 0.0)
    train(Passes(once, squares), batches(point, point), sgd(momentum=0.9), lambda _: 0.1)
    for _ in range(2):
        train(Passes(twice, squares), batches(point), sgd(momentum=0.9), lambda _: 0.1)
    torch.testing.assert_close(twice.w.data, torch.full((2,), 0.81))
    torch.testing.assert_close(once.w.data, torch.full((2,), 1 - 0.1 - 0.1 * (0.9 + 0.9)))


@pytest.mark.parametrize(
    ("limit", "shrunk"), [(1.0, 1 / 5), (2.5, 0.5), (5.0, 1.0), (50.0, 1.0), (None, 1.0)]
)
def test_clipping(limit: float | None, shrunk: float) -> None:
    """The norm over all gradients together, here of (3, -4)."""
    model = Weights((0.0, 0.0))
    train(Passes(model, squares), batches((-3.0, 4.0)), sgd(max_grad_norm=limit), lambda _: 1.0)
    torch.testing.assert_close(
        model.w.data, -shrunk * torch.tensor([3.0, -4.0]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(value: float) -> None:
    with pytest.raises(FloatingPointError, match=f"training loss is {value}: lower lr"):
        given = batches((0.0, 0.0), (value, 0.0))
        train(Passes(Weights(), squares), given, sgd(), lambda _: 0.1)


def test_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
    modes: list[bool] = []

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        modes.append(net.training)
        return net(batch["x"]).sum()

    train(Passes(model, loss), [{"x": torch.ones(1, 1)}], sgd(), lambda _: 0.1)

    def measure(net: nn.Module, batch: Batch) -> dict[str, Tensor]:
        modes.append(net.training)
        assert not torch.is_grad_enabled()
        return {"label": batch["labels"]}

    evaluate(model, measure, examples([3, 2]), 2, 1000)
    assert modes == [True, False]


# --- schedules ----------------------------------------------------------------------------------


def rates(optimization: Optimization, steps: int, round: int = 1, rounds: int = 1) -> list[float]:
    return [optimization.rate(2.0, round, rounds, step, steps) for step in range(steps)]


def test_constant_rate() -> None:
    assert rates(Optimization(), 4) == [2.0] * 4
    assert rates(Optimization(), 4, round=3, rounds=7) == [2.0] * 4


def test_linear_rate() -> None:
    assert rates(Optimization(schedule="linear"), 4) == [2.0, 1.5, 1.0, 0.5]


def test_cosine_rate() -> None:
    assert rates(Optimization(schedule="cosine"), 4) == pytest.approx(
        [2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)]
    )


def test_warmup() -> None:
    assert rates(Optimization(warmup=0.5), 4) == [1.0, 2.0, 2.0, 2.0]
    # a third of 7 steps is 3 begun: then the rest falls from the full rate
    assert rates(Optimization(warmup=1 / 3, schedule="linear"), 7) == pytest.approx(
        [2 / 3, 4 / 3, 2.0, 2.0, 1.5, 1.0, 0.5]
    )
    assert rates(Optimization(warmup=0.01), 3) == [2.0, 2.0, 2.0]


def test_round_schedules() -> None:
    linear = Optimization(round_schedule="linear")
    assert [rates(linear, 1, r, 4)[0] for r in (1, 2, 3, 4)] == [2.0, 1.5, 1.0, 0.5]
    cosine = Optimization(round_schedule="cosine")
    assert [rates(cosine, 1, r, 2)[0] for r in (1, 2)] == pytest.approx([2.0, 1.0])
    both = Optimization(round_schedule="linear", schedule="linear")
    assert rates(both, 2, 2, 4) == [1.5, 0.75]


def test_a_run_uses_the_rounds_rate(run: Runner) -> None:
    """The same first round whatever follows; the second is half as fast under a linear decay."""
    seen: list[tuple[float, float]] = []
    for schedule in ("constant", "linear"):
        run(
            "optimizer.name=sgd",
            "local_steps=1",
            "lr=0.1",
            "method.rank=4",
            f"optimizer.round_schedule={schedule}",
            "model.settings.hidden_dropout_prob=0.0",
            "model.settings.attention_probs_dropout_prob=0.0",
        )
        first, second = (line["update_norm_mean"] for line in run.lines()[1:])
        seen.append((first, second))
    assert seen[0][0] == seen[1][0]
    assert seen[1][1] == pytest.approx(seen[0][1] / 2, rel=1e-5)


# --- evaluation ---------------------------------------------------------------------------------


def examples(lengths: list[int]) -> Examples:
    rows = [[10 + i] * length for i, length in enumerate(lengths)]
    return Examples.from_lists(rows, np.arange(len(lengths)), 0)


def test_every_row_is_evaluated_once() -> None:
    lengths = [5, 2, 9, 2, 7, 1, 3]

    def measure(_: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"label": batch["labels"], "sum": batch["attention_mask"].sum(1)}

    for size in (1, 2, 3, 7, 100):
        rows = evaluate(Weights(), measure, examples(lengths), size, 1000)
        label = torch.cat([row["label"] for row in rows]).tolist()
        total = torch.cat([row["sum"] for row in rows]).tolist()
        assert sorted(label) == list(range(7))
        assert [lengths[i] for i in label] == total == sorted(lengths)
        assert len(rows) == -(-7 // size)


def test_the_bits_do_not_depend_on_workers(opened: Callable[..., Session]) -> None:
    session = opened("evaluation.batch_size=4")
    rows = session.examples("test")
    session.load()
    one = evaluate(session.model, session.task.evaluate_batch, rows, 4, 1000)
    for workers in (2, 3, 8):
        many = evaluate(session.model, session.task.evaluate_batch, rows, 4, 1000, workers=workers)
        assert len(many) == len(one) == 10
        for a, b in zip(one, many, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
    assert session.evaluate(rows, 1) == session.evaluate(rows, 3)


def test_metrics_do_not_depend_on_the_batches(opened: Callable[..., Session]) -> None:
    session = opened()
    rows = session.examples("test")
    session.load()
    found = []
    for size in (1, 7, 16, 64):
        parts = evaluate(session.model, session.task.evaluate_batch, rows, size, 1000)
        found.append(session.task.score(parts, session.task.split_rows("test"), None))
    for metrics in found[1:]:
        assert metrics["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
        assert metrics["accuracy"] == found[0]["accuracy"]
        assert metrics["f1_macro"] == pytest.approx(found[0]["f1_macro"])
    assert 0 < found[0]["accuracy"] < 1


def test_evaluation_leaves_the_model_as_it_is(opened: Callable[..., Session]) -> None:
    session = opened()
    before = {k: v.clone() for k, v in session.model.state_dict().items()}
    session.evaluate(session.examples("validation"))
    assert all(torch.equal(v, before[k]) for k, v in session.model.state_dict().items())


# --- bf16 ---------------------------------------------------------------------------------------


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights() -> None:
    model = nn.Linear(4, 2)
    seen: list[torch.dtype] = []

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        out = net(batch["x"])
        seen.append(out.dtype)
        return out.float().square().mean()

    batch = {"x": torch.ones(3, 4)}
    for precision in ("fp32", "bf16"):
        train(Passes(model, loss, precision), [batch], sgd(), lambda _: 0.1)
    assert seen == [torch.float32, torch.bfloat16]
    assert model.weight.dtype == torch.float32


def test_a_run_in_bfloat16(run: Runner) -> None:
    exact, rounded = run(), run("precision=bf16")
    assert rounded["shared_state_sha256"] != exact["shared_state_sha256"]
    assert rounded["final"]["test_loss"] == pytest.approx(exact["final"]["test_loss"], rel=0.05)
    assert rounded["bytes"]["uplink_payload_bytes"] == exact["bytes"]["uplink_payload_bytes"]
    assert all(v.dtype == torch.float32 for v in run.saved().values())


def test_an_evaluation_batch_keeps_to_its_tokens() -> None:
    lengths = np.array([5, 1, 9, 2, 40, 3, 3])
    batches = within(lengths, 3, 20)
    assert [lengths[b].tolist() for b in batches] == [[1], [2, 3, 3], [5, 9], [40]]
    assert [b.tolist() for b in within(np.zeros(5, np.int64), 2, 1)] == [[0], [1, 2], [3, 4]]


def test_evaluation_pads_no_more_than_the_best_cut() -> None:
    """Against every way to cut ten sorted rows into batches."""
    lengths = np.random.default_rng(0).integers(1, 120, 10)
    ordered = np.sort(lengths)

    def cost(batches: list[np.ndarray]) -> int:
        return sum(len(b) * b.max() + 64 for b in batches)

    every = [
        np.split(ordered, np.flatnonzero([cut >> i & 1 for i in range(9)]) + 1)
        for cut in range(2**9)
    ]
    allowed = [b for b in every if all(len(x) <= 4 and len(x) * x.max() <= 300 for x in b)]
    found = [lengths[b] for b in within(lengths, 4, 300)]
    assert cost(found) == min(map(cost, allowed)) < max(map(cost, allowed))
    assert np.array_equal(np.concatenate(found), ordered)
