"""Several clients in one pass train as each would alone."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.data.batching import Batch, lengthened
from fedpeft.engine.engine import Engine, Result
from fedpeft.engine.plan import Job, plan
from fedpeft.engine.probing import Vectorised, probe
from fedpeft.engine.stacked import Unsupported
from fedpeft.engine.together import Together
from fedpeft.methods.parts.pull import ProximalPull
from tests.data.files import image, write
from tests.pairs import names_in

Opened = Callable[..., Engine]
# Methods with parameters through which no row of the batch passes; the log says so.
ONE_BY_ONE = {"dora", "full", "prompt", "fedprompt", "p_tuning", "prefix"}
STEPS = ("num_clients=4", "local_steps=3", "batch_size=2", "lr=1e-2")


def jobs(engine: Engine, round: int = 1, mu: float = 0.0) -> list[Job]:
    """Return jobs of three clients with different starts, as personal parameters give.

    Args:
        engine: an engine of the configuration.
        round: number of the round.
        mu: strength of FedProx's term.
    """
    result, roles = [], engine.replica.roles
    for client in range(3):
        draws = torch.Generator().manual_seed(client)
        start = {
            name: value + 0.05 * torch.randn(value.shape, generator=draws)
            for name, value in engine.replica.initial.items()
        }
        term = ProximalPull(mu, {name: start[name] for name in roles.trained(round)})
        result.append(Job(roles.at(round, client), start, (term,)))
    return result


def trained(engine: Engine, group: Sequence[Job]) -> list[Result]:
    """Train a group in one pass and check that no client fails."""
    results = engine.train(group)
    assert len(results) == len(group)
    for result in results:
        assert isinstance(result, Result), result
    return list(results)  # type: ignore[arg-type]


def alone(engine: Engine, group: Sequence[Job]) -> list[Result]:
    return [result for job in group for result in trained(engine, [job])]


def steps_of(engine: Engine, client: int) -> list[list[Batch]]:
    """Return a client's batches in round 1."""
    rows, steps = engine.rows.training(client)
    return plan(engine.config, rows, steps, [1, client]).steps


def assert_equal(
    engine: Engine, round: int = 1, mu: float = 0.0, rtol: float = 2e-3, loss: float = 1e-5
) -> None:
    """Check that clients in one pass come to what each comes to alone.

    SGD's step is the gradient; AdamW's first step is the gradient's sign, which hides its size.

    Args:
        engine: an engine that trains with SGD.
        round: number of the round.
        mu: strength of FedProx's term.
        rtol: relative tolerance: of values to the largest step, of moments to the largest moment.
        loss: relative tolerance of losses.
    """
    group = jobs(engine, round, mu)
    expected, results = alone(engine, group), trained(engine, group)
    assert engine.vectorised is not Vectorised.NO  # after an error they would train one by one
    for ours, theirs, job in zip(results, expected, group, strict=True):
        assert ours.trained.loss == pytest.approx(theirs.trained.loss, rel=loss)
        counts = ours.trained.num_examples, ours.trained.steps, ours.trained.lr
        assert counts == theirs.trained[:1] + theirs.trained[2:]
        assert ours.after.keys() == theirs.after.keys()
        for name, value in theirs.after.items():
            moved = float((value - job.start[name]).abs().max())
            assert float((ours.after[name] - value).abs().max()) <= rtol * moved + 1e-7, name
        assert ours.moments.keys() == theirs.moments.keys()
        for name, value in theirs.moments.items():
            most = float(value.abs().max())
            assert float((ours.moments[name] - value).abs().max()) <= rtol * most + 1e-7, name


def assert_same(results: Sequence[Result], expected: Sequence[Result]) -> None:
    """Check that results are equal bit for bit."""
    for ours, theirs in zip(results, expected, strict=True):
        assert all(torch.equal(ours.after[name], value) for name, value in theirs.after.items())


@pytest.mark.matrix
@pytest.mark.parametrize("method", sorted(set(names_in("method")) - ONE_BY_ONE))
def test_together_as_alone(opened: Opened, method: str) -> None:
    engine = opened(f"method={method}", *STEPS, "optimizer.name=sgd", "lr=0.1")
    assert engine.vectorised is not Vectorised.NO
    for round in (1, 2):  # alternating methods train something else in round 2
        assert_equal(engine, round)


