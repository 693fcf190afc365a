"""Compression by hand, and on the wire: the dtype of every key, and its bytes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.algorithms.base import FedAvg
from fedpeft.algorithms.fedopt import FedAdam
from fedpeft.client.app import app as client_app
from fedpeft.compression.base import Compression, OfUpdate, stepped
from fedpeft.compression.largest import BITMAP, INDICES, as_bitmap, count
from fedpeft.compression.rounding import SCALES, BFloat16, Float16, Int8, Levels
from fedpeft.compression.topk import VECTOR, TopK, TopKBoth
from fedpeft.config.load import load_config
from fedpeft.engine.engine import Engine
from fedpeft.engine.plan import Job
from fedpeft.methods.base import At, Round
from fedpeft.methods.lora import LoRA
from fedpeft.seeding import generator
from fedpeft.server.broadcast import Broadcaster
from fedpeft.state import STRATEGY, State, payload_bytes, snapshot, weighted_mean
from fedpeft.wire import pack, unpack, wire_bytes
from tests.conftest import Runner, Sent, state_of

LOSSY: list[Compression] = [Float16(), BFloat16(), Int8(), TopK(), TopKBoth()]
by_class = pytest.mark.parametrize("compression", LOSSY, ids=lambda c: type(c).__name__)


def rng(number: int = 0) -> np.random.Generator:
    return generator(number, "compression", 1, 0)


def there(
    compression: Compression, state: State, start: State, error: State | None = None, n: int = 0
) -> tuple[State, State, State]:
    """Send a client's state to the server.

    Args:
        compression: encodes and decodes.
        state: the client's state after training.
        start: the client's state before training.
        error: the error that earlier rounds left on the client; null for none.
        n: seeds the rounding.

    Returns:
        The wire state as it arrives, the state that the server decodes, and the client's error.
    """
    wire, left = up(compression, state, start, error or {}, n)
    arrived = unpack(*pack(wire), len(wire))
    assert {n: v.dtype for n, v in arrived.items()} == {n: v.dtype for n, v in wire.items()}
    return arrived, compression.up.decode(arrived, start), left


def up(
    compression: Compression, state: State, start: State, error: State, n: int = 0
) -> tuple[State, State]:
    """Encode a client's state; return the wire state and the error that the client keeps."""
    if not compression.feedback:
        return compression.up.encode(state, start, rng(n)), error
    assert isinstance(compression.up, OfUpdate)
    return compression.up.encode_with_error(state, start, error, rng(n))


def down(compression: Compression, state: State) -> State:
    """Encode the server's state."""
    return compression.down.encode(state, state, rng())


def state(**values: list[float]) -> State:
    return {name: torch.tensor(value) for name, value in values.items()}


def drawn(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(30, 20, generator=generator),
        "b": 1e-3 * torch.randn(50, generator=generator),
    }


def moved(start: State) -> tuple[State, State]:
    """Add an update of a hundredth of its size to a state; return both."""
    update = {name: 0.01 * value for name, value in drawn(1).items()}
    return {name: value + update[name] for name, value in start.items()}, update


# --- by hand -------------------------------------------------------------------------------------


def test_none_is_the_state_itself() -> None:
    start = drawn(0)
    after, _ = moved(start)
    wire, decoded, error = there(Compression(), after, start)
    assert error == {}
    assert all(torch.equal(wire[n], after[n]) and torch.equal(decoded[n], after[n]) for n in after)


def test_half_floats_by_hand() -> None:
    """1 + 2^-12 lies between two float16 numbers, but the update 2^-12 is a float16 number."""
    start, after = state(a=[1.0, 1.0]), state(a=[1 + 2**-12, 1.5 + 2**-12])
    wire, decoded, _ = there(Float16(), after, start)
    assert wire["a"].dtype is torch.float16 and wire["a"].tolist() == [2**-12, 0.5]
    assert decoded["a"].tolist() == [1 + 2**-12, 1.5]
    wire, decoded, _ = there(BFloat16(), state(a=[2**-12, 1 + 2**-9]), state(a=[0.0, 0.0]))
    assert wire["a"].dtype is torch.bfloat16 and decoded["a"].tolist() == [2**-12, 1.0]


@pytest.mark.parametrize(("compression", "bits"), [(Float16(), 11), (BFloat16(), 8)])
def test_half_floats_stay_within_their_bound(compression: Compression, bits: int) -> None:
    start = drawn(0)
    after, update = moved(start)
    _, decoded, _ = there(compression, after, start)
    for name, value in update.items():
        bound = (2.0**-bits * value.abs()).clamp(min=2.0**-25) + 1e-6 * start[name].abs()
        assert ((decoded[name] - after[name]).abs() <= bound).all()
        assert not torch.equal(decoded[name], after[name])


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
        wire, decoded, _ = there(Int8(), after, start, n=n)
        assert {k: v.dtype for k, v in wire.items()} == {
            "a": torch.int8,
            "z": torch.int8,
            SCALES: torch.float32,
        }
        assert wire[SCALES].tolist() == pytest.approx([0.02, 0.0])
        assert wire["a"][0].item() == 127 and wire["z"].item() == 0
        assert decoded["a"][1].item() == pytest.approx(1 + 0.02 * wire["a"][1].item())
        seen.add(wire["a"][1].item())
    assert seen == {2, 3}


