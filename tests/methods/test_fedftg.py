"""FedFTG projects gradients as a term, so its clients train alone and in one pass alike."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedpeft.engine.engine import Engine
from fedpeft.engine.plan import Job
from fedpeft.engine.probing import Vectorised
from fedpeft.methods.base import At
from fedpeft.methods.fedftg import FedFTG

SITE, OTHER = "bert.encoder.layer.0.intermediate.dense.weight", "classifier.weight"


def test_the_term_projects_mlp_weights_alone() -> None:
    draws = torch.Generator().manual_seed(1)
    parameters = {name: nn.Parameter(torch.zeros(12, 20)) for name in (SITE, OTHER)}
    gradient = torch.randn(12, 20, generator=draws)
    for parameter in parameters.values():
        parameter.grad = gradient.clone()
    FedFTG(rank=3).term(At(1, 0), {}, {}).correct(parameters)
    projected = parameters[SITE].grad
    assert projected is not None
    u, s, v = torch.linalg.svd(gradient)
    best = (u[:, :3] * s[:3]) @ v[:3]
    assert int(torch.linalg.matrix_rank(projected, atol=1e-4)) == 3
    assert float((projected - best).norm() / best.norm()) < 0.1
    assert torch.equal(parameters[OTHER].grad, gradient)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 3])
def test_in_one_pass_as_alone(opened: Callable[..., Engine], steps: int) -> None:
    engine = opened("method=fedftg", f"local_steps={steps}", "optimizer.name=sgd", "lr=0.1")
    start, method = engine.replica.values(), engine.config.method
    ats = [At(1, client, 2) for client in range(3)]
    jobs = [Job(at, start, [method.term(at, start, {})]) for at in ats]
    assert engine.vectorised is not Vectorised.NO
    together = engine.train(jobs)
    for job, ours in zip(jobs, together, strict=True):
        assert not isinstance(ours, Exception)
        alone = engine.train_client(job)
        assert ours.trained.loss == pytest.approx(alone.trained.loss, rel=1e-5)
        for name, value in alone.after.items():
            step = float((value - start[name]).norm())
            assert float((ours.after[name] - value).norm()) <= 5e-3 * step + 1e-7
