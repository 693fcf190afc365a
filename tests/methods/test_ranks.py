"""Ranks that differ by client: the blocks that clients train and send, and their mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpeft.config.load import load_config
from fedpeft.engine.engine import Engine, Result
from fedpeft.engine.plan import Job
from fedpeft.methods.base import At, Method, Round
from fedpeft.methods.fedtt import FACTOR, FedTT, FedTTPlus
from fedpeft.methods.flexlora import FlexLoRA
from fedpeft.methods.flora import FLoRA
from fedpeft.methods.hetlora import HetLoRA
from fedpeft.methods.lora import LoRA
from fedpeft.methods.parts.ranks import mean_of_holders, rank_of
from fedpeft.nn.tensor_train import TTLinear
from fedpeft.state import State, filled, leading, load_state, payload_bytes, snapshot
from tests.conftest import Runner
from tests.methods.rounds import aggregated

RANKS = [2, 4, 1]  # ranks of clients 0, 1, 2
HEAD = 32 * 4 + 4
LORA = ("hetlora", "flexlora", "flora")


def test_rank_of_a_client() -> None:
    assert [rank_of([2, 4, 1], At(1, c), 8) for c in range(5)] == [2, 4, 1, 2, 4]
    assert [rank_of({1: 3}, At(1, c), 8) for c in range(3)] == [8, 3, 8]
    assert rank_of(None, At(1, 7), 8) == rank_of([], At(1, 7), 8) == 8
    assert rank_of([2, 4, 1], At(1), 8) == 8  # a client of whole parameters


@pytest.mark.parametrize("cls", [HetLoRA, FlexLoRA, FLoRA])
def test_blocks_of_lora(cls: type[Any]) -> None:
    method = cls(rank=4, ranks=RANKS)
    a, b = "x.lora_A.default.weight", "x.lora_B.default.weight"
    assert [method.block(a, (4, 30), At(1, c)) for c in range(4)] == [(r, 30) for r in (2, 4, 1, 2)]
    assert [method.block(b, (20, 4), At(1, c)) for c in range(4)] == [(20, r) for r in (2, 4, 1, 2)]
    for name, shape in (("classifier.weight", (4, 30)), ("x.base_layer.weight", (20, 30))):
        assert method.block(name, shape, At(1, 2)) == shape


def test_blocks_of_a_train() -> None:
    method = FedTT(tt_rank=5, tt_ranks={1: 2})
    shapes = {1: (1, 4, 5), 2: (5, 8, 5), 3: (5, 8, 1)}
    for client, r in ((0, 5), (1, 2)):
        at = At(1, client)
        block = [method.block(f"x.factor_{j}_of_3", shape, at) for j, shape in shapes.items()]
        assert block == [(1, 4, r), (r, 8, r), (r, 8, 1)]
    assert method.block("x.down.bias", (64,), At(1, 1)) == (64,)


def blocks(method: Method, state: State, client: int) -> State:
    """Cut a full state to the blocks that a client trains in round 1."""
    at = At(1, client)
    return {n: leading(v, method.block(n, v.shape, at)) for n, v in state.items()}


def tail(method: Method, state: State, client: int) -> list[Tensor]:
    """Return the entries outside of a client's blocks."""
    ones = {name: torch.ones_like(value) for name, value in state.items()}
    inside = filled(blocks(method, ones, client), state)
    return [value[inside[name] == 0] for name, value in state.items()]


@pytest.fixture
def tails(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool, bool]]:
    """Before and after each training: the client, if its model has a tail, and if that is zero."""
    seen: list[tuple[int, bool, bool]] = []
    train_client = Engine.train_client

    def look(engine: Engine, client: int, state: State) -> None:
        outside = torch.cat(tail(engine.config.method, state, client))
        seen.append((client, len(outside) > 0, not outside.any()))

    def watch(engine: Engine, job: Job) -> Result:
        look(engine, job.client, job.start)
        result = train_client(engine, job)
        assert result.after.keys() == job.start.keys() == set(engine.replica.roles.names)
        after = snapshot(engine.replica.model, engine.replica.roles.names)
        look(engine, job.client, after)
        return result

    monkeypatch.setattr(Engine, "train_client", watch)
    return seen


@pytest.mark.parametrize("method", LORA)
def test_a_client_of_rank_r_sends_r_rows_and_columns(
    method: str, run: Runner, tails: list[tuple[int, bool, bool]]
) -> None:
    """Zeros outside of the block stay zeros, though nothing masks their gradients."""
    run(f"method={method}", "method.rank=4", f"method.ranks={RANKS}", "optimizer.weight_decay=0.1")
    assert tails == [(c, RANKS[c] < 4, True) for _ in (1, 2) for c in (0, 1, 2) for _ in (1, 2)]
    for round in (1, 2):
        for exchange in run.recorder.of("train", round):
            rank, sent = RANKS[exchange.client], exchange.up_state()
            assert payload_bytes(sent) == 4 * (2 * 2 * rank * (32 + 32) + HEAD)
            for state in (sent, exchange.down_state()):
                assert {v.shape[0] for n, v in state.items() if "lora_A" in n} == {rank}
                assert {v.shape[1] for n, v in state.items() if "lora_B" in n} == {rank}
        line = run.lines()[round]
        assert line["uplink_payload_bytes"] == 4 * (2 * 2 * sum(RANKS) * (32 + 32) + 3 * HEAD)
    shapes = {tuple(v.shape) for n, v in run.saved().items() if "lora_A" in n}
    assert shapes == {(4, 32)}