def test_int8_stays_within_one_level() -> None:
    start = drawn(0)
    after, update = moved(start)
    wire, decoded, _ = there(Int8(), after, start)
    for (name, value), scale in zip(update.items(), wire[SCALES], strict=True):
        assert scale.item() == pytest.approx(value.abs().max().item() / 127, rel=1e-2)
        assert (decoded[name] - after[name]).abs().max() <= 1.01 * scale + 1e-6


def test_stochastic_rounding_is_unbiased() -> None:
    """The mean of 4,000 draws has a standard error of at most 0.5 / sqrt(4000) = 0.008 levels."""
    levels = torch.tensor([127.0, 0.5, 0.1, -0.3, 3.75, -126.9])
    update = {"a": levels}
    total = torch.zeros_like(levels)
    for n in range(4000):
        total += Levels().decode(Levels().encode(update, update, rng(n)), update)["a"]
    torch.testing.assert_close(total / 4000, levels, rtol=0, atol=0.03)


def test_rounding_follows_from_seed_round_and_client() -> None:
    update = drawn(0)
    draws = [(0, 1, 0), (0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]
    encoded = [
        Levels().encode(update, update, generator(seed, "compression", round, client))["a"]
        for seed, round, client in draws
    ]
    assert torch.equal(encoded[0], encoded[1])
    assert not any(torch.equal(encoded[0], other) for other in encoded[2:])


def test_top_k_by_hand_over_three_rounds() -> None:
    """One of four entries is sent; the others wait and add up."""
    compression, error, server = TopK(ratio=0.25), {}, state(a=[0.0, 0.0, 0.0, 0.0])
    updates = [[1.0, -3.0, 2.0, 0.0], [1.5, 0.0, 2.0, 0.0], [1.5, 0.5, 0.0, -3.5]]
    sent = [(1, -3.0), (2, 4.0), (0, 4.0)]
    errors = [[1.0, 0.0, 2.0, 0.0], [2.5, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, -3.5]]
    for update, (index, value), left in zip(updates, sent, errors, strict=True):
        after = {"a": server["a"] + torch.tensor(update)}
        wire, server, error = there(compression, after, server, error)
        assert wire["a"].tolist() == [value] and wire[BITMAP + "a"].tolist() == [128 >> index]
        assert wire[BITMAP + "a"].dtype is torch.uint8
        assert error["a"].tolist() == left
    assert server["a"].tolist() == [4.0, -3.0, 4.0, 0.0]  # with the error, the sum of all updates


def test_top_k_of_two_dimensions_and_ties() -> None:
    start = {"m": torch.zeros(2, 3), "other": torch.zeros(1)}
    after = {"m": torch.tensor([[1.0, 2.0, 2.0], [-2.0, 0.0, 5.0]]), "other": torch.ones(1)}
    wire, decoded, _ = there(TopK(ratio=0.5), after, start)
    assert wire["m"].tolist() == [2, 2, 5] and wire[BITMAP + "m"].tolist() == [0b01100100]
    assert decoded["m"].tolist() == [[0, 2, 2], [0, 0, 5]]
    assert decoded["other"].item() == 1  # one entry at the least
    assert [count(0.1, n) for n in (1, 4, 100)] == [1, 1, 10]


def test_errors_of_parameters_that_do_not_train_wait() -> None:
    compression = TopK(ratio=0.5)
    _, _, error = there(compression, state(a=[1.0, 2.0]), state(a=[0.0, 0.0]))
    _, _, error = there(compression, state(b=[1.0, 2.0]), state(b=[0.0, 0.0]), error)
    assert {n: v.tolist() for n, v in error.items()} == {"a": [1.0, 0.0], "b": [1.0, 0.0]}


@pytest.mark.parametrize(
    ("numel", "sent", "bitmap"),
    [(8, 1, True), (24, 1, True), (25, 1, False), (32, 1, False), (32, 2, True), (320, 10, False)]
    + [(320, 11, True), (2**31, 2**20, False), (2**31 + 1, 2**20, True)],
)
def test_a_bitmap_where_it_takes_fewer_bytes(numel: int, sent: int, bitmap: bool) -> None:
    """A bitmap takes ceil(numel / 8) bytes, indices 4 each; an int32 ends below 2^31."""
    assert as_bitmap(numel, sent) is bitmap


@pytest.mark.parametrize("compression", [TopK(ratio=0.02), TopKBoth(density_up=0.02)])
def test_few_of_many_go_with_indices(compression: Compression) -> None:
    after = {"a": torch.zeros(10, 10)}
    after["a"][3, 7], after["a"][9, 9] = -2.0, 1.0
    wire, decoded, _ = there(compression, after, {"a": torch.zeros(10, 10)})
    (places,) = (value for name, value in wire.items() if name.startswith(INDICES))
    assert places.tolist() == [37, 99] and places.dtype is torch.int32
    assert torch.equal(decoded["a"], after["a"]) and payload_bytes(wire) == 2 * 8


# The server's values by name: A 3 -1 0.5 2, B 0 0, head -2 0.1. Half of eight is four.
SERVER = {"lora_B": [0.0, 0.0], "lora_A": [[3.0, -1.0], [0.5, 2.0]], "zhead": [-2.0, 0.1]}
HALVES = TopKBoth(density_down=0.5, density_up=0.25)


def test_top_k_down_by_hand() -> None:
    """One mask covers all tensors: 3, -1, 2 and -2 are sent, whatever the order of names."""
    values = state(**SERVER)
    wire = down(HALVES, values)
    assert dtypes(wire) == {VECTOR: torch.float32, BITMAP + VECTOR: torch.uint8}
    assert wire[VECTOR].tolist() == [3, -1, 2, -2]
    assert wire[BITMAP + VECTOR].tolist() == [0b11010010]
    expected = dict(reversed(values.items()))
    decoded = HALVES.down.decode(unpack(*pack(wire), len(wire)), expected)
    assert list(decoded) == list(expected)
    assert {name: value.tolist() for name, value in decoded.items()} == {
        "lora_A": [[3, -1], [0, 2]],
        "lora_B": [0, 0],
        "zhead": [-2, 0],
    }


@pytest.mark.parametrize("method", ["lora", "rolora"])
def test_the_server_measures_what_clients_get(method: str, opened: Callable[..., Engine]) -> None:
    """All that the next round sends is one vector, also what the server has not set yet."""
    engine = opened(f"method={method}", "compression=topk_both", "num_rounds=3")
    down = Broadcaster(engine, "")
    for round in range(3):
        sent = down.broadcast(round + 1).received
        measured = engine.replica.received(down.state, round)
        assert measured.keys() == sent.keys()
        assert all(torch.equal(value, sent[name]) for name, value in measured.items())
        dropped = any(not torch.equal(v, down.values[name]) for name, v in measured.items())
        assert dropped or round == 0  # then RoLoRA sends zeros, and the head whole
        names = engine.replica.roles.shared(round + 1)
        down.update({n: torch.randn(down.values[n].shape) for n in names})


def test_of_equals_the_earlier_entry_goes_down() -> None:
    """In round 1 B is zero: A and the head are sent, and B's first entries if room is left."""
    values = {"lora_A": [1.0, -1.0, 1.0], "lora_B": [0.0, 0.0, 0.0], "zhead": [1.0, 0.0]}
    for share, sent in ((0.25, 0b11000000), (0.5, 0b11100010), (0.625, 0b11110010)):
        wire = down(TopKBoth(density_down=share), state(**values))
        assert wire[BITMAP + VECTOR].tolist() == [sent]
        assert len(wire[VECTOR]) == 8 * share
    assert len(down(TopKBoth(density_down=0.01), state(**values))[VECTOR]) == 1


def test_top_k_up_by_hand() -> None:
    """A quarter of the update's eight entries is sent; the client does not keep the rest."""
    start = HALVES.down.decode(down(HALVES, state(**SERVER)), state(**SERVER))
    after = {name: value.clone() for name, value in start.items()}
    after["lora_A"] += torch.tensor([[0.25, 0.0], [-0.5, 0.125]])
    after["lora_B"] += torch.tensor([0.0, 1.0])
    wire, decoded, error = there(HALVES, after, start)
    assert wire[VECTOR].tolist() == [-0.5, 1.0]
    assert wire[BITMAP + VECTOR].tolist() == [0b00100100]
    assert decoded["lora_A"].tolist() == [[3, -1], [-0.5, 2]]
    assert decoded["lora_B"].tolist() == [0, 1] and decoded["zhead"].tolist() == [-2, 0]
    assert error == {}
    wire, _, error = there(HALVES, after, start, {"lora_A": torch.full((2, 2), 9.0)})
    assert wire[VECTOR].tolist() == [-0.5, 1.0] and error["lora_A"].tolist() == [[9, 9], [9, 9]]


def test_a_round_of_flasc_by_hand() -> None:
    """Adam's step by hand on the server's dense values, with client weights 3/4 and 1/4.

    The mean step is d: -0.5 * 3/4 = -0.375 on A's third entry, 0.25 on its first, 1 on B's second.
    Adam's first step is 0.1 d / (sqrt(v) + 0.001), here times 0.01; v starts at 0.001^2 and takes
    a hundredth of d^2. A's third entry was 0.5 on the
    server and 0 on the clients. An entry without a step stays as it was, sent or not.
    """
    values = state(**SERVER)
    before = values | HALVES.down.decode(down(HALVES, values), values)
    replies = []
    for update in ({"lora_A": [[0.0, 0.0], [-0.5, 0.0]]}, {"lora_A": [[1.0, 0.0], [0.0, 0.0]]}):
        after = {name: value.clone() for name, value in before.items()}
        after["lora_A"] += torch.tensor(update["lora_A"])
        after["lora_B"] += torch.tensor([0.0, 1.0])
        replies.append(HALVES.up.decode(HALVES.up.encode(after, before, rng()), before))
    mean, weights = weighted_mean(replies, [0.75, 0.25]), [0.75, 0.25]
    round = Round(1, [At(1, 0), At(1, 1)], replies, weights, before, [1, 1], [{}, {}])
    assert not HALVES.down.exact
    result = stepped(FedAdam().server(mean, round, {}), before, values)

    def step(d: float) -> float:
        return 0.01 * 0.1 * d / (math.sqrt(0.99 * 0.001**2 + 0.01 * d**2) + 0.001)

    expected = {
        "lora_A": [[3 + step(0.25), -1], [0.5 + step(-0.375), 2]],
        "lora_B": [0, step(1)],
        "zhead": [-2, 0.1],
    }
    assert {n: v.dtype for n, v in result.items()} == dict.fromkeys(expected, torch.float32)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], torch.tensor(value), rtol=1e-6, atol=1e-7)
    assert torch.equal(result["zhead"], values["zhead"])  # 0.1 was never sent down