@pytest.mark.parametrize("method", sorted(ONE_BY_ONE))
def test_a_method_that_cannot_says_so_and_trains_alone(
    opened: Opened, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = opened(f"method={method}", *STEPS)
    group = jobs(engine)
    with caplog.at_level(logging.WARNING):
        results = trained(engine, group)
    (warning,) = [r.message for r in caplog.records if r.name == "fedpeft.engine.probing"]
    assert "clients train one by one, which is slower, because " in warning
    assert_same(results, alone(engine, group))


@pytest.mark.matrix
@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.momentum=0.9", "optimizer.weight_decay=0.1"),
        ("optimizer.momentum=0.9", "optimizer.keep_state=true"),
        ("optimizer.name=adamw", "optimizer.schedule=linear", "optimizer.warmup=0.4", "lr=1e-2"),
        ("optimizer.max_grad_norm=0.05",),
        ("local_steps=null", "local_epochs=2", "partition.alpha=0.3"),
        ("precision=bf16",),
    ],
)
def test_each_keeps_its_own_optimiser(opened: Opened, overrides: tuple[str, ...]) -> None:
    engine = opened("method=lora", *STEPS, "optimizer.name=sgd", "lr=0.1", *overrides)
    if "local_epochs=2" in overrides:
        steps = {len(steps_of(engine, client)) for client in range(3)}
        assert len(steps) > 1  # some leave early
    if "precision=bf16" in overrides:  # eight bits: sums in another order differ in the last
        assert_equal(engine, mu=0.5, rtol=0.1, loss=1e-2)
    else:
        assert_equal(engine, mu=0.5, rtol=5e-3)


def test_dropout_draws_as_alone(opened: Opened) -> None:
    """The first step's loss differs by rounding alone, so another draw would show."""
    engine = opened("method=lora", *STEPS, "local_steps=1", "batch_size=3")
    engine.replica.model.config.hidden_dropout_prob = 0.0  # type: ignore[union-attr]
    rates = {m.p for m in engine.replica.model.modules() if isinstance(m, torch.nn.Dropout)}
    assert max(rates) > 0
    lengths = {steps_of(engine, client)[0][0]["input_ids"].shape[1] for client in range(3)}
    assert len(lengths) > 1  # so that dropout over the longest length would draw other masks
    group = jobs(engine)
    for ours, theirs in zip(trained(engine, group), alone(engine, group), strict=True):
        assert ours.trained.loss == pytest.approx(theirs.trained.loss, rel=1e-6)


class Replayed:
    """Runs on a CPU the passes that a GPU would capture in a graph."""

    def __init__(self, backward: Callable, device: torch.device, pad_id: int) -> None:
        self.backward, self.pad_id = backward, pad_id
        self.lengths: list[int] = []

    def run(self, batch: Batch) -> torch.Tensor:
        batch = lengthened(batch, self.pad_id)
        self.lengths.append(batch["input_ids"].shape[1])
        return self.backward(batch)


QUIET = "model.settings={hidden_dropout_prob:0,attention_probs_dropout_prob:0}"


