"""Compression by hand, and on the wire: the dtype of every key, and its bytes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.client_app import app as client_app
from fedpeft.compression import (
    INDICES,
    SCALES,
    BFloat16,
    Compression,
    Float16,
    Int8,
    OfUpdates,
    TopK,
)
from fedpeft.methods.base import State
from fedpeft.seeding import generator
from fedpeft.state import EXTRA, pack, payload_bytes, unpack, wire_bytes
from tests.conftest import Runner, Sent, state_of

LOSSY: list[OfUpdates] = [Float16(), BFloat16(), Int8(), TopK()]
by_class = pytest.mark.parametrize("compression", LOSSY, ids=lambda c: type(c).__name__)


def rng(number: int = 0) -> np.random.Generator:
    return generator(number, "compression", 1, 0)


def there(
    compression: Compression, state: State, start: State, error: State | None = None, n: int = 0
) -> tuple[State, State, State]:
    """The wire's state as it arrives, what the server makes of it, and the client's error."""
    wire, kept = compression.compress(state, start, error or {}, rng(n))
    arrived = unpack(*pack(wire))
    assert {n: v.dtype for n, v in arrived.items()} == {n: v.dtype for n, v in wire.items()}
    return arrived, compression.restore(arrived, start), kept


def state(**values: list[float]) -> State:
    return {name: torch.tensor(value) for name, value in values.items()}


def drawn(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(30, 20, generator=generator),
        "b": 1e-3 * torch.randn(50, generator=generator),
    }


def moved(start: State) -> tuple[State, State]:
    """A state and its update, small beside it."""
    update = {name: 0.01 * value for name, value in drawn(1).items()}
    return {name: value + update[name] for name, value in start.items()}, update


# --- by hand -------------------------------------------------------------------------------------


def test_none_is_the_state_itself() -> None:
    start = drawn(0)
    after, _ = moved(start)
    wire, found, kept = there(Compression(), after, start)
    assert kept == {}
    assert all(torch.equal(wire[n], after[n]) and torch.equal(found[n], after[n]) for n in after)


def test_half_floats_by_hand() -> None:
    """1 + 2^-12 is between two floats16; as an update 2^-12 is one."""
    start, after = state(a=[1.0, 1.0]), state(a=[1 + 2**-12, 1.5 + 2**-12])
    wire, found, _ = there(Float16(), after, start)
    assert wire["a"].dtype is torch.float16 and wire["a"].tolist() == [2**-12, 0.5]
    assert found["a"].tolist() == [1 + 2**-12, 1.5]
    wire, found, _ = there(BFloat16(), state(a=[2**-12, 1 + 2**-9]), state(a=[0.0, 0.0]))
    assert wire["a"].dtype is torch.bfloat16 and found["a"].tolist() == [2**-12, 1.0]


@pytest.mark.parametrize(("compression", "bits"), [(Float16(), 11), (BFloat16(), 8)])
def test_half_floats_stay_within_their_bound(compression: Compression, bits: int) -> None:
    start = drawn(0)
    after, update = moved(start)
    _, found, _ = there(compression, after, start)
    for name, value in update.items():
        bound = (2.0**-bits * value.abs()).clamp(min=2.0**-25) + 1e-6 * start[name].abs()
        assert ((found[name] - after[name]).abs() <= bound).all()
        assert not torch.equal(found[name], after[name])


def test_float16_does_not_overflow_in_silence() -> None:
    start, after = state(a=[0.0]), state(a=[7e4])
    with pytest.raises(ValueError, match="a reaches 70000, but torch.float16 ends at 65504"):
        there(Float16(), after, start)
    assert there(BFloat16(), after, start)[1]["a"].item() == pytest.approx(7e4, rel=2**-8)
    with pytest.raises(ValueError, match="a reaches nan"):
        there(Float16(), state(a=[float("nan")]), start)


def test_int8_by_hand() -> None:
    """scale = 2.54 / 127 = 0.02: 0.05 is 2.5 levels, -0.02 is one."""
    start, after = state(a=[1.0, 1.0, 1.0], z=[3.0]), state(a=[3.54, 1.05, 0.98], z=[3.0])
    seen = set()
    for n in range(20):
        wire, found, _ = there(Int8(), after, start, n=n)
        assert {k: v.dtype for k, v in wire.items()} == {
            "a": torch.int8,
            "z": torch.int8,
            SCALES: torch.float32,
        }
        assert wire[SCALES].tolist() == pytest.approx([0.02, 0.0])
        assert wire["a"][0].item() == 127 and wire["z"].item() == 0
        assert found["a"][1].item() == pytest.approx(1 + 0.02 * wire["a"][1].item())
        seen.add(wire["a"][1].item())
    assert seen == {2, 3}


def test_int8_stays_within_one_level() -> None:
    start = drawn(0)
    after, update = moved(start)
    wire, found, _ = there(Int8(), after, start)
    for (name, value), scale in zip(update.items(), wire[SCALES], strict=True):
        assert scale.item() == pytest.approx(value.abs().max().item() / 127, rel=1e-2)
        assert (found[name] - after[name]).abs().max() <= 1.01 * scale + 1e-6


def test_stochastic_rounding_is_unbiased() -> None:
    """Mean of 4,000 draws: a level's standard error is 0.5 / sqrt(4000) = 0.008 at the most."""
    levels = torch.tensor([127.0, 0.5, 0.1, -0.3, 3.75, -126.9])
    update = {"a": levels}
    total = torch.zeros_like(levels)
    for n in range(4000):
        total += Int8().decode(Int8().encode(update, rng(n)), update)["a"]
    torch.testing.assert_close(total / 4000, levels, rtol=0, atol=0.03)