def test_only_codecs_that_also_compress_down_are_inexact_there() -> None:
    """An exact codec sends the server's values, so the server takes no step from a lossy copy."""
    after, other = state(a=[1.5]), state(a=[7.0])
    for compression in (Compression(), Float16(), BFloat16(), Int8(), TopK()):
        assert compression.down.exact
        assert compression.down.encode(after, other, rng()) is after
        assert compression.down.decode(after, other) is after
    for lossy in (Float16(both=True), BFloat16(both=True), TopKBoth()):
        assert not lossy.down.exact


def test_steps_smaller_than_bfloat16_add_up() -> None:
    """bfloat16 has steps of 2^-7 above 1, so 2^-9 would be rounded off in every round."""
    both, values = BFloat16(both=True), state(a=[1.0])
    for _ in range(8):
        before = both.down.decode(down(both, values), values)
        values = stepped({"a": before["a"] + 2**-9}, before, values)
    assert values["a"].item() == 1 + 2**-6


def test_all_entries_are_the_state_itself() -> None:
    both, start = TopKBoth(density_down=1.0, density_up=1.0), drawn(0)
    after, _ = moved(start)
    wire = down(both, start)
    assert len(wire[VECTOR]) == 650 and len(wire[BITMAP + VECTOR]) == 82
    received = both.down.decode(wire, start)
    _, decoded, _ = there(both, after, start)
    for name, value in start.items():
        assert torch.equal(received[name], value)
        torch.testing.assert_close(decoded[name], after[name], rtol=1e-6, atol=0)


