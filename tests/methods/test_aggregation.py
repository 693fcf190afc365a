"""Means by hand, and which methods' averages are exact, measured at the layers' outputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedpeft.methods.base import At, Method
from fedpeft.methods.fed_sb import FedSB
from fedpeft.methods.federa import FeDeRA
from fedpeft.methods.fedex_lora import FedExLoRA
from fedpeft.methods.fedrot_lora import FedRotLoRA
from fedpeft.methods.fedsvd import FedSVD
from fedpeft.methods.fedtt import FedTT, FedTTPlus
from fedpeft.methods.flexlora import FlexLoRA
from fedpeft.methods.flora import FLoRA
from fedpeft.methods.hetlora import HetLoRA
from fedpeft.methods.lora import FedSALoRA, FFALoRA, LoRA
from fedpeft.methods.ravan import Ravan
from fedpeft.methods.rolora import RoLoRA
from fedpeft.methods.scl import SCL
from fedpeft.methods.slora import SLoRA
from fedpeft.nn.cores import CoreAdapter
from fedpeft.nn.scl import CompressedProjection
from fedpeft.nn.tensor_train import TensorTrain
from fedpeft.seeding import torch_seed
from fedpeft.server.diagnostics import interference
from fedpeft.state import Role, State, load_state, snapshot, weighted_mean
from tests.expected.architectures import tiny
from tests.methods.rounds import aggregated

WEIGHTS = [0.5, 0.3, 0.2]
LAYERS = (LoraLayer, CompressedProjection, TensorTrain, CoreAdapter)


def test_weighted_mean_by_hand() -> None:
    states = [
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[10.0]])},
        {"a": torch.tensor([3.0, -2.0]), "b": torch.tensor([[20.0]])},
        {"a": torch.tensor([5.0, 4.0]), "b": torch.tensor([[-40.0]])},
    ]
    mean = weighted_mean(states, WEIGHTS)
    assert list(mean) == ["a", "b"]
    # 0.5 * 1 + 0.3 * 3 + 0.2 * 5 = 2.4;  1 - 0.6 + 0.8 = 1.2;  5 + 6 - 8 = 3
    torch.testing.assert_close(mean["a"], torch.tensor([2.4, 1.2]))
    torch.testing.assert_close(mean["b"], torch.tensor([[3.0]]))
    assert states[0]["a"].tolist() == [1.0, 2.0]


def test_the_mean_goes_by_name_not_by_order() -> None:
    first = {"a": torch.tensor([1.0]), "b": torch.tensor([100.0])}
    second = {"b": torch.tensor([300.0]), "a": torch.tensor([3.0])}
    mean = weighted_mean([first, second], [0.25, 0.75])
    assert (mean["a"].item(), mean["b"].item()) == (2.5, 250.0)


def test_one_state_comes_back_as_it_is() -> None:
    state = {"a": torch.tensor([0.1, 1e-30, -7.3])}
    mean = weighted_mean([state], [1.0])
    assert torch.equal(mean["a"], state["a"])
    assert mean["a"].data_ptr() != state["a"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_mean_keeps_each_dtype(dtype: torch.dtype) -> None:
    states: list[State] = [
        {"a": torch.tensor([v], dtype=dtype), "b": torch.tensor([v])} for v in (1.0, 5.0)
    ]
    mean = weighted_mean(states, [0.25, 0.75])
    assert (mean["a"].dtype, mean["b"].dtype) == (dtype, torch.float32)
    assert mean["a"].item() == 4.0


def test_the_mean_accumulates_in_float64() -> None:
    """2^23 + 0.5 is not a float32: summed in float32, the 1 would be lost."""
    states = [{"a": torch.tensor([v])} for v in (2.0**25, 1.0, -(2.0**25))]
    assert weighted_mean(states, [0.25, 0.5, 0.25])["a"].item() == 0.5


@pytest.mark.parametrize(
    ("keys", "weights", "message"),
    [
        ([], [], "need one weight per state, got 0 and 0"),
        (["a", "a"], [1.0], "need one weight per state, got 2 and 1"),
        (["a"], [0.5, 0.5], "need one weight per state, got 1 and 2"),
        (["a", "b"], [0.5, 0.5], "equal keys"),
        (["a", "ab"], [0.5, 0.5], "equal keys"),
        (["ab", "a"], [0.5, 0.5], "equal keys"),
    ],
)
def test_states_that_cannot_be_averaged(
    keys: list[str], weights: list[float], message: str
) -> None:
    states = [{key: torch.ones(1) for key in names} for names in keys]
    with pytest.raises(ValueError, match=message):
        weighted_mean(states, weights)


@dataclass
class Aggregation:
    """One aggregation: the model, the state before, the clients' states and their aggregate."""

    method: Method
    model: nn.Module
    before: State
    states: list[State]
    after: State

    def reported(self) -> float | None:
        return interference(self.model, self.method, self.before, self.states, WEIGHTS, self.after)

    def matrices(self, state: State) -> dict[str, Tensor]:
        """Return every adapted layer as the matrix that it applies to its input, (in, out)."""
        load_state(self.model, self.before, state)
        return {n: matrix(m) for n, m in modules(self.model).items() if isinstance(m, LAYERS)}

    def deviations(self) -> tuple[float, float]:
        """Return the largest entry of |W(avg) - avg W| and its Frobenius norm by |avg W - W_0|."""
        clients = [self.matrices(state) for state in self.states]
        start, average = self.matrices({}), self.matrices(self.after)
        assert start
        worst = off = moved = 0.0
        for name in start:
            mean = sum(
                (w * c[name] for w, c in zip(WEIGHTS, clients, strict=True)),
                torch.zeros_like(start[name]),
            )
            worst = max(worst, float((average[name] - mean).abs().max()))
            off += float((average[name] - mean).square().sum())
            moved += float((mean - start[name]).square().sum())
        return worst, (off / moved) ** 0.5


def modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules())


@torch.no_grad()
def matrix(layer: nn.Module) -> Tensor:
    """Compute a layer's matrix, (in, out), from unit vectors, so without knowing its factors."""
    width = features(layer)
    apply = layer.times if isinstance(layer, TensorTrain) else layer
    return (apply(torch.eye(width)) - apply(torch.zeros(1, width))).double()


def features(layer: nn.Module) -> int:
    if isinstance(layer, CompressedProjection):
        return layer.compress.shape[1]
    if isinstance(layer, CoreAdapter):
        return layer.basis_in.shape[1]
    assert isinstance(layer, LoraLayer | TensorTrain) and layer.in_features
    return layer.in_features


def one_round(method: Method, name: str, round: int = 1, noise: float = 0.2) -> Aggregation:
    """Aggregate three clients that add noise to what they share, from a B that is not zero.

    Args:
        method: injects its parameters and aggregates.
        name: the architecture's name.
        round: number of the round, by which roles may differ.
        noise: standard deviation.
    """
    with torch_seed(0, "method"):
        model = method.inject(tiny(name)).eval()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    before = snapshot(model, names)
    generator = torch.Generator().manual_seed(2)

    def moved(value: Tensor) -> Tensor:
        return value + noise * torch.randn(value.shape, generator=generator)

    before = {n: moved(v) if ".lora_B." in n else v for n, v in before.items()}
    sent = [n for n in names if method.role(n, At(round)) is Role.SHARED]
    states = [{n: moved(before[n]) for n in sent} for _ in WEIGHTS]
    after = aggregated(method, states, WEIGHTS, before, model=model)
    return Aggregation(method, model, before, states, after)


# nn.Linear and GPT-2's Conv1D, square and not (Llama's v 48 -> 24, GPT-2's c_attn 48 -> 144).
MODELS = ["roberta", "llama", "gpt2"]
LORA = {"rank": 4, "alpha": 24.0, "targets": ["q", "v"]}
EXACT: dict[str, tuple[Method, Sequence[int]]] = {
    "ffa_lora": (FFALoRA(**LORA), [1]),
    "rolora": (RoLoRA(**LORA), [1, 2]),
    "fedtt_plus_one": (FedTTPlus(active="one"), [1, 2, 3, 4]),
    "fedtt_plus_one_random": (FedTTPlus(active="one", schedule="random"), [1, 2]),
    "fedtt_plus_one_bias": (FedTTPlus(active="one", train_bias=True), [1]),
    "fedex_lora": (FedExLoRA(**LORA), [1]),
    "flora": (FLoRA(**LORA), [1]),
    "flexlora_of_full_rank": (FlexLoRA(rank=48, alpha=24.0), [1]),
    "fedsvd": (FedSVD(**LORA), [1]),
    "fed_sb": (FedSB(rank=8), [1]),
    "fed_sb_orthogonal": (FedSB(rank=8, init="orthogonal"), [1]),
    "ravan": (Ravan(rank=8, heads=3), [1]),
    "slora_while_sparse": (SLoRA(**LORA), [1]),
    "fedsa_lora": (FedSALoRA(**LORA), [1]),  # with B as it stands: A alone is averaged
}
INEXACT: dict[str, Method] = {
    "lora": LoRA(**LORA),
    "federa": FeDeRA(**LORA),
    "flexlora": FlexLoRA(**LORA),
    "hetlora": HetLoRA(**LORA),
    "hetlora_by_examples": HetLoRA(**LORA, weighting="examples"),
    "fedrot_lora": FedRotLoRA(**LORA),
    "slora_at_the_svd": SLoRA(**LORA, sparse_rounds=1),
    "scl": SCL(rank=8),
    "scl_residual": SCL(rank=8, init="residual"),
    "fedtt": FedTT(),
    "fedtt_plus": FedTTPlus(),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("method", "round"), [(m, round) for m, (_, rounds) in EXACT.items() for round in rounds]
)
def test_exact_methods_average_effective_weights(method: str, round: int, name: str) -> None:
    run = one_round(EXACT[method][0], name, round)
    worst, relative = run.deviations()
    assert worst < 1e-5 and relative < 1e-5
    reported = run.reported()
    assert reported is not None and reported < 1e-6


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", list(INEXACT))
def test_the_interference_of_inexact_methods_is_as_reported(method: str, name: str) -> None:
    run = one_round(INEXACT[method], name)
    worst, relative = run.deviations()
    assert worst > 1e-3 and relative > 0.02
    assert run.reported() == pytest.approx(relative, rel=1e-3)


