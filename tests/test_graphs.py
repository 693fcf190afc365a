"""A rehearsal on the CPU tells if a pass can be captured; to replay one needs a GPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedpeft.data.batching import Batch
from fedpeft.engine.engine import Engine
from fedpeft.engine.graphs import rehearsed
from fedpeft.engine.passes import Passes
from fedpeft.engine.plan import plan

Opened = Callable[..., Engine]
X = torch.tensor([[1.0, -2.0], [3.0, 4.0]])


@pytest.mark.parametrize(
    ("function", "first"),
    [
        (lambda x: x.sum(), None),
        (lambda x: x[torch.tensor([1, 0])].sum(), None),
        (lambda x: x.masked_fill(x > 0, 0.0).sum(), None),
        (lambda x: x[x > 0].sum(), "aten.index.Tensor"),
        (lambda x: x * x.sum().item(), "aten._local_scalar_dense.default"),
        (lambda x: x if bool(x.any()) else -x, "aten._local_scalar_dense.default"),
        (lambda x: (x + 1).nonzero(), "aten.nonzero.default"),
    ],
)
def test_the_first_operation_that_needs_values(
    function: Callable[[Tensor], Tensor], first: str | None
) -> None:
    loss, operation = rehearsed(lambda batch: function(batch["x"]), {"x": X})
    assert operation == first
    torch.testing.assert_close(loss, function(X))


def passes_of(engine: Engine) -> tuple[Passes, Batch]:
    """Return passes over the parameters that train in round 1, and client 0's first batch."""
    task, replica = engine.task, engine.replica
    replica.set_trainable(set(replica.roles.trained(1)))
    replica.model.train()
    passes = Passes(replica.model, lambda m, batch: task.loss(task.forward(m, batch), batch))
    ((batch,), *_) = plan(engine.config, *engine.rows.training(0), [1, 0]).steps
    return passes, batch


@pytest.mark.parametrize("method", ["lora", "scl", "fedtt", "bitfit", "full", "ia3", "prompt"])
def test_steps_of_a_classifier_can_be_captured(opened: Opened, method: str) -> None:
    passes, batch = passes_of(opened(f"method={method}"))
    # rows are padded, so the model would read the mask's values if it were not captured
    assert batch["attention_mask"].min() == 0
    loss, first = rehearsed(passes.backward, batch)
    assert first is None
    assert torch.isfinite(loss)


def test_gradients_of_a_rehearsal_are_those_of_any_pass(opened: Opened) -> None:
    engine = opened("method=lora", "model.settings={hidden_dropout_prob:0}")
    engine.replica.model.config.attention_probs_dropout_prob = 0.0  # type: ignore[union-attr]
    passes, batch = passes_of(engine)
    engine.replica.model.eval()
    expected = passes.backward(batch)
    gradients = passes.flat.vector.grad
    assert gradients is not None and gradients.any()
    once = gradients.clone()
    loss, _ = rehearsed(passes.backward, batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, 2 * once)