def test_extras_go_whole_beside_the_vector() -> None:
    start = {"a": torch.zeros(4), STRATEGY + "a": torch.zeros(4)}
    after = {"a": torch.tensor([4.0, 3.0, 2.0, 1.0]), STRATEGY + "a": torch.full((4,), 99.0)}
    wire, decoded, _ = there(HALVES, after, start)
    assert wire[VECTOR].tolist() == [4] and wire[STRATEGY + "a"].tolist() == [99] * 4
    assert decoded["a"].tolist() == [4, 0, 0, 0] and decoded[STRATEGY + "a"].tolist() == [99] * 4
    sent = down(HALVES, after)
    assert sent[VECTOR].tolist() == [4, 3] and sent[STRATEGY + "a"].tolist() == [99] * 4
    received = HALVES.down.decode(unpack(*pack(sent), len(sent)), after)
    assert received["a"].tolist() == [4, 3, 0, 0] and received[STRATEGY + "a"].tolist() == [99] * 4


@by_class
def test_nothing_to_send_and_nothing_that_moved(compression: Compression) -> None:
    assert there(compression, {}, {})[:2] == ({}, {})
    start = drawn(0)
    decoded = there(compression, start, start)[1]
    assert all(torch.equal(decoded[n], start[n]) for n in start)


@by_class
def test_dtypes_of_parameters_are_kept(compression: Compression) -> None:
    start = {"a": torch.ones(8, dtype=torch.bfloat16)}
    decoded = there(compression, {"a": start["a"] * 2}, start)[1]
    assert decoded["a"].dtype is torch.bfloat16 and decoded["a"].max() == 2


# --- messages that fedpeft's clients never send ---------------------------------------------------

START = {"a": torch.zeros(2, 5)}


def bits(*bytes: int) -> Tensor:
    return torch.tensor(bytes, dtype=torch.uint8)


BAD: list[tuple[Compression, State, str]] = [
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
    (TopK(), {"a": torch.ones(1)}, f"keys are missing, first {BITMAP}a"),
    (TopK(), {"a": torch.ones(1), "x": torch.ones(1)}, "keys are missing"),
    (TopK(ratio=0.2), {"a": torch.ones(2), BITMAP + "a": torch.tensor([3, 10])}, r"torch.int64"),
    (TopK(ratio=0.2), {"a": torch.ones(3), BITMAP + "a": bits(3, 0)}, r"a is .* \(3,\), .*\(2,\)"),
    (TopK(ratio=0.2), {"a": torch.ones(2), BITMAP + "a": bits(3)}, r"is .* \(1,\), .*\(2,\)"),
    (
        TopK(ratio=0.2),
        {"a": torch.ones(2), INDICES + "a": torch.tensor([1, 2], dtype=torch.int32)},
        f"keys are missing, first {BITMAP}a",
    ),
    *(
        (
            TopKBoth(density_up=0.2),
            {VECTOR: torch.tensor([1.0, value]), BITMAP + VECTOR: bits(3, 0)},
            f"{VECTOR} holds values that are not finite",
        )
        for value in (float("nan"), float("inf"))
    ),
    (TopKBoth(), {"a": torch.zeros(2, 5)}, f"2 keys are missing, first {BITMAP}{VECTOR}"),
    (
        TopKBoth(density_up=0.2),
        {VECTOR: torch.ones(2), BITMAP + VECTOR: bits(3, 0), STRATEGY + "a": torch.ones(2, 5)},
        f"1 keys are unknown, first {STRATEGY}a",
    ),
]


