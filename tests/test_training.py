"""One client's steps by hand, and evaluation that does not depend on its batches."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedpeft.config.load import load_config
from fedpeft.config.optimization import Optimization
from fedpeft.data.batching import Batch, Examples, within
from fedpeft.data.tasks.base import Task
from fedpeft.data.tasks.instruction import InstructionTuning
from fedpeft.data.tasks.language import LanguageModelling
from fedpeft.engine.engine import Engine
from fedpeft.engine.evaluate import evaluate
from fedpeft.engine.passes import Passes, train
from fedpeft.engine.plan import WEIGHT, plan
from fedpeft.engine.together import Member, Together
from fedpeft.simulation.grid import InProcessGrid
from fedpeft.state import State
from tests.conftest import Runner
from tests.rows import labelled


class Weights(nn.Module):
    """Two numbers to train and one that is frozen."""

    def __init__(self, start: tuple[float, float] = (1.0, -2.0)) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start))
        self.frozen = nn.Parameter(torch.tensor([5.0]), requires_grad=False)


def squares(model: nn.Module, batch: Batch) -> Tensor:
    """Return the batch's mean of sum_i (w_i - x_i)^2 / 2, whose gradient is w - mean(x)."""
    assert isinstance(model, Weights)
    return ((model.w - batch["x"]) ** 2).sum(-1).mean() / 2


def steps(*points: tuple[float, float]) -> list[list[Batch]]:
    """Return one step a point; each step is one batch that holds the point."""
    return [[{"x": torch.tensor([point])}] for point in points]


def at(rate: float) -> Callable[[int], float]:
    """Return a schedule with the same rate in every step."""
    return lambda _: rate


def sgd(**fields: Any) -> Optimization:
    return Optimization(**{"name": "sgd", "max_grad_norm": None} | fields)


def test_one_sgd_step() -> None:
    model = Weights()
    loss, _ = train(Passes(model, squares), steps((0.0, 1.0)), at(0.1), sgd())
    # gradient (1, -3): w = (1, -2) - 0.1 (1, -3)
    torch.testing.assert_close(model.w.data, torch.tensor([0.9, -1.7]))
    assert loss == 5.0  # (1 + 9) / 2, before the step
    assert model.frozen.item() == 5.0 and model.frozen.grad is None
    assert model.w.grad is not None and not model.w.grad.any()


def test_gradients_of_a_training_that_failed_are_forgotten() -> None:
    model = Weights()
    passes = Passes(model, squares)
    passes.run(steps((5.0, 5.0))[0])  # gradients, but no step
    train(passes, steps((0.0, 1.0)), at(0.1), sgd())
    torch.testing.assert_close(model.w.data, torch.tensor([0.9, -1.7]))


def test_steps_are_taken_one_after_another_and_the_loss_is_their_mean() -> None:
    model = Weights()
    loss, _ = train(Passes(model, squares), steps((0.0, 0.0), (2.0, 0.0)), at(0.5), sgd())
    # w: (1, -2) -> (.5, -1) -> (.5 + .75, -.5)
    torch.testing.assert_close(model.w.data, torch.tensor([1.25, -0.5]))
    assert loss == pytest.approx((2.5 + (1.5**2 + 1) / 2) / 2)


def test_the_rate_is_that_of_the_step() -> None:
    model = Weights((1.0, 1.0))
    train(
        Passes(model, squares),
        steps((0.0, 0.0), (0.0, 0.0)),
        lambda step: (0.5, 0.1)[step],
        sgd(),
    )
    torch.testing.assert_close(model.w.data, torch.full((2,), 0.5 * 0.9))


def test_momentum() -> None:
    model = Weights((1.0, 1.0))
    train(Passes(model, squares), steps((0.0, 0.0), (0.0, 0.0)), at(0.1), sgd(momentum=0.5))
    # velocity 1, then 0.5 + 0.9 = 1.4
    torch.testing.assert_close(model.w.data, torch.full((2,), 1 - 0.1 - 0.14))


def test_weight_decay() -> None:
    model = Weights((1.0, 1.0))
    train(Passes(model, squares), steps((1.0, 1.0)), at(0.1), sgd(weight_decay=0.2))
    torch.testing.assert_close(model.w.data, torch.full((2,), 1 - 0.1 * 0.2))


def test_one_adamw_step() -> None:
    model = Weights()
    optimization = Optimization(weight_decay=0.1, max_grad_norm=None)
    train(Passes(model, squares), steps((0.0, 1.0)), at(0.01), optimization)
    # the first step of Adam is lr times the gradient's sign; decay is decoupled
    decayed = torch.tensor([1.0, -2.0]) * (1 - 0.01 * 0.1)
    torch.testing.assert_close(model.w.data, decayed - 0.01 * torch.tensor([1.0, -1.0]))