@pytest.mark.parametrize("method", ["fedtt", "fedtt_plus"])
def test_a_client_of_tensor_rank_r_sends_r_squared(
    method: str, run: Runner, tails: list[tuple[int, bool, bool]]
) -> None:
    run(f"method={method}", f"method.tt_ranks={RANKS}", "optimizer.weight_decay=0.1")
    assert tails == [(c, True, True) for _ in (1, 2) for c in (0, 1, 2) for _ in (1, 2)]
    for exchange in run.recorder.of("train", 1):
        r, sent = RANKS[exchange.client], exchange.up_state()
        # 32x64 = (4, 8, 8, 8) and back, a pooler of 32x32 = (4, 8, 8, 4); round 1 skips factor 2.
        middle = 16 if method == "fedtt" else 8
        adapters, pooler = 4 * 2 * (12 * r + middle * r * r), 8 * r + middle * r * r
        biases = 4 * (64 + 32) + 32 if method == "fedtt" else 0
        assert payload_bytes(sent) == 4 * (adapters + pooler + biases + HEAD)


def test_ranks_by_client_in_a_configuration() -> None:
    method = load_config(["method=hetlora", "method.ranks={1: 2, 3: 4}"]).method
    assert [rank_of(method.ranks, At(1, c), method.rank) for c in range(5)] == [8, 2, 8, 4, 8]


@dataclass(frozen=True)
class Held(Method):
    """Every client trains a block of its own.

    Args:
        shapes: shapes of the blocks, by client.
    """

    shapes: Sequence[tuple[int, ...]]

    def inject(self, model: nn.Module) -> nn.Module:
        return model

    def block(self, name: str, shape: Sequence[int], at: At) -> Sequence[int]:
        assert at.client is not None
        return self.shapes[at.client]


@pytest.mark.parametrize(
    ("method", "blocks"),
    [
        (LoRA(), False),
        (FlexLoRA(rank=4), False),
        (FlexLoRA(rank=4, ranks=[4, 4]), False),
        (FlexLoRA(rank=4, ranks=[4, 2]), True),
        (FlexLoRA(rank=4, ranks=[4, 4, 2]), False),  # no third client
        (HetLoRA(rank=4, ranks={1: 3}), True),
        (HetLoRA(rank=4, prune=0.9), True),  # ranks shrink after the first round
        (FedTT(tt_rank=3), False),
        (FedTT(tt_rank=3, tt_ranks=[3, 1]), True),
        (Held([(1,), (1,)]), True),  # it does not say, so the answer that refuses is the safe one
    ],
    ids=repr,
)
def test_a_method_tells_if_any_of_two_clients_trains_a_block(method: Method, blocks: bool) -> None:
    assert method.trains_blocks(2) is blocks


def test_the_mean_of_those_that_hold_an_entry() -> None:
    states = [
        {"x": torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 0.0], [0.0, 0.0, 0.0]])},
        {"x": torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])},
    ]
    before = {"x": torch.full((3, 3), 9.0)}
    held = Held([(2, 2), (1, 1)])
    round = Round(1, [At(1, 0), At(1, 1)], states, [0.25, 0.75], before)
    mean = mean_of_holders(held, round, ["x"])
    # (0.25 + 3.75) / 1 where both have a number; the first alone has three more; the rest stays.
    assert mean["x"].tolist() == [[4, 2, 9], [3, 4, 9], [9, 9, 9]]
    assert mean["x"].dtype == torch.float32


def test_trains_of_unequal_rank_are_averaged_by_their_holders() -> None:
    method = FedTT(tt_rank=3, tt_ranks=[3, 1])
    name = "a.down.factor_2_of_4"
    before = {name: torch.full((3, 2, 3), 7.0), "h": torch.zeros(1)}
    low = filled({name: torch.full((1, 2, 1), 4.0)}, before)[name]
    states = [
        {name: torch.full((3, 2, 3), 8.0), "h": torch.ones(1)},
        {name: low, "h": torch.ones(1)},
    ]
    after = aggregated(method, states, [0.5, 0.5], before)
    assert after[name][0, :, 0].tolist() == [6, 6] and after["h"].item() == 1
    assert after[name].sum() == 2 * 6 + 16 * 8
    plain = aggregated(FedTT(tt_rank=3), states, [0.5, 0.5], before)
    assert plain[name].sum() == 2 * 6 + 16 * 4


@pytest.mark.parametrize("method", [FedTT(tt_ranks=[2]), FedTTPlus(tt_ranks=[2])])
def test_a_leading_block_of_a_train_is_a_train_of_lower_rank(method: FedTT) -> None:
    """With zeros outside of its block, a client computes what a train of its rank computes."""
    torch.manual_seed(0)
    large, small = (TTLinear(32, 64, (4, 8, 8, 8), r) for r in (5, 2))
    state = {n: p.detach() for n, p in large.named_parameters()}
    part = {f"x.{n}": v for n, v in state.items()}
    part = {n.removeprefix("x."): v for n, v in blocks(method, part, 0).items()}
    assert all(FACTOR.search("." + n) or n == "bias" for n in part)
    load_state(small, part)
    load_state(large, filled(part, state))
    x = torch.randn(3, 32)
    torch.testing.assert_close(large(x), small(x))
    large(x).square().sum().backward()
    for parameter, value in zip(large.parameters(), filled(part, state).values(), strict=False):
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None and value.shape == parameter.shape