@pytest.mark.parametrize(("compression", "wire", "message"), BAD)
def test_unusable_messages(compression: Compression, wire: State, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compression.up.decode(wire, START)


# Of ten entries, 3 and 9 are set. Entry 9 is the second bit of the second byte, whose last six bits
# are no entries.
BITMAPS = [((0x10, 0x00), 1, 0), ((0x18, 0x40), 3, 0), ((0x10, 0x20), 1, 1), ((0x10, 0x41), 2, 1)]


@pytest.mark.parametrize(("bitmap", "within", "beyond"), BITMAPS)
@pytest.mark.parametrize("compression", [TopK(ratio=0.2), TopKBoth(density_up=0.2)])
def test_a_bitmap_has_as_many_bits_as_values(
    compression: Compression, bitmap: tuple[int, int], within: int, beyond: int
) -> None:
    name = "a" if isinstance(compression, TopK) else VECTOR
    values = {name: torch.tensor([1.0, 2.0])}
    right = compression.up.decode(values | {BITMAP + name: bits(0x10, 0x40)}, START)
    assert right["a"].reshape(-1).tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 2]
    with pytest.raises(ValueError) as refused:
        compression.up.decode(values | {BITMAP + name: bits(*bitmap)}, START)
    assert str(refused.value) == (
        f"the bitmap of {name} must have 2 of its first 10 bits set and no bit beyond, "
        f"got {within} and {beyond}"
    )


@pytest.mark.parametrize("wrong", [[3, 100], [-1, 3], [3, 3], [4, 3]])
@pytest.mark.parametrize("compression", [TopK(ratio=0.02), TopKBoth(density_up=0.02)])
def test_indices_rise_within_the_tensor(compression: Compression, wrong: list[int]) -> None:
    """Two of a hundred entries take eight bytes as indices and thirteen as a bitmap."""
    name = "a" if isinstance(compression, TopK) else VECTOR
    wire = {name: torch.ones(2), INDICES + name: torch.tensor(wrong, dtype=torch.int32)}
    with pytest.raises(ValueError) as refused:
        compression.up.decode(wire, {"a": torch.zeros(10, 10)})
    assert str(refused.value) == f"indices of {name} must rise within 0..99, got {wrong}"


@pytest.mark.parametrize(
    ("compression", "name", "sent", "numel"),
    [("topk", "classifier.bias", 1, 4), ("topk_both", VECTOR, 545, 2180)],
)
def test_an_unusable_reply_is_left_out(
    compression: str, name: str, sent: int, numel: int, run: Runner
) -> None:
    def answer(message: Any, context: Any) -> Any:
        reply = client_app(message=message, context=context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 2:
            wire = state_of(reply)
            wire[BITMAP + name] = torch.full_like(wire[BITMAP + name], 255)
            reply.content["arrays"], index = pack(wire)
            reply.content.config_records["config"]["index"] = index
        return reply

    run(f"compression={compression}", "method.rank=8", "num_rounds=1", answer=answer)
    assert run.lines()[1]["refused"] == {
        "2": f"the bitmap of {name} must have {sent} of its first {numel} bits set and no bit "
        f"beyond, got {numel} and {-numel % 8}"
    }
    assert all(torch.isfinite(value).all() for value in run.saved().values())


@pytest.mark.parametrize(
    ("compression", "field"),
    [("topk", "ratio"), ("topk_both", "density_down"), ("topk_both", "density_up")],
)
@pytest.mark.parametrize("value", ["0.0", "1.5", "-0.25", "nan"])
def test_values_outside_their_rule(compression: str, field: str, value: str) -> None:
    with pytest.raises(ValueError) as refused:
        load_config(f"compression={compression} compression.{field}={value}")
    assert str(refused.value) == f"compression.{field} must be in (0, 1], got {value}"


# --- on the wire ---------------------------------------------------------------------------------

METHODS = ["lora", "fedsa_lora", "fedtt_plus"]
WIRE = {
    "none": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "topk": torch.float32,
    "topk_both": torch.float32,
}


def dtypes(wire: State) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in wire.items()}


def beside(name: str) -> torch.dtype | None:
    """Return the dtype of what is sent beside the parameters; null for a parameter."""
    if name == SCALES:
        return torch.float32
    return torch.uint8 if name.startswith(BITMAP) else None


@pytest.mark.matrix
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
        total += sum(array_bytes(e) for e in sent)
        for exchange in sent:
            for name, dtype in dtypes(exchange.up_state()).items():
                assert dtype is (beside(name) or WIRE[compression])
            for name, dtype in dtypes(exchange.down_state()).items():
                assert dtype is (beside(name) or torch.float32)
    numbers = 3 * sum(summary["parameters"]["sent_up"])  # three clients, two rounds
    assert summary["bytes"]["uplink_payload_bytes"] == total
    # fedtt_plus has many small tensors: a scale, or one entry at the least, weighs more there
    bit = 1 / 32
    sparse = {"topk": 0.1 + bit, "topk_both": 0.25 + bit}
    share = ({"none": 1.0, "float16": 0.5, "bfloat16": 0.5, "int8": 0.25} | sparse)[compression]
    slack = 1.0 if share >= 0.5 else 1.1
    assert share <= total / (4 * numbers) * 1.0001 + 0.01 and total <= slack * share * 4 * numbers


def array_bytes(exchange: Sent) -> int:
    """Count the bytes of the arrays in a reply."""
    return sum(a.numpy().nbytes for a in exchange.up.content.array_records["arrays"].values())


@pytest.mark.parametrize("compression", [c for c in WIRE if c not in ("none", "topk_both")])
def test_the_next_round_sends_down_the_mean_of_what_went_up(compression: str, run: Runner) -> None:
    """The next round's state is the mean of start + update, read from the messages."""
    run(f"compression={compression}", "strategy.weights=uniform", "evaluation.clients=never")
    first, second = (run.recorder.of("train", round) for round in (1, 2))
    algorithm: dict[str, Compression] = {
        "float16": Float16(),
        "bfloat16": BFloat16(),
        "int8": Int8(),
        "topk": TopK(),
    }
    start = first[0].down_state()
    codec = algorithm[compression].up
    assert isinstance(codec, OfUpdate)
    updates = [codec.inner.decode(e.up_state(), start) for e in first]
    for name, value in second[0].down_state().items():
        mean = torch.stack([update[name] for update in updates]).mean(dim=0)
        torch.testing.assert_close(value, start[name] + mean, rtol=1e-5, atol=1e-6)
    assert any(value.any() for value in updates[0].values())