def test_each_round_has_a_fresh_optimizer() -> None:
    once, twice = Weights((1.0, 1.0)), Weights((1.0, 1.0))
    point = (0.0, 0.0)
    train(Passes(once, squares), steps(point, point), at(0.1), sgd(momentum=0.9))
    for _ in range(2):
        _, moments = train(Passes(twice, squares), steps(point), at(0.1), sgd(momentum=0.9))
        assert moments == {}
    torch.testing.assert_close(twice.w.data, torch.full((2,), 0.81))
    torch.testing.assert_close(once.w.data, torch.full((2,), 1 - 0.1 - 0.1 * (0.9 + 0.9)))


@pytest.mark.parametrize(
    ("limit", "shrunk"), [(1.0, 1 / 5), (2.5, 0.5), (5.0, 1.0), (50.0, 1.0), (None, 1.0)]
)
def test_clipping(limit: float | None, shrunk: float) -> None:
    """The norm is that of all gradients together, here of (3, -4)."""
    model = Weights((0.0, 0.0))
    train(Passes(model, squares), steps((-3.0, 4.0)), at(1.0), sgd(max_grad_norm=limit))
    torch.testing.assert_close(
        model.w.data, -shrunk * torch.tensor([3.0, -4.0]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(value: float) -> None:
    points = steps((0.0, 0.0), (value, 0.0))
    with pytest.raises(FloatingPointError, match=f"training loss is {value}: lower lr"):
        train(Passes(Weights(), squares), points, at(0.1), sgd())


def test_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
    modes: list[bool] = []

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        modes.append(net.training)
        return net(batch["x"]).sum()

    train(Passes(model, loss), [[{"x": torch.ones(1, 1)}]], at(0.1), sgd())

    def measure(net: nn.Module, batch: Batch) -> dict[str, Tensor]:
        modes.append(net.training)
        assert not torch.is_grad_enabled()
        return {"label": batch["labels"]}

    evaluate(model, measure, examples([3, 2]), 2, 1000)
    assert modes == [True, False]


# --- a batch in parts ----------------------------------------------------------------------------

LLAMA = (
    "{model_type:llama,hidden_size:16,intermediate_size:32,num_hidden_layers:1,"
    "num_attention_heads:2,num_key_value_heads:2,vocab_size:200}"
)
DECODER = ["model.path=null", "model.random=true", f"model.architecture={LLAMA}"]
NO_DROPOUT = [f"model.settings.{kind}_dropout_prob=0" for kind in ("hidden", "attention_probs")]
QUESTION = "{{ label }} {{ text }}"
TASKS: dict[str, Callable[[str], Task]] = {
    "language": lambda path: LanguageModelling(path=path),
    "instruction": lambda path: InstructionTuning(path=path, prompt=QUESTION, answer="text"),
    "instruction, prompts too": lambda path: InstructionTuning(
        path=path, prompt=QUESTION, answer="text", loss_on="all"
    ),
}


def in_parts(engine: Engine, count: int) -> tuple[list[Batch], float, Tensor]:
    """Compute the first step of client 0 without dropout.

    Args:
        engine: holds model and rows.
        count: into how many parts the batch is cut.

    Returns:
        The parts, the loss, and the gradient of all parameters, flat.
    """
    task, config = engine.task, replace(engine.config, accumulate=count)
    (parts, *_) = plan(config, *engine.rows.training(0), [1, 0]).steps
    engine.replica.load()
    engine.replica.set_trainable(set(engine.replica.roles.names))
    passes = Passes(engine.replica.model, lambda m, batch: task.loss(task.forward(m, batch), batch))
    engine.replica.model.eval()
    loss = float(passes.run(parts))
    assert passes.flat.vector.grad is not None
    return parts, loss, passes.flat.vector.grad.clone()


@pytest.mark.parametrize("task", ["classification", *TASKS])
def test_parts_have_the_gradient_of_the_whole_batch(
    task: str, base: list[str], table: Path, checkpoint: Path
) -> None:
    """Ten rows of unequal length are cut into three parts of 4, 3 and 3."""
    overrides = [*base, "method.rank=4", "batch_size=10", "bucketing=false"]
    if task == "classification":
        engine = Engine(load_config(overrides))
    else:
        config = load_config([*overrides, *DECODER, f"model.tokenizer_path={checkpoint}"])
        engine = Engine(replace(config, data=TASKS[task](str(table))))
    (batch,), loss, whole = in_parts(engine, 1)
    parts, loss_in_parts, gradient = in_parts(engine, 3)
    assert WEIGHT not in batch and [len(part["row"]) for part in parts] == [4, 3, 3]
    assert torch.equal(torch.cat([part["row"] for part in parts]), batch["row"])
    assert len({part["input_ids"].shape[1] for part in parts}) > 1
    weights = [float(part[WEIGHT]) for part in parts]
    assert sum(weights) == pytest.approx(1, rel=1e-6)
    by_rows = weights == pytest.approx([0.4, 0.3, 0.3])
    assert by_rows is (task == "classification")  # other tasks weigh by tokens
    assert loss_in_parts == pytest.approx(loss, rel=1e-6)
    assert whole.abs().max() > 1e-2
    torch.testing.assert_close(gradient, whole, rtol=0, atol=1e-6)


def test_more_parts_than_rows_and_one_row(opened: Callable[..., Engine]) -> None:
    engine = opened("batch_size=2", "accumulate=5")
    parts, _, gradient = in_parts(engine, 5)
    assert [len(part["row"]) for part in parts] == [1, 1]
    torch.testing.assert_close(gradient, in_parts(engine, 1)[2], rtol=0, atol=1e-6)
    engine = opened("batch_size=1")
    (alone,), _, _ = in_parts(engine, 5)
    assert WEIGHT not in alone


def test_a_run_in_parts(run: Runner) -> None:
    """Without dropout, which draws for each part, the run is that on whole batches."""
    overrides = [*NO_DROPOUT, "optimizer.name=sgd", "lr=0.1"]
    run(*overrides)
    whole = run.saved()
    summary = run(*overrides, "accumulate=3")
    assert summary["refused"] == {}
    for name, value in run.saved().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-6)


# --- an optimizer that is kept from round to round -----------------------------------------------

POINTS = ((0.0, 1.0), (3.0, -0.5))
KEPT = {
    "adamw": Optimization(weight_decay=0.1, max_grad_norm=None, keep_state=True),
    "sgd": sgd(momentum=0.9, weight_decay=0.1, keep_state=True),
}
TORCH_S: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


def in_rounds(model: nn.Module, optimization: Optimization, *rounds: Any) -> State:
    """Train round by round, each with the last one's moments, and return the last moments.

    Args:
        model: trains in place.
        optimization: says if moments are kept.
        rounds: the steps of each round.
    """
    moments: State = {}
    for steps_of_round in rounds:
        _, moments = train(
            Passes(model, squares), steps_of_round, at(0.01), optimization, (), moments
        )
    return moments


@pytest.mark.parametrize("name", KEPT)
def test_two_rounds_with_kept_moments_are_two_steps_of_one_round(name: str) -> None:
    optimization = KEPT[name]
    once, twice, fresh, by_torch = (Weights() for _ in range(4))
    first, second = steps(POINTS[0]), steps(POINTS[1])
    expected = in_rounds(once, optimization, steps(*POINTS))
    moments = in_rounds(twice, optimization, first, second)
    assert torch.equal(twice.w, once.w)
    assert moments.keys() == expected.keys() != set()
    assert all(torch.equal(moments[key], expected[key]) for key in moments)
    in_rounds(fresh, replace(optimization, keep_state=False), first, second)
    assert not torch.allclose(fresh.w, once.w, rtol=0, atol=1e-4)
    optimizer = TORCH_S[name]([by_torch.w], lr=0.01, weight_decay=0.1)
    for point in POINTS:
        optimizer.zero_grad()
        squares(by_torch, {"x": torch.tensor([point])}).backward()
        optimizer.step()
    torch.testing.assert_close(twice.w, by_torch.w, rtol=1e-6, atol=1e-7)


def test_kept_moments_are_by_name_and_shape() -> None:
    moments = in_rounds(Weights(), KEPT["adamw"], steps(*POINTS))
    assert {key: tuple(value.shape) for key, value in moments.items()} == {
        "exp_avg:w": (2,),
        "exp_avg_sq:w": (2,),
        "step:w": (),
    }
    assert moments["step:w"].item() == 2
    moments = in_rounds(Weights(), KEPT["sgd"], steps(*POINTS))
    assert {key: tuple(v.shape) for key, v in moments.items()} == {"momentum_buffer:w": (2,)}
    assert in_rounds(Weights(), sgd(keep_state=True), steps(*POINTS)) == {}  # no momentum


class Three(nn.Module):
    """Parameters that train in some rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Parameter(torch.tensor(start)) for start in ([1.0, 2.0], [[-1.0], [0.5]], [3.0])
        )


def bowls(model: nn.Module, batch: Batch) -> Tensor:
    """Return the sum of (p - x)^4 over the parameters p that train."""
    return sum(((p - batch["x"]) ** 4).sum() for p in model.parameters() if p.requires_grad)  # type: ignore[return-value]


@pytest.mark.parametrize("name", KEPT)
def test_parameters_of_different_step_counts_have_their_own_correction(name: str) -> None:
    """a and c train in rounds 1 and 3, b in rounds 2 and 3, c also in round 2."""
    optimization, model, moments = KEPT[name], Three(), dict[str, Tensor]()
    rounds = (("ac", 3), ("bc", 1), ("abc", 2))
    xs = [0.3, -0.2, 0.1, 0.5, -0.4, 0.2]
    seen: dict[str, list[float]] = {name: [] for name in "abc"}
    for names, count in rounds:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key in names)
        now, xs = xs[:count], xs[count:]
        points = [[{"x": torch.tensor(x)}] for x in now]
        _, last = train(Passes(model, bowls), points, at(0.01), optimization, (), moments)
        moments |= last
        for key in names:
            seen[key] += now
    if name == "adamw":
        assert [moments[f"step:{key}"].item() for key in "abc"] == [5, 3, 6]
    for key, parameter in Three().named_parameters():
        optimizer = TORCH_S[name]([parameter], lr=0.01, weight_decay=0.1)
        for x in seen[key]:
            optimizer.zero_grad()
            ((parameter - x) ** 4).sum().backward()
            optimizer.step()
        torch.testing.assert_close(model.get_parameter(key), parameter, rtol=1e-6, atol=1e-7)


KEEPING = ["optimizer.keep_state=true", "local_steps=1"]


@pytest.mark.parametrize("optimizer", [["optimizer.name=adamw"], ["optimizer.name=sgd", "lr=0.1"]])
def test_a_run_that_keeps_moments(optimizer: list[str], run: Runner) -> None:
    """Round 1 is the same, round 2 is not."""
    overrides = [*optimizer, *(["optimizer.momentum=0.9"] if "lr=0.1" in optimizer else [])]
    fresh, lines = run(*overrides, "local_steps=1"), run.lines()
    keeping = run(*overrides, *KEEPING)
    assert keeping["refused"] == {}
    assert keeping["shared_state_sha256"] != fresh["shared_state_sha256"]
    payload = "uplink_payload_bytes"
    assert keeping["bytes"][payload] == fresh["bytes"][payload]  # moments stay on the client
    norms = [[line["update_norm_mean"] for line in run_s[1:]] for run_s in (lines, run.lines())]
    assert norms[0][0] == norms[1][0] and norms[0][1] != norms[1][1]


def test_a_run_that_keeps_moments_in_one_pass(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients in one pass have each its own moments; only sums in another order differ."""
    overrides = [*NO_DROPOUT, *KEEPING, "optimizer.name=sgd", "optimizer.momentum=0.9", "lr=0.1"]
    run(*overrides)
    alone = run.saved()

    class InOnePass(InProcessGrid):
        def __init__(self, num_clients: int, _: Any) -> None:
            super().__init__(num_clients)
            self.groups = lambda clients: [clients]

    members: list[int] = []
    train_all = Together.train

    def counted(self: Together, group: Sequence[Member]) -> None:
        members.append(len(group))
        train_all(self, group)

    monkeypatch.setattr(Together, "train", counted)
    run(*overrides, grid=InOnePass)
    assert members == [3, 3]
    together = run.saved()
    run(*[o for o in overrides if "keep_state" not in o])
    fresh = run.saved()
    for name, value in together.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-5)
    assert any(not torch.allclose(alone[n], fresh[n], rtol=1e-3, atol=1e-4) for n in alone)


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
    """Round 1 is the same; under a linear decay round 2 is half as fast."""
    seen: list[tuple[float, float]] = []
    for schedule in ("constant", "linear"):
        run(
            "optimizer.name=sgd",
            "local_steps=1",
            "lr=0.1",
            "method.rank=4",
            f"optimizer.round_schedule={schedule}",
            *NO_DROPOUT,
        )
        first, second = (line["update_norm_mean"] for line in run.lines()[1:])
        seen.append((first, second))
    assert seen[0][0] == seen[1][0]
    assert seen[1][1] == pytest.approx(seen[0][1] / 2, rel=1e-5)