def test_rounding_follows_from_seed_round_and_client() -> None:
    update = drawn(0)
    draws = [(0, 1, 0), (0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]
    found = [
        Int8().encode(update, generator(seed, "compression", round, client))["a"]
        for seed, round, client in draws
    ]
    assert torch.equal(found[0], found[1])
    assert not any(torch.equal(found[0], other) for other in found[2:])


def test_top_k_by_hand_over_three_rounds() -> None:
    """One of four goes; the others wait, and add up."""
    compression, error, server = TopK(ratio=0.25), {}, state(a=[0.0, 0.0, 0.0, 0.0])
    updates = [[1.0, -3.0, 2.0, 0.0], [1.5, 0.0, 2.0, 0.0], [1.5, 0.5, 0.0, -3.5]]
    sent = [(1, -3.0), (2, 4.0), (0, 4.0)]
    errors = [[1.0, 0.0, 2.0, 0.0], [2.5, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, -3.5]]
    for update, (index, value), left in zip(updates, sent, errors, strict=True):
        after = {"a": server["a"] + torch.tensor(update)}
        wire, server, error = there(compression, after, server, error)
        assert wire["a"].tolist() == [value] and wire[INDICES + "a"].tolist() == [index]
        assert wire[INDICES + "a"].dtype is torch.int32
        assert error["a"].tolist() == left
    assert server["a"].tolist() == [4.0, -3.0, 4.0, 0.0]  # with the error, the sum of all updates


def test_top_k_of_two_dimensions_and_ties() -> None:
    start = {"m": torch.zeros(2, 3), "other": torch.zeros(1)}
    after = {"m": torch.tensor([[1.0, 2.0, 2.0], [-2.0, 0.0, 5.0]]), "other": torch.ones(1)}
    wire, found, _ = there(TopK(ratio=0.5), after, start)
    assert wire[INDICES + "m"].tolist() == [1, 2, 5]
    assert found["m"].tolist() == [[0, 2, 2], [0, 0, 5]]
    assert found["other"].item() == 1  # one entry at the least
    assert [TopK(ratio=0.1).count(n) for n in (1, 4, 100)] == [1, 1, 10]


def test_errors_of_names_that_rest_wait() -> None:
    compression = TopK(ratio=0.5)
    _, _, error = there(compression, state(a=[1.0, 2.0]), state(a=[0.0, 0.0]))
    _, _, error = there(compression, state(b=[1.0, 2.0]), state(b=[0.0, 0.0]), error)
    assert {n: v.tolist() for n, v in error.items()} == {"a": [1.0, 0.0], "b": [1.0, 0.0]}


@by_class
def test_nothing_to_send_and_nothing_that_moved(compression: OfUpdates) -> None:
    assert there(compression, {}, {})[:2] == ({}, {})
    start = drawn(0)
    found = there(compression, start, start)[1]
    assert all(torch.equal(found[n], start[n]) for n in start)


@by_class
def test_dtypes_of_parameters_are_kept(compression: OfUpdates) -> None:
    start = {"a": torch.ones(8, dtype=torch.bfloat16)}
    found = there(compression, {"a": start["a"] * 2}, start)[1]
    assert found["a"].dtype is torch.bfloat16 and found["a"].max() == 2


# --- what no client of ours sends ----------------------------------------------------------------

START = {"a": torch.zeros(2, 5)}
BAD: list[tuple[OfUpdates, State, str]] = [
    (Float16(), {"a": torch.zeros(2, 5)}, "a is torch.float32 .*, expected torch.float16"),
    (Float16(), {"a": torch.full((2, 5), float("inf")).half()}, "a holds .* not finite"),
    (Int8(), {"a": torch.zeros(2, 5, dtype=torch.int8)}, f"keys are missing, first {SCALES}"),
    (
        Int8(),
        {"a": torch.zeros(2, 5, dtype=torch.int8), SCALES: torch.full((1,), float("nan"))},
        f"{SCALES} holds values that are not finite",
    ),
    (
        Int8(),
        {"a": torch.zeros(2, 5, dtype=torch.int8), SCALES: torch.zeros(2)},
        rf"{SCALES} is torch.float32 \(2,\), expected torch.float32 \(1,\)",
    ),
    (TopK(), {"a": torch.ones(1)}, f"keys are missing, first {INDICES}a"),
    (TopK(), {"a": torch.ones(1), "x": torch.ones(1)}, "keys are missing"),
    (TopK(ratio=0.2), {"a": torch.ones(2), INDICES + "a": torch.tensor([3, 10])}, r"torch.int64"),
    (TopK(ratio=0.2), {"a": torch.ones(3), INDICES + "a": torch.zeros(3).int()}, r"expected .*2,"),
    *(
        (
            TopK(ratio=0.2),
            {"a": torch.ones(2), INDICES + "a": torch.tensor(wrong, dtype=torch.int32)},
            r"indices of a must rise within 0\.\.9, got",
        )
        for wrong in ([3, 10], [-1, 3], [3, 3], [4, 3])
    ),
]


@pytest.mark.parametrize(("compression", "wire", "message"), BAD)
def test_unusable_messages(compression: OfUpdates, wire: State, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compression.restore(wire, START)


def test_an_unusable_reply_is_left_out(run: Runner) -> None:
    def answer(message: Any, context: Any) -> Any:
        reply = client_app(message=message, context=context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 2:
            wire = state_of(reply)
            wire[INDICES + "classifier.bias"] += 4
            reply.content["arrays"], index = pack(wire)
            reply.content.config_records["config"]["index"] = index
        return reply

    run("compression=topk", "num_rounds=1", answer=answer)
    (refused,) = run.lines()[1]["refused"].items()
    assert refused[0] == "2"
    assert refused[1].startswith("indices of classifier.bias must rise within 0..3, got ")


def test_values_outside_their_rule() -> None:
    for ratio in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"ratio must be in \(0, 1\], got {ratio}"):
            TopK(ratio=ratio)


# --- on the wire ---------------------------------------------------------------------------------

METHODS = ["lora", "fedsa_lora", "fedtt_plus"]
WIRE = {
    "none": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "topk": torch.float32,
}


def dtypes(wire: State) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in wire.items()}


def beside(name: str) -> torch.dtype | None:
    """Of what goes beside the parameters."""
    if name == SCALES:
        return torch.float32
    return torch.int32 if name.startswith(INDICES) else None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compression", list(WIRE))
def test_the_dtype_of_every_key_and_its_bytes(compression: str, method: str, run: Runner) -> None:
    summary = run(f"method={method}", f"compression={compression}", "evaluation.clients=never")
    assert summary["refused"] == {}
    total = 0
    for line in run.lines()[1:]:
        sent = run.recorder.of("train", line["round"])
        assert line["uplink_bytes"] == sum(wire_bytes(e.up.content) for e in sent)
        assert line["uplink_payload_bytes"] == sum(payload_bytes(e.up_state()) for e in sent)
        total += sum(_raw(e) for e in sent)
        for exchange in sent:
            for name, dtype in dtypes(exchange.up_state()).items():
                assert dtype is (beside(name) or WIRE[compression])
            assert set(dtypes(exchange.down_state()).values()) == {torch.float32}
    numbers = 3 * sum(summary["parameters"]["sent_up"])  # three clients, two rounds
    assert summary["bytes"]["uplink_payload_bytes"] == total
    # fedtt_plus has many small tensors: a scale, or one entry at the least, weighs more there
    share = {"none": 1.0, "float16": 0.5, "bfloat16": 0.5, "int8": 0.25, "topk": 0.2}[compression]
    slack = 1.0 if share >= 0.5 else 1.1
    assert share <= total / (4 * numbers) * 1.0001 + 0.01 and total <= slack * share * 4 * numbers


def _raw(exchange: Sent) -> int:
    """Bytes of the arrays as they stand in the message."""
    return sum(a.numpy().nbytes for a in exchange.up.content.array_records["arrays"].values())


@pytest.mark.parametrize("compression", [c for c in WIRE if c != "none"])
def test_down_goes_what_went_up_added_to_what_went_down(compression: str, run: Runner) -> None:
    """The next round's state is the weighted mean of start + update, read off the messages."""
    run(f"compression={compression}", "strategy.weights=uniform", "evaluation.clients=never")
    first, second = (run.recorder.of("train", round) for round in (1, 2))
    algorithm: dict[str, OfUpdates] = {
        "float16": Float16(),
        "bfloat16": BFloat16(),
        "int8": Int8(),
        "topk": TopK(),
    }
    start = first[0].down_state()
    updates = [algorithm[compression].decode(e.up_state(), start) for e in first]
    for name, value in second[0].down_state().items():
        mean = torch.stack([update[name] for update in updates]).mean(dim=0)
        torch.testing.assert_close(value, start[name] + mean, rtol=1e-5, atol=1e-6)
    assert any(value.any() for value in updates[0].values())


def test_int8_of_two_runs_is_equal(run: Runner) -> None:
    shas = [run("compression=int8", f"seed={s}")["shared_state_sha256"] for s in (0, 0, 1)]
    assert shas[0] == shas[1] != shas[2]


@pytest.mark.parametrize("compression", ["float16", "bfloat16"])
def test_both_ways(compression: str, run: Runner) -> None:
    given = [f"compression={compression}", "strategy=scaffold", "evaluation.clients=always"]
    single, both = run(*given)["bytes"], run(*given, "compression.both=true")["bytes"]
    for exchange in run.recorder.of("train") + run.recorder.of("evaluate"):
        assert set(dtypes(exchange.down_state()).values()) == {WIRE[compression]}
    assert all(line.get("refused") is None for line in run.lines())
    assert 2 * both["downlink_payload_bytes"] == single["downlink_payload_bytes"]
    assert both["uplink_payload_bytes"] == single["uplink_payload_bytes"]
    # the server reckons from what the clients had, not from what it had itself
    first, second = (run.recorder.of("train", round) for round in (1, 2))
    start = {n: v.float() for n, v in first[0].down_state().items() if not n.startswith(EXTRA)}

    def mean(name: str) -> Tensor:
        return torch.stack([e.up_state()[name].float() for e in first]).mean(dim=0)

    for name, value in start.items():
        expected = (value + mean(name)).to(WIRE[compression])
        assert torch.allclose(second[0].down_state()[name], expected, rtol=2**-7, atol=1e-7)


def test_what_top_k_left_out_comes_later(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's error is kept between rounds, and is not taken for the strategy's controls."""
    calls: list[tuple[State, State]] = []
    compress = TopK.compress

    def watch(self: TopK, state: State, start: State, error: State, rng: Any) -> Any:
        wire, left = compress(self, state, start, error, rng)
        calls.append((error, left))
        return wire, left

    monkeypatch.setattr(TopK, "compress", watch)
    run("compression=topk", "strategy=scaffold", "method=fedsa_lora")
    assert len(calls) == 6
    for (before, left), (after, _) in zip(calls[:3], calls[3:], strict=True):
        assert before == {} and left.keys() == after.keys()
        assert all(torch.equal(left[name], after[name]) for name in left)
    assert any(value.any() for value in calls[0][1].values())
    sent = run.recorder.of("train", 2)[0].up_state()
    assert calls[0][1].keys() == {name for name in sent if not name.startswith(INDICES)}