def test_int8_of_two_runs_is_equal(run: Runner) -> None:
    shas = [run("compression=int8", f"seed={s}")["shared_state_sha256"] for s in (0, 0, 1)]
    assert shas[0] == shas[1] != shas[2]


@pytest.mark.parametrize("compression", ["float16", "bfloat16"])
def test_both_ways(compression: str, run: Runner, opened: Callable[..., Engine]) -> None:
    common = [f"compression={compression}", "strategy=scaffold", "evaluation.clients=always"]
    common += ["optimizer.name=sgd"]
    single, both = run(*common)["bytes"], run(*common, "compression.both=true")["bytes"]
    for exchange in run.recorder.of("train") + run.recorder.of("evaluate"):
        assert set(dtypes(exchange.down_state()).values()) == {WIRE[compression]}
    assert all(line.get("refused") is None for line in run.lines())
    assert 2 * both["downlink_payload_bytes"] == single["downlink_payload_bytes"]
    assert both["uplink_payload_bytes"] == single["uplink_payload_bytes"]
    # the server adds the clients' mean step to its own exact values
    first, second = (run.recorder.of("train", round) for round in (1, 2))
    names = [name for name in first[0].down_state() if not name.startswith(STRATEGY)]
    initial = opened(*common).replica.initial

    def mean(name: str) -> Tensor:
        return torch.stack([e.up_state()[name].float() for e in first]).mean(dim=0)

    for name in names:
        expected = (initial[name] + mean(name)).to(WIRE[compression])
        assert torch.allclose(second[0].down_state()[name], expected, rtol=2**-8, atol=1e-7)