# --- evaluation ---------------------------------------------------------------------------------


def examples(lengths: list[int]) -> Examples:
    rows = [[10 + i] * length for i, length in enumerate(lengths)]
    return labelled(rows, range(len(lengths)), 0)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_every_row_is_evaluated_once(size: int) -> None:
    lengths = [5, 2, 9, 2, 7, 1, 3]

    def measure(_: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"label": batch["labels"], "sum": batch["attention_mask"].sum(1)}

    batches = evaluate(Weights(), measure, examples(lengths), size, 1000)
    label = torch.cat([batch["label"] for batch in batches]).tolist()
    total = torch.cat([batch["sum"] for batch in batches]).tolist()
    assert sorted(label) == list(range(7))
    assert [lengths[i] for i in label] == total == sorted(lengths)
    assert len(batches) == -(-7 // size)


def measured(
    engine: Engine, rows: Examples, size: int, workers: int = 1
) -> list[dict[str, Tensor]]:
    """Evaluate rows as the task's score needs them.

    Args:
        engine: holds model and task.
        rows: all rows of a split.
        size: rows a batch.
        workers: threads that run batches at once.
    """
    task = engine.task

    def measure(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return task.evaluate_batch(task.forward(model, batch), batch)

    return evaluate(engine.replica.model, measure, rows, size, 1000, workers=workers)


def test_the_bits_do_not_depend_on_workers(opened: Callable[..., Engine]) -> None:
    engine = opened("evaluation.batch_size=4")
    rows = engine.rows.examples("test")
    engine.replica.load()
    one = measured(engine, rows, 4)
    for workers in (2, 3, 8):
        many = measured(engine, rows, 4, workers)
        assert len(many) == len(one) == 10
        for a, b in zip(one, many, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
    assert engine.evaluate(rows, 1) == engine.evaluate(rows, 3)


def test_threads_make_a_batch_when_they_need_it(
    opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of all batches at once would take gigabytes."""
    engine = opened("evaluation.batch_size=4")
    rows, model = engine.rows.examples("test"), engine.replica.model
    made = 0
    batch = Examples.batch

    def counted(self: Examples, positions: np.ndarray) -> Batch:
        nonlocal made
        made += 1
        return batch(self, positions)

    def measure(_: nn.Module, batch: Batch) -> dict[str, Tensor]:
        time.sleep(0.05)  # all batches would be made meanwhile
        return {"made": torch.tensor([made])}

    monkeypatch.setattr(Examples, "batch", counted)
    parts = evaluate(model, measure, rows, 4, 1000, workers=2)
    assert len(parts) == 10 and min(int(part["made"]) for part in parts) <= 2


def test_metrics_do_not_depend_on_the_batches(opened: Callable[..., Engine]) -> None:
    engine = opened()
    rows = engine.rows.examples("test")
    engine.replica.load()
    by_size = []
    for size in (1, 7, 16, 64):
        parts = measured(engine, rows, size)
        by_size.append(engine.task.score(parts, engine.task.split_rows("test"), None))
    first = by_size[0]
    for metrics in by_size[1:]:
        assert metrics["loss"] == pytest.approx(first["loss"], rel=1e-5)
        assert metrics["accuracy"] == first["accuracy"]
        assert metrics["f1_macro"] == pytest.approx(first["f1_macro"])
    assert 0 < first["accuracy"] < 1


def test_evaluation_leaves_the_model_as_it_is(opened: Callable[..., Engine]) -> None:
    engine = opened()
    before = {k: v.clone() for k, v in engine.replica.model.state_dict().items()}
    engine.evaluate(engine.rows.examples("validation"))
    assert all(torch.equal(v, before[k]) for k, v in engine.replica.model.state_dict().items())


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
        train(Passes(model, loss, precision), [[batch]], at(0.1), sgd())
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
    """No other cut of ten sorted rows into batches costs less."""
    lengths = np.random.default_rng(0).integers(1, 120, 10)
    ordered = np.sort(lengths)

    def cost(batches: list[np.ndarray]) -> int:
        return sum(len(b) * b.max() + 64 for b in batches)

    every = [
        np.split(ordered, np.flatnonzero([cut >> i & 1 for i in range(9)]) + 1)
        for cut in range(2**9)
    ]
    allowed = [b for b in every if all(len(x) <= 4 and len(x) * x.max() <= 300 for x in b)]
    batches = [lengths[b] for b in within(lengths, 4, 300)]
    assert cost(batches) == min(map(cost, allowed)) < max(map(cost, allowed))
    assert np.array_equal(np.concatenate(batches), ordered)