def test_fewer_factors_interfere_less() -> None:
    """768 x 64, rank 5, 20 % noise, 20 clients: .265 for all factors, .193 for three, 0 for one."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"tt": TensorTrain(768, 64, (8, 8, 12, 8, 8), 5)})
    before = snapshot(model, [n for n, _ in model.named_parameters() if "factor" in n])
    weights = [1 / 20] * 20
    ratios = []
    for method in (FedTT(), FedTTPlus(), FedTTPlus(active="one")):
        sent = [n for n in before if method.role(n, At(3)) is Role.SHARED]
        states = [
            {n: before[n] + 0.2 * before[n].std() * torch.randn_like(before[n]) for n in sent}
            for _ in weights
        ]
        after = aggregated(method, states, weights)
        ratios.append(interference(model, method, before, states, weights, after))
    assert ratios == pytest.approx([0.265, 0.193, 0.0], abs=0.04)


def test_interference_by_hand() -> None:
    """One input, one output, r = 1: W = w c. Clients (2, 3) and (4, 5), start (1, 1)."""
    model = nn.ModuleDict({"scl": CompressedProjection(torch.ones(1, 1), None, 1, "svd")})

    def state(project: float, compress: float) -> State:
        values = {"scl.project": project, "scl.compress": compress}
        return {name: torch.tensor([[float(value)]]) for name, value in values.items()}

    states = [state(2, 3), state(4, 5)]
    after = aggregated(SCL(), states, [0.25, 0.75])
    # avg w avg c = 3.5 * 4.5 = 15.75; avg w c = 1.5 + 15 = 16.5; start 1.
    ratio = interference(model, SCL(), state(1, 1), states, [0.25, 0.75], after)
    assert ratio == pytest.approx(0.75 / 15.5, rel=1e-6)
    assert interference(model, SCL(), state(1, 1), [state(1, 1)], [1.0], state(1, 1)) is None
    assert interference(nn.Linear(2, 2), SCL(), {}, [{}], [1.0], {}) is None


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [["q", "v"], ["o"]])
def test_lora_s_effective_weight_holds_alpha_over_r(name: str, targets: list[str]) -> None:
    method = LoRA(rank=4, alpha=24.0, targets=targets)
    run = one_round(method, name)
    load_state(run.model, run.before)
    layers = [m for m in run.model.modules() if isinstance(m, LoraLayer)]
    assert layers
    for layer in layers:
        assert isinstance(layer, nn.Module)
        x = torch.randn(5, features(layer))
        effective = method.effective(layer)
        assert effective is not None and effective.shape == (layer.out_features, layer.in_features)
        added = layer(x) - layer.get_base_layer()(x)
        assert added.abs().max() > 0.1
        torch.testing.assert_close(added, x @ effective.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("init", ["random_pinv", "residual"])
def test_scl_s_effective_weight(name: str, init: str) -> None:
    run = one_round(SCL(rank=8, init=init), name)
    load_state(run.model, run.states[0])
    layers = [m for m in run.model.modules() if isinstance(m, CompressedProjection)]
    for layer in layers:
        effective = run.method.effective(layer)
        assert effective is not None and effective.shape == (48, 96)
        change = matrix(layer).float()
        if layer.weight is not None:  # the frozen weight is no change
            change = change - layer.weight.T
        torch.testing.assert_close(change, effective.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_train_s_effective_weight(name: str) -> None:
    run = one_round(FedTT(), name)
    layers = [m for m in run.model.modules() if isinstance(m, TensorTrain)]
    assert len(layers) == (9 if name == "roberta" else 8)
    for layer in layers:
        effective = run.method.effective(layer)
        assert effective is not None
        torch.testing.assert_close(matrix(layer).float(), effective, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [LoRA(), SCL(), FedTT()], ids=lambda m: type(m).__name__)
def test_other_modules_have_no_effective_weight(method: Method) -> None:
    assert method.effective(nn.Linear(3, 3)) is None
    methods = [m for m in (LoRA(), SCL(rank=5), FedTT()) if type(m) is not type(method)]
    for other in methods:
        layers = list(other.inject(tiny("bert")).modules())
        assert all(method.effective(module) is None for module in layers)
        assert any(other.effective(module) is not None for module in layers)