def test_what_top_k_left_out_comes_later(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client keeps its error between rounds, apart from the strategy's controls."""
    calls: list[tuple[State, State]] = []
    encode = OfUpdate.encode_with_error

    def watch(self: OfUpdate, state: State, start: State, error: State, rng: Any) -> Any:
        wire, left = encode(self, state, start, error, rng)
        calls.append((error, left))
        return wire, left

    monkeypatch.setattr(OfUpdate, "encode_with_error", watch)
    run("compression=topk", "strategy=scaffold", "optimizer.name=sgd", "method=fedsa_lora")
    assert len(calls) == 6
    for (before, left), (after, _) in zip(calls[:3], calls[3:], strict=True):
        assert before == {} and left.keys() == after.keys()
        assert all(torch.equal(left[name], after[name]) for name in left)
    assert any(value.any() for value in calls[0][1].values())
    sent = run.recorder.of("train", 2)[0].up_state()
    assert calls[0][1].keys() == {name for name in sent if not name.startswith(BITMAP)}


# --- top-k both ways, in whole runs --------------------------------------------------------------

FLASC = ["method=flasc", "method.rank=8"]
N = 2 * 2 * 8 * (32 + 32) + 32 * 4 + 4  # LoRA of rank 8 on q and v of two layers, and the head
K = 545  # a quarter of 2,180
SPARSE = 4 * K + 273  # bytes: values, and a bit for each of 2,180 entries


def vector(values: State) -> np.ndarray:
    """Return all numbers of a state in the order of names."""
    return np.concatenate([values[name].double().numpy().ravel() for name in sorted(values)])


def unmasked(wire: State, numel: int) -> np.ndarray:
    """Return a message's vector with zeros where nothing was sent."""
    full = np.zeros(numel)
    full[np.unpackbits(wire[BITMAP + VECTOR].numpy())[:numel] == 1] = wire[VECTOR].numpy()
    return full


def largest(values: np.ndarray, sent: int) -> np.ndarray:
    """Set all but the ``sent`` values of the largest magnitude to zero."""
    chosen = np.argsort(-np.abs(values), kind="stable")[:sent]
    return np.where(np.isin(np.arange(len(values)), chosen), values, 0.0)


def mean_update(run: Runner, round: int) -> np.ndarray:
    """Average the updates that were sent up, weighted by examples."""
    sent = run.recorder.of("train", round)
    rows = [e.up.content.metric_records["metrics"]["num-examples"] for e in sent]
    return np.average([unmasked(e.up_state(), N) for e in sent], axis=0, weights=rows)


def test_two_rounds_of_flasc_by_hand(run: Runner, opened: Callable[..., Engine]) -> None:
    """The server sends the top of P, clients the top of their updates; P takes Adam's step."""
    start = vector(opened(*FLASC).replica.initial)
    assert len(start) == N
    ends = []
    for rounds in (1, 2):
        summary = run(*FLASC, f"num_rounds={rounds}", "evaluation.clients=always")
        assert summary["refused"] == {} and summary["method"] == "LoRA"
        ends.append(vector(run.saved()))
    m, v, known = np.zeros(N), np.full(N, 1e-3**2), np.zeros(N, dtype=bool)
    for round, before, after in ((1, start, ends[0]), (2, ends[0], ends[1])):
        for exchange in run.recorder.of("train", round):
            for wire in (exchange.down_state(), exchange.up_state()):
                assert dtypes(wire) == {VECTOR: torch.float32, BITMAP + VECTOR: torch.uint8}
                assert len(wire[VECTOR]) == K and payload_bytes(wire) == SPARSE
                known |= unmasked(wire, N) != 0
            assert np.array_equal(unmasked(exchange.down_state(), N), largest(before, K))
        delta = mean_update(run, round)
        m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta**2
        step = 0.01 * m / (np.sqrt(v) + 1e-3)
        np.testing.assert_allclose(after, before + step, rtol=1e-5, atol=1e-6)
        line = run.lines()[round]
        assert line["uplink_payload_bytes"] == line["downlink_payload_bytes"] == 3 * SPARSE
        for exchange in run.recorder.of("evaluate", round + 1):  # the next round's start
            assert np.array_equal(unmasked(exchange.down_state(), N), largest(after, K))
    never = ~known & (start != 0)
    assert never.sum() > 100 and np.array_equal(ends[1][never], start[never])


def test_clients_send_up_the_top_of_their_update(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every entry trains, from the sparse start; B's zeros are not frozen."""
    seen: list[np.ndarray] = []
    train_client = Engine.train_client

    def watch(engine: Engine, job: Job) -> Any:
        result = train_client(engine, job)
        seen.append(vector(job.start))
        seen.append(vector({n: value - job.start[n] for n, value in result.after.items()}))
        return result

    monkeypatch.setattr(Engine, "train_client", watch)
    run(*FLASC)
    for exchange, start, update in zip(
        run.recorder.of("train"), seen[::2], seen[1::2], strict=True
    ):
        assert np.array_equal(start, unmasked(exchange.down_state(), N))
        assert np.array_equal(largest(update, K), unmasked(exchange.up_state(), N))
        assert (update != 0).sum() > 0.9 * N


def test_the_bytes_of_both_ways(run: Runner) -> None:
    """Whole messages, not only their payloads, become smaller."""
    common = ["method.rank=8", "evaluation.clients=never"]
    dense = run("method=lora", *common)["bytes"]
    sparse = run(*FLASC, *common)["bytes"]
    messages = 2 * 3
    for way in ("up", "down"):
        assert dense[f"{way}link_payload_bytes"] == messages * 4 * N
        assert sparse[f"{way}link_payload_bytes"] == messages * SPARSE
        saved = dense[f"{way}link_bytes"] - sparse[f"{way}link_bytes"]
        assert abs(saved - messages * (4 * N - SPARSE)) < messages * 500
        assert sparse[f"{way}link_bytes"] < 0.5 * dense[f"{way}link_bytes"]


def test_densities_differ_by_way(run: Runner) -> None:
    run(*FLASC, "compression.density_down=0.02", "compression.density_up=1", "num_rounds=1")
    (first, *_) = run.recorder.of("train")
    down, up = first.down_state(), first.up_state()
    assert down.keys() == {VECTOR, INDICES + VECTOR} and payload_bytes(down) == 44 * 8
    assert up.keys() == {VECTOR, BITMAP + VECTOR} and payload_bytes(up) == 4 * N + 273


def test_two_runs_of_flasc_are_equal(run: Runner) -> None:
    shas = [run(*FLASC, f"seed={s}")["shared_state_sha256"] for s in (0, 0, 1)]
    assert shas[0] == shas[1] != shas[2]


@pytest.mark.parametrize("method", ["fedsa_lora", "ffa_lora"])
def test_personal_and_frozen_parameters_are_whole(
    method: str, run: Runner, opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters that are not sent start at their initial value or at the client's last one."""
    shared = opened(f"method={method}").replica.shared(1)
    last: dict[int, State] = {}
    train_client = Engine.train_client

    def watch(engine: Engine, job: Job) -> Any:
        model, initial = engine.replica.model, engine.replica.initial
        frozen = [name for name, _ in model.named_parameters() if name not in initial]
        before = snapshot(model, frozen) | {n: v for n, v in job.start.items() if n not in shared}
        for name, value in before.items():
            expected = last.get(job.client, initial)
            assert name not in expected or torch.equal(value, expected[name])
        result = train_client(engine, job)
        last[job.client] = snapshot(model, frozen) | result.after
        assert all(torch.equal(last[job.client][name], before[name]) for name in frozen)
        return result

    monkeypatch.setattr(Engine, "train_client", watch)
    assert run(f"method={method}", "compression=topk_both")["refused"] == {}
    numel = sum(value.numel() for value in shared.values())
    for exchange in run.recorder.of("train"):
        for wire in (exchange.down_state(), exchange.up_state()):
            assert wire.keys() == {VECTOR, BITMAP + VECTOR}
            assert len(wire[VECTOR]) == round(numel / 4)
            assert len(wire[BITMAP + VECTOR]) == -(-numel // 8)
    assert run.saved().keys() == shared.keys()


def test_parameters_that_do_not_train_stay_whole_on_the_server(run: Runner) -> None:
    """RoLoRA trains B, then A: in round 2 B is sent down in part, and the server's B stays."""
    ends = []
    for rounds in (1, 2):
        summary = run("method=rolora", "compression=topk_both", f"num_rounds={rounds}")
        assert summary["refused"] == {}
        ends.append(run.saved())
    b = [name for name in ends[0] if ".lora_B." in name]
    assert len(b) == 4
    assert all(ends[0][name].any() and torch.equal(ends[0][name], ends[1][name]) for name in b)


def test_scaffold_with_top_k_both_ways(run: Runner) -> None:
    """Controls are sent whole; a client's control covers all that it trained, sent or not."""
    overrides = ["method=lora", "method.rank=8", "compression=topk_both", "strategy=scaffold"]
    overrides += ["optimizer.name=sgd", "optimizer.max_grad_norm=null", "lr=0.01"]
    assert run(*overrides)["refused"] == {}
    control = np.zeros(N)
    for round in (1, 2):
        changes = []
        for exchange in run.recorder.of("train", round):
            down, up = exchange.down_state(), exchange.up_state()
            names = [name for name in sorted(up) if name.startswith(STRATEGY)]
            assert names == [name for name in sorted(down) if name.startswith(STRATEGY)]
            assert payload_bytes(down) == payload_bytes(up) == SPARSE + 4 * N
            sent = vector({name: down[name] for name in names})
            np.testing.assert_allclose(sent, control, rtol=1e-5, atol=1e-7)
            changes.append(vector({name: up[name] for name in names}))
            update = unmasked(up, N)
            change = -sent - update / (2 * 0.01)  # two steps
            np.testing.assert_allclose(
                changes[-1][update != 0], change[update != 0], rtol=1e-4, atol=1e-5
            )
            assert (changes[-1] + sent != 0).sum() > 0.9 * N
        control = control + np.mean(changes, axis=0)


def test_every_strategy_takes_its_step_from_what_clients_got(run: Runner) -> None:
    """With FedAvg, P takes the mean update itself."""
    run(*FLASC, "strategy=fedavg", "num_rounds=1")
    first = vector(run.saved())
    run(*FLASC, "strategy=fedavg")
    np.testing.assert_allclose(
        vector(run.saved()), first + mean_update(run, 2), rtol=1e-5, atol=1e-7
    )


def test_nothing_is_shared_and_nothing_sent(run: Runner) -> None:
    summary = run(*FLASC, "strategy=local_only", "evaluation.clients=never")
    assert summary["refused"] == {} and summary["bytes"]["uplink_payload_bytes"] == 0


@pytest.mark.parametrize(
    ("method", "name"), [("flexlora", "FlexLoRA"), ("hetlora", "HetLoRA"), ("slora", "SLoRA")]
)
def test_a_method_with_a_rule_of_its_own_is_refused(
    method: str, name: str, opened: Callable[..., Engine]
) -> None:
    opened(f"method={method}", "compression=int8")
    with pytest.raises(ValueError) as refused:
        opened(f"method={method}", "compression=topk_both")
    assert str(refused.value) == (
        "compression TopKBoth adds the mean's step to values that clients got in part, but method "
        f"{name} aggregates by a rule of its own: use compression=int8 or none"
    )
    with pytest.raises(ValueError) as refused:
        opened(f"method={method}", "compression=topk")
    assert str(refused.value) == (
        "compression TopK adds what a client did not send to its next update, but method "
        f"{name} may have set the parameters anew by a rule of its own: use compression=int8 or "
        "none"
    )


def test_clients_with_blocks_are_refused(
    opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened("compression=topk_both")
    monkeypatch.setattr(
        LoRA, "block", lambda self, name, shape, at: (1, *shape[1:]) if at.client else shape
    )
    opened("compression=topk")
    with pytest.raises(ValueError) as refused:
        opened("compression=topk_both")
    assert str(refused.value) == (
        "compression TopKBoth takes the same vector for every client, but with method LoRA some "
        "train only a block: use equal ranks, or compression=topk or none"
    )


# --- method=flasc --------------------------------------------------------------------------------


def test_flasc_is_lora_with_two_groups_chosen() -> None:
    flasc, lora = load_config("method=flasc"), load_config("method=lora")
    assert (flasc.method, flasc.lr) == (lora.method, lora.lr)
    assert flasc.strategy == FedAdam(server_lr=0.01, tau=1e-3)
    assert flasc.compression == TopKBoth(density_down=0.25, density_up=0.25)
    assert (lora.strategy, lora.compression) == (FedAvg(), Compression())


@pytest.mark.parametrize("place", [0, 1])
def test_overrides_before_and_after_flasc_win_over_it(place: int) -> None:
    overrides = ["strategy=fedavg", "compression=topk"]
    overrides.insert(2 * place, "method=flasc")
    config = load_config(overrides)
    assert (config.strategy, config.compression) == (FedAvg(), TopK())
    config = load_config(["compression.density_up=0.5", "method=flasc", "strategy.server_lr=0.1"])
    assert config.compression == TopKBoth(density_up=0.5)
    assert config.strategy == FedAdam(server_lr=0.1)


def test_flasc_on_the_command_line(fedpeft: Callable[..., str], base: list[str]) -> None:
    rest = [o for o in base if not o.startswith("method=")]
    params = fedpeft("params", "--json", "model=roberta_base", "data=sst2", "method=flasc")
    assert json.loads(params)["flasc"]["trained"] == [887_042, 887_042]
    comparison = json.loads(fedpeft("compare", "--json", "--methods", "lora,flasc", *rest))
    assert {row["method"] for row in comparison["rows"]} == {"lora", "flasc"}
    summary = json.loads(fedpeft("run", "--json", "method=flasc", *rest))
    text = (Path(summary["run_dir"]) / "config.yaml").read_text()
    assert "fedpeft.algorithms.fedopt.FedAdam" in text
    assert "fedpeft.compression.topk.TopKBoth" in text
    assert summary["bytes"]["uplink_payload_bytes"] == 2 * 3 * SPARSE