@pytest.mark.parametrize("method", ["lora", "scl", "fedtt", "bitfit"])
def test_passes_as_they_are_captured(
    opened: Opened, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of all members are filled up to one length, and gradients stay in place."""
    groups: list[Together] = []

    class Capturing(Together):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.captures = True
            groups.append(self)

    monkeypatch.setattr("fedpeft.engine.together.Graphs", Replayed)
    monkeypatch.setattr("fedpeft.engine.engine.Together", Capturing)
    engine = opened(f"method={method}", *STEPS, "optimizer.name=sgd", "lr=0.1", QUIET)
    assert engine.vectorised is Vectorised.WITHOUT_DRAWS
    assert_equal(engine)
    (together,) = groups
    (lane,) = together.lanes.values()
    assert isinstance(lane.graphs, Replayed)
    assert len(lane.graphs.lengths) == 3 and all(n % 8 == 0 for n in lane.graphs.lengths)


@pytest.mark.parametrize(
    ("dropout", "reason"),
    [
        (0.0, "attention.self is not called with one entry a sequence"),
        (0.1, "the model draws at random for what is no row of the batch"),  # relative positions
    ],
)
def test_a_module_that_gets_more_than_its_rows_is_not_split(
    dropout: float,
    reason: str,
    opened: Opened,
    checkpoint: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """DeBERTa's attention holds two biases, and is called with a mask beside the rows."""
    widths = "hidden_size:32,pooler_hidden_size:32,intermediate_size:64"
    rates = f"hidden_dropout_prob:{dropout},attention_probs_dropout_prob:{dropout}"
    small = f"{{{widths},num_attention_heads:4,num_hidden_layers:1,{rates}}}"
    model = ("model=deberta_base", "model.path=null", "model.random=true")
    model = (*model, f"model.tokenizer_path={checkpoint}", f"model.settings={small}")
    engine = opened("method=bitfit", *STEPS, *model)
    with caplog.at_level(logging.WARNING):
        assert engine.vectorised is Vectorised.NO
    assert reason in caplog.text


class Beside(torch.nn.Module):
    """A model whose layer gets two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Bilinear(3, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x)


def test_a_module_of_two_tensors_is_not_split() -> None:
    task: Any = SimpleNamespace(forward=lambda model, batch: model(batch["input_ids"].float()))
    with pytest.raises(Unsupported, match="layer is not called with one entry a sequence"):
        probe(Beside(), task, ["layer.weight"], {"input_ids": torch.ones(2, 3).long()}, "fp32")


def test_an_error_in_one_pass_is_no_error_alone(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = opened("method=lora", *STEPS)
    group = jobs(engine)

    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fedpeft.engine.engine.Together.train", fails)
    with caplog.at_level(logging.WARNING):
        results = trained(engine, group)
    assert "clients train one by one from here on" in caplog.text
    assert "RuntimeError('out of memory')" in caplog.text
    assert_same(results, alone(engine, group))


def test_a_model_that_draws_is_known(opened: Opened) -> None:
    assert opened("method=lora").vectorised is Vectorised.WITH_DRAWS
    assert opened("method=prompt").vectorised is Vectorised.NO


def test_a_loss_that_is_not_finite_is_its_own_clients(opened: Opened) -> None:
    engine = opened("method=lora", *STEPS)
    group = jobs(engine)
    name = next(n for n in group[1].start if "lora_A" in n)
    group[1].start[name].fill_(float("nan"))
    good, bad, also = engine.train(group)
    assert isinstance(bad, FloatingPointError)
    for result, job in ((good, group[0]), (also, group[2])):
        assert isinstance(result, Result)
        (expected,) = trained(engine, [job])
        assert result.trained.loss == pytest.approx(expected.trained.loss, rel=1e-5)


def test_the_clients_in_a_pass_follow_from_the_tokens_of_a_step(opened: Opened) -> None:
    clients = {}
    for size in (1, 2, 8, 64):
        engine = opened("method=lora", f"batch_size={size}")
        tokens = float(np.mean(engine.rows.examples("train").lengths))
        clients[size] = engine.clients_per_pass()
        assert 10 < tokens < 28
        assert clients[size] == (min(16, int(384 / (size * tokens))) if size < 8 else 1)
    assert clients[1] > clients[2] > clients[8] == 1
    assert opened("method=lora", "runtime.clients_per_pass=3").clients_per_pass() == 3
    assert opened("method=lora", "batch_size=1", "accumulate=2").clients_per_pass() == 1


LLAMA = (
    "{model_type:llama,hidden_size:16,intermediate_size:32,num_hidden_layers:1,"
    "num_attention_heads:2,num_key_value_heads:2,vocab_size:200}"
)


@pytest.mark.parametrize("targets", ["[q]", "[q,lm_head]"])
def test_next_tokens_together_as_alone(opened: Opened, checkpoint: Path, targets: str) -> None:
    """The head reads every member's predicted tokens, with its own adapter if it has one."""
    random = ("model.path=null", "model.random=true", f"model.tokenizer_path={checkpoint}")
    task = "data._target_=fedpeft.data.tasks.language.LanguageModelling"
    model = (*random, f"model.architecture={LLAMA}", task, "data.metrics=[token_accuracy]")
    size = (*STEPS, "optimizer.name=sgd", "lr=0.1")
    engine = opened("method=lora", f"method.targets={targets}", *size, *model)
    lengths = {steps_of(engine, client)[0][0]["input_ids"].shape[1] for client in range(3)}
    assert len(lengths) > 1  # so that some are filled up
    assert any("lm_head" in name for name in engine.replica.initial) == ("lm_head" in targets)
    assert_equal(engine)


def test_a_decoder_reads_its_last_token_also_beside_longer_ones(
    opened: Opened, checkpoint: Path
) -> None:
    """A class is read before padding begins, so rows must be filled up with the padding token."""
    architecture = f"model.architecture={LLAMA}"
    random = ("model.path=null", "model.random=true", f"model.tokenizer_path={checkpoint}")
    engine = opened("method=lora", *STEPS, *random, architecture, "optimizer.name=sgd", "lr=0.1")
    engine.replica.processor.pad_token = "[MASK]"  # another than 0
    pad_id = engine.replica.processor.pad_token_id
    engine.replica.model.config.pad_token_id = pad_id  # type: ignore[union-attr]
    assert engine.rows.examples("train").pad_id == pad_id > 0
    assert_equal(engine)


@pytest.mark.parametrize("method", ["lora", "scl", "fedtt", "bitfit", "full"])
def test_images_whose_positions_are_interpolated(
    opened: Opened, method: str, tmp_path: Path
) -> None:
    """The model's positions are of 32 pixels, and it reads images of 16."""
    rows = [{"image": {"bytes": image(i), "path": "x.png"}, "label": i % 2} for i in range(60)]
    path = write(tmp_path / "rows", kind="parquet", train=rows, test=rows)
    small = "hidden_size:32,num_hidden_layers:2,num_attention_heads:2,mlp_ratio:2"
    model = (f"model.architecture={{model_type:dinov2,{small},image_size:32,patch_size:8}}",)
    model = ("model=dinov2_small", "model.path=null", "model.random=true", *model)
    model = (*model, "model.images={size:{height:16,width:16}}")
    data = ("data=images", f"data.path={path}", "data.labels=[cat,dog]", "data.duplicates=keep")
    engine = opened(
        f"method={method}", *STEPS, *model, *data, "partition=iid", "optimizer.name=sgd", "lr=0.1"
    )
    assert engine.vectorised
    assert_equal(engine, rtol=5e-3)
