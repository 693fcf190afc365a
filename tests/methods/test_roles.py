"""The role table: the parameters that a method trains, sends and keeps, by architecture."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from fedpeft.config.load import load_config
from fedpeft.config.schema import Config
from fedpeft.engine.roles import Roles
from fedpeft.methods.base import At, Method
from fedpeft.methods.fed_sb import FedSB
from fedpeft.methods.fedex_lora import FedExLoRA
from fedpeft.methods.fedftg import FedFTG
from fedpeft.methods.fedrot_lora import FedRotLoRA
from fedpeft.methods.fedsvd import FedSVD
from fedpeft.methods.fedtt import FACTOR, FedTT, FedTTPlus
from fedpeft.methods.flexlora import FlexLoRA
from fedpeft.methods.flora import FLoRA
from fedpeft.methods.hetlora import HetLoRA
from fedpeft.methods.lora import FedSALoRA, FFALoRA, LoRA
from fedpeft.methods.ravan import Ravan
from fedpeft.methods.scl import SCL
from fedpeft.methods.slora import SLoRA
from fedpeft.models.linear import linear_weight
from fedpeft.models.sites import attention_projections, head_names
from fedpeft.nn.scl import CompressedProjection
from fedpeft.nn.tensor_train import AdaptedOutput, TensorTrain, TTAdapter
from fedpeft.seeding import torch_seed
from fedpeft.state import Role, names_with
from tests.expected.architectures import (
    ARCHITECTURES,
    HIDDEN,
    LAYERS,
    WIDTH,
    logits,
    tiny,
    trainable,
)
from tests.expected.names import (
    base_names,
    core_names,
    factor_names,
    lora_names,
    mlp_names,
    output_head,
    scl_names,
    train_bias_names,
    trains,
    value_names,
)

ROUNDS = range(1, 13)
every_architecture = pytest.mark.parametrize("name", list(ARCHITECTURES))


def with_role(method: Method, names: Iterable[str], round: int, role: Role) -> set[str]:
    return {name for name in names if method.role(name, At(round)) is role}


def injected(method: Method, name: str) -> nn.Module:
    with torch_seed(0, "method"):
        return method.inject(tiny(name))


def check_roles(method: Method, name: str, shared: set[str], personal: set[str]) -> None:
    """Check that the roles are the same in every round, and that nothing else trains."""
    names = trainable(injected(method, name))
    assert names == shared | personal
    for round in ROUNDS:
        assert with_role(method, names, round, Role.SHARED) == shared
        assert with_role(method, names, round, Role.PERSONAL) == personal


@every_architecture
def test_head_is_what_stands_outside_the_backbone(name: str) -> None:
    model, a = tiny(name), ARCHITECTURES[name]
    head = {n for n, _ in model.named_parameters() if n.split(".")[0] in head_names(model)}
    assert head == set(a.head)


@every_architecture
def test_lora_shares_a_b_and_head(name: str) -> None:
    a = ARCHITECTURES[name]
    check_roles(LoRA(), name, lora_names(a) | set(a.head), set())


@every_architecture
def test_ffa_lora_shares_b_and_head(name: str) -> None:
    a = ARCHITECTURES[name]
    check_roles(FFALoRA(), name, lora_names(a, "B") | set(a.head), set())
    frozen = [n for n, p in injected(FFALoRA(), name).named_parameters() if not p.requires_grad]
    assert lora_names(a, "A") <= set(frozen)


def check_received(method: Method, name: str, shared: set[str], received: set[str]) -> None:
    """Check that the server changes, and no client trains, what is received."""
    names = trainable(injected(method, name))
    assert names == shared | received
    for round in ROUNDS:
        assert with_role(method, names, round, Role.SHARED) == shared
        assert with_role(method, names, round, Role.RECEIVED) == received


@every_architecture
@pytest.mark.parametrize(
    "method", [HetLoRA(), FlexLoRA(), FedRotLoRA()], ids=lambda m: type(m).__name__
)
def test_servers_that_turn_the_factors(name: str, method: Method) -> None:
    a = ARCHITECTURES[name]
    check_roles(method, name, lora_names(a) | set(a.head), set())


@every_architecture
@pytest.mark.parametrize("method", [FedExLoRA(), FLoRA()], ids=lambda m: type(m).__name__)
def test_servers_that_change_the_base_weight(name: str, method: Method) -> None:
    a = ARCHITECTURES[name]
    shared = lora_names(a) | set(a.head)
    check_received(method, name, shared, base_names(a))


@every_architecture
def test_fedsvd_shares_b_and_receives_a(name: str) -> None:
    a = ARCHITECTURES[name]
    check_received(FedSVD(), name, lora_names(a, "B") | set(a.head), lora_names(a, "A"))


@every_architecture
@pytest.mark.parametrize("init", ["svd", "orthogonal"])
def test_fed_sb_and_ravan_share_small_matrices_and_head(name: str, init: str) -> None:
    a = ARCHITECTURES[name]
    check_roles(FedSB(rank=5, init=init), name, core_names(a, "core") | set(a.head), set())
    ravan = Ravan(rank=5, heads=2, init=init)
    check_roles(ravan, name, core_names(a, "core", "scales") | set(a.head), set())


@every_architecture
def test_fedftg_shares_the_mlps_weights_and_head(name: str) -> None:
    a = ARCHITECTURES[name]
    check_roles(FedFTG(), name, mlp_names(a) | set(a.head), set())


@every_architecture
def test_fedftg_s_gradients_have_its_rank(name: str) -> None:
    model, plain = injected(FedFTG(rank=3), name), tiny(name)
    model.requires_grad_(False)
    for n, p in model.named_parameters():
        p.requires_grad_(n in mlp_names(ARCHITECTURES[name]))
    for some in (model.eval(), plain.eval()):
        logits(some).square().sum().backward()
    FedFTG(rank=3).term(At(1, 0), {}, {}).correct(dict(model.named_parameters()))
    whole = dict(plain.named_parameters())
    for n in mlp_names(ARCHITECTURES[name]):
        projected, full = dict(model.named_parameters())[n].grad, whole[n].grad
        assert projected is not None and full is not None and projected.shape == full.shape
        values = torch.linalg.svdvals(projected)
        assert values[3:].max() < 1e-4 * values[0]
        best = torch.linalg.svdvals(full)[3:].norm()  # the best matrix of rank 3 is so far off
        assert (projected - full).norm() <= 1.1 * best + 1e-5


def test_fedftg_cuts_nothing_at_full_rank() -> None:
    gradient = torch.randn(4, 9)
    assert torch.equal(FedFTG(rank=4).project(gradient), gradient)
    torch.testing.assert_close(
        FedFTG(rank=3).project(gradient.T), FedFTG(rank=3).project(gradient).T
    )
    low = torch.randn(6, 2) @ torch.randn(2, 9)
    torch.testing.assert_close(FedFTG(rank=2).project(low), low, rtol=1e-4, atol=1e-5)


@every_architecture
def test_slora_shares_values_first_and_factors_then(name: str) -> None:
    a, method = ARCHITECTURES[name], SLoRA(sparse_rounds=3)
    names = trainable(injected(method, name))
    lora = lora_names(a)
    assert names == lora | value_names(a) | set(a.head)
    for round in ROUNDS:
        trained = (value_names(a) if round <= 3 else lora) | set(a.head)
        assert with_role(method, names, round, Role.SHARED) == trained
        assert with_role(method, names, round, Role.FROZEN) == names - trained


MULTIPLY = ["fedex_lora", "flora", "flexlora", "fedrot_lora", "hetlora", "lora_fair"]


def roles_of(method: str, *overrides: str) -> Roles:
    config = load_config([f"method={method}", *overrides])
    return Roles(config, injected(config.method, "bert"))


@pytest.mark.parametrize("key", ["personal", "frozen"])
@pytest.mark.parametrize("method", MULTIPLY)
def test_a_server_that_multiplies_factors_refuses_a_without_b(method: str, key: str) -> None:
    name = type(load_config([f"method={method}"]).method).__name__
    with pytest.raises(ValueError, match=rf"{name} multiplies B and A on the server, but of bert"):
        roles_of(method, f"{key}='*.lora_B.*'").check()
    roles_of(method, f"{key}=['*.lora_A.*','*.lora_B.*']").check()
    roles_of(method, "strategy=local_only").check()


def test_hetlora_multiplies_only_where_products_weigh_or_prune() -> None:
    alone = ("personal='*.lora_B.*'", "method.weighting=examples")
    roles_of("hetlora", *alone).check()
    with pytest.raises(ValueError, match="HetLoRA multiplies B and A"):
        roles_of("hetlora", *alone, "method.prune=0.9").check()


@pytest.mark.parametrize("pattern", ["*.lora_B.*", "*layer.0*lora_B*"])
def test_fedsvd_needs_b_of_every_module_and_sends_its_a(pattern: str) -> None:
    says = "FedSVD decomposes the mean B and A of bert.*: personal and frozen must match both or "
    for key in ("personal", "frozen"):
        with pytest.raises(ValueError, match=says):
            roles_of("fedsvd", f"{key}='{pattern}'").check()
    with pytest.raises(ValueError, match=says):
        roles_of("fedsvd", f"frozen='{pattern.replace('_B', '_A')}'").check()
    for fits in ("strategy=local_only", "personal=head", "frozen=head", "frozen='*layer.0*'"):
        roles_of("fedsvd", fits).check()


@pytest.mark.parametrize("method", ["fedex_lora", "flora"])
def test_a_base_weight_that_the_server_changes_is_not_frozen_alone(method: str) -> None:
    with pytest.raises(ValueError, match=r"changes bert\S*\.base_layer\.weight on the server"):
        roles_of(method, "frozen='*base_layer*'").check()
    roles = roles_of(method, "frozen='*layer.0*'")
    roles.check()
    assert roles.down(2) and not any("layer.0" in name for name in roles.down(2))


def test_slora_needs_rounds_for_its_lora() -> None:
    SLoRA(sparse_rounds=3).check(4)
    with pytest.raises(ValueError, match="sparse_rounds must be < num_rounds=3, .* got 3"):
        SLoRA(sparse_rounds=3).check(3)


@cache
def fedsa_lora(*overrides: str) -> Config:
    return load_config(["method=fedsa_lora", *overrides])


@every_architecture
def test_fedsa_lora_shares_a_and_head_and_keeps_b_on_the_client(name: str) -> None:
    a = ARCHITECTURES[name]
    shared = lora_names(a, "A") | set(a.head)
    check_roles(FedSALoRA(), name, shared=shared, personal=lora_names(a, "B"))


@every_architecture
@pytest.mark.parametrize("overrides", [(), ("personal=head",), ("personal=null",)])
def test_a_run_of_fedsa_lora_keeps_the_head_on_the_client_too(
    name: str, overrides: tuple[str, ...]
) -> None:
    """The head stays by default, as in the official code; ``personal=null`` shares it."""
    a, config = ARCHITECTURES[name], fedsa_lora(*overrides)
    on_client = set() if overrides == ("personal=null",) else set(a.head)
    shared = lora_names(a, "A") | (set(a.head) - on_client)
    personal = lora_names(a, "B") | on_client
    roles = Roles(config, injected(config.method, name))
    assert set(roles.names) == shared | personal
    for round in ROUNDS:
        assert set(names_with(roles.by_name(round), Role.SHARED)) == shared
        assert set(names_with(roles.by_name(round), Role.PERSONAL)) == personal


def test_a_pattern_of_personal_parameters_that_matches_none_is_named() -> None:
    config = fedsa_lora("personal=nonsense")
    with pytest.raises(ValueError, match="personal=nonsense matches no trained parameter"):
        Roles(config, injected(config.method, "bert"))


@every_architecture
@pytest.mark.parametrize("init", ["random_pinv", "svd", "residual"])
def test_scl_shares_c_w2_prime_and_head(name: str, init: str) -> None:
    a = ARCHITECTURES[name]
    check_roles(SCL(rank=5, init=init), name, scl_names(a) | set(a.head), set())


@every_architecture
def test_fedtt_shares_factors_biases_and_output_layer(name: str) -> None:
    a = ARCHITECTURES[name]
    shared = factor_names(a) | train_bias_names(a) | output_head(a)
    check_roles(FedTT(), name, shared, set())


@every_architecture
def test_fedtt_without_a_compressed_classifier(name: str) -> None:
    a = ARCHITECTURES[name]
    adapters = {t for t in trains(a) if t != a.dense}
    expected = {n for n in factor_names(a) if n.rpartition(".")[0] in adapters}
    expected |= {f"{train}.bias" for train in adapters} | set(a.head)
    check_roles(FedTT(classifier=False), name, expected, set())


def test_fedtt_can_train_layernorms() -> None:
    names = trainable(injected(FedTT(train_layernorm=True), "bert"))
    norms = {n for n in names if "LayerNorm" in n}
    assert len(norms) == 2 * (1 + 2 * LAYERS)  # weight and bias; embeddings, two a block
    assert names - norms == trainable(injected(FedTT(), "bert"))
    llama = trainable(injected(FedTT(train_layernorm=True), "llama"))
    assert sum("norm" in n for n in llama) == 1 + 2 * LAYERS


@every_architecture
def test_fedtt_plus_shares_first_last_and_one_middle_factor(name: str) -> None:
    a, method = ARCHITECTURES[name], FedTTPlus()
    names = trainable(injected(method, name))
    assert names == factor_names(a) | output_head(a)  # no TT bias
    for round in ROUNDS:
        active = {1, 2 + round % 2, 4}  # J = 4: the middle ones are 2 and 3
        shared = factor_names(a, active) | output_head(a)
        assert with_role(method, names, round, Role.SHARED) == shared
        assert with_role(method, names, round, Role.FROZEN) == names - shared


@every_architecture
def test_fedtt_plus_with_one_factor_a_round(name: str) -> None:
    a, method = ARCHITECTURES[name], FedTTPlus(active="one")
    names = trainable(injected(method, name))
    for round in ROUNDS:
        shared = factor_names(a, {1 + round % 4}) | output_head(a)
        assert with_role(method, names, round, Role.SHARED) == shared
        assert with_role(method, names, round, Role.FROZEN) == names - shared


@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_fedtt_plus_can_train_biases(name: str) -> None:
    method, a = FedTTPlus(train_bias=True), ARCHITECTURES[name]
    names = trainable(injected(method, name))
    biases = train_bias_names(a)
    assert names == factor_names(a) | output_head(a) | biases
    assert all(with_role(method, biases, r, Role.SHARED) == biases for r in ROUNDS)


@pytest.mark.parametrize(
    ("count", "middle"),
    [
        (3, [2, 2, 2, 2, 2, 2, 2]),
        (4, [3, 2, 3, 2, 3, 2, 3]),
        (5, [3, 4, 2, 3, 4, 2, 3]),
        (6, [3, 4, 5, 2, 3, 4, 5]),
        (8, [3, 4, 5, 6, 7, 2, 3]),
    ],
)
def test_cyclic_schedule_by_hand(count: int, middle: list[int]) -> None:
    """m_t = 2 + t mod (J - 2)."""
    schedule = [FedTTPlus().active_factors(count, t) for t in range(1, 8)]
    assert schedule == [{1, m, count} for m in middle]


def test_one_active_factor_in_turn() -> None:
    method = FedTTPlus(active="one")
    assert [method.active_factors(5, t) for t in range(1, 7)] == [{2}, {3}, {4}, {5}, {1}, {2}]


def test_random_schedule_is_a_function_of_seed_and_round() -> None:
    rounds = range(1, 61)
    method = FedTTPlus(schedule="random", schedule_seed=3)
    schedule = [method.active_factors(8, t) for t in rounds]
    torch.manual_seed(99)  # another client, in another state, counting backwards
    other = FedTTPlus(schedule="random", schedule_seed=3, tt_rank=2)
    assert schedule == [other.active_factors(8, t) for t in reversed(rounds)][::-1]
    assert all({1, 8} < active and len(active) == 3 for active in schedule)
    middle = [next(iter(active - {1, 8})) for active in schedule]
    assert {middle.count(m) > 2 for m in range(2, 8)} == {True}
    assert middle[:6] * 10 != middle  # not a cycle
    for first in (0, 1):  # every round draws anew
        assert any(middle[i] != middle[i + 1] for i in range(first, 58, 2))
    reseeded = FedTTPlus(schedule="random", schedule_seed=4)
    assert schedule != [reseeded.active_factors(8, t) for t in rounds]
    assert schedule != [FedTTPlus().active_factors(8, t) for t in rounds]


def test_random_schedule_with_one_factor_reaches_all() -> None:
    method = FedTTPlus(schedule="random", active="one")
    schedule = [method.active_factors(5, t) for t in range(1, 61)]
    assert {len(active) for active in schedule} == {1}
    assert set().union(*schedule) == {1, 2, 3, 4, 5}


def test_factor_numbers_are_read_off_names() -> None:
    method = FedTTPlus()
    assert method.role("a.down.factor_2_of_12", At(9)) is Role.FROZEN
    assert method.role("a.down.factor_11_of_12", At(9)) is Role.SHARED  # 2 + 9 mod 10
    assert method.role("a.down.factor_12_of_12", At(9)) is Role.SHARED
    assert FACTOR.search("a.factor_2_of_12.weight") is None


METHODS: dict[str, Method] = {
    "lora": LoRA(),
    "ffa_lora": FFALoRA(),
    "fedsa_lora": FedSALoRA(),
    "scl": SCL(rank=5),
    "residual": SCL(rank=5, init="residual"),
    "fedtt": FedTT(),
    "fedtt_plus": FedTTPlus(),
    "fedex_lora": FedExLoRA(),
    "fed_sb": FedSB(rank=5),
    "ravan": Ravan(rank=5, heads=2),
    "slora": SLoRA(),
}


@every_architecture
@pytest.mark.matrix
@pytest.mark.parametrize("method", list(METHODS))
def test_the_loss_reaches_exactly_what_trains(name: str, method: str) -> None:
    """The model computes with every trained parameter."""
    model = injected(METHODS[method], name)
    names = trainable(model)
    logits(model).square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == names


IDENTITIES: dict[str, Method] = {
    "lora": LoRA(),
    "lora_o": LoRA(targets=["q", "k", "v", "o"]),
    "zero_last": FedTT(init="zero_last", classifier=False),
    "fedex_lora": FedExLoRA(),
    "fed_sb": FedSB(rank=5),
    "ravan": Ravan(rank=5, heads=2),
    "slora": SLoRA(),
    "residual": SCL(rank=5, init="residual"),
    "svd_of_full_rank": SCL(rank=HIDDEN, init="svd"),  # right for the right orientation only
}


@every_architecture
@pytest.mark.matrix
@pytest.mark.parametrize("method", list(IDENTITIES))
def test_methods_that_start_as_the_pretrained_model(name: str, method: str) -> None:
    expected = logits(tiny(name)).detach()
    model = injected(IDENTITIES[method], name).eval()
    torch.testing.assert_close(logits(model).detach(), expected, rtol=1e-4, atol=1e-5)


@every_architecture
@pytest.mark.parametrize("init", ["random_pinv", "svd", "residual"])
def test_scl_replaces_the_mlp_output_of_every_block(name: str, init: str) -> None:
    a, before, model = ARCHITECTURES[name], tiny(name), injected(SCL(rank=5, init=init), name)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, CompressedProjection)}
    assert list(layers) == a.sites(a.mlp) and len(layers) == LAYERS
    for site, layer in layers.items():
        assert layer.compress.shape == (5, WIDTH) and layer.project.shape == (HIDDEN, 5)
        _, bias, _ = linear_weight(before.get_submodule(site))
        assert (bias is None) == (layer.bias is None) == name.startswith("llama")
        if bias is not None and layer.bias is not None:
            assert torch.equal(layer.bias, bias)


@every_architecture
def test_fedtt_puts_two_adapters_in_every_block(name: str) -> None:
    a, before, model = ARCHITECTURES[name], tiny(name), injected(FedTT(tt_rank=3), name)
    adapted = {n: m for n, m in model.named_modules() if isinstance(m, AdaptedOutput)}
    assert set(adapted) == set(a.sites(a.attention, a.mlp)) and len(adapted) == 2 * LAYERS
    for site, module in adapted.items():
        weight, _, _ = linear_weight(module.projection)
        assert torch.equal(weight, linear_weight(before.get_submodule(site))[0])
        adapter = module.adapter
        assert isinstance(adapter, TTAdapter)
        assert (adapter.down.in_features, adapter.up.out_features) == (HIDDEN, HIDDEN)
        assert adapter.down.out_features == adapter.up.in_features == 64
    layers = {n: m for n, m in model.named_modules() if isinstance(m, TensorTrain)}
    assert set(layers) == set(trains(a))
    assert {m.rank for m in layers.values()} == {3}


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "distilbert"])
def test_fedtt_compresses_the_classifier_s_hidden_layer(name: str) -> None:
    layer = injected(FedTT(), name).get_submodule(ARCHITECTURES[name].dense)
    assert isinstance(layer, TensorTrain)
    assert (layer.in_features, layer.out_features) == (HIDDEN, HIDDEN)
    plain = injected(FedTT(classifier=False), name).get_submodule(ARCHITECTURES[name].dense)
    assert type(plain) is nn.Linear


@every_architecture
@pytest.mark.parametrize(
    "method", [FFALoRA(), FedTTPlus(), SCL(rank=5)], ids=lambda m: type(m).__name__
)
def test_a_seeded_injection_is_the_same_everywhere(name: str, method: Method) -> None:
    first = dict(injected(method, name).named_parameters())
    torch.manual_seed(1234)  # another client's state must not matter
    second = dict(injected(method, name).named_parameters())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
    with torch_seed(1, "method"):
        other = dict(method.inject(tiny(name)).named_parameters())
    added = first.keys() - dict(tiny(name).named_parameters()).keys()
    drawn = [
        n for n in added if "lora_B" not in n and "base_layer" not in n and "projection." not in n
    ]
    assert drawn and not any(torch.equal(first[n], other[n]) for n in drawn)


def test_lora_starts_with_b_zero_and_a_random() -> None:
    parameters = dict(injected(LoRA(rank=4), "llama").named_parameters())
    architecture = ARCHITECTURES["llama"]
    for name in lora_names(architecture, "A"):
        a, b = parameters[name], parameters[name.replace("lora_A", "lora_B")]
        assert a.shape == (4, HIDDEN) and b.shape[1] == 4
        assert torch.count_nonzero(b) == 0
        assert 0.7 / HIDDEN**0.5 < a.abs().max() <= 1 / HIDDEN**0.5  # kaiming-uniform, a = sqrt 5


@every_architecture
def test_targets_q_k_v_o(name: str) -> None:
    a, model = ARCHITECTURES[name], tiny(name)
    fused = a.query == a.value
    assert set(attention_projections(model, ["q", "v"])) == set(a.sites(a.query, a.value))
    assert len(attention_projections(model, ["q", "k", "v"])) == LAYERS * (1 if fused else 3)
    assert attention_projections(model, ["o"]) == a.sites(a.attention)
    end = a.mlp if a.block.split(".")[0] != "bert" else "output.dense"
    assert set(a.sites(a.mlp)) <= set(attention_projections(model, [end]))


@pytest.mark.parametrize("target", ["w_q", "uery", "attention"])
def test_an_unknown_target_is_named(target: str) -> None:
    with pytest.raises(ValueError, match=f"target {target} matches no .* BertForSequence"):
        LoRA(targets=["q", target]).inject(tiny("bert"))


def resnet() -> nn.Module:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    return hf.ResNetForImageClassification(config)


@pytest.mark.parametrize(
    ("method", "what"),
    [
        (SCL(rank=2), "ResNetForImageClassification has no MLP output projection"),
        (FedTT(), "ResNetForImageClassification has no attention output projection"),
        (FedTTPlus(), "ResNetForImageClassification has no attention output projection"),
        (LoRA(), "target q matches no module of ResNetForImageClassification"),
    ],
)
def test_an_architecture_without_the_place_is_named(method: Method, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        method.inject(resnet())


def test_a_width_without_small_factors_is_named() -> None:
    config = hf.BertConfig(
        hidden_size=74,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=96,
        vocab_size=9,
    )
    with pytest.raises(ValueError, match="width 74 cannot be split"):
        FedTT().inject(hf.BertForSequenceClassification(config))


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (LoRA, {"rank": 0}, "rank must be >= 1, got 0"),
        (FFALoRA, {"rank": -2}, "rank must be >= 1, got -2"),
        (LoRA, {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        (LoRA, {"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
        (LoRA, {"alpha": 0.0}, "alpha must be > 0, got 0.0"),
        (FedSALoRA, {"rank": 0}, "rank must be >= 1, got 0"),
        (SCL, {"rank": 0}, "rank must be >= 1, got 0"),
        (SCL, {"init": "nonsense"}, "init must be one of random_pinv, .* got nonsense"),
        (FedTT, {"tt_rank": 0}, "tt_rank must be >= 1, got 0"),
        (FedTT, {"bottleneck": 1}, "bottleneck must be >= 2, got 1"),
        (FedTT, {"init": "nonsense"}, "init must be normal or zero_last, got nonsense"),
        (FedTT, {"tt_ranks": [2, 6]}, "tt_ranks must be from 1 to the largest, 5, got 6"),
        (FedTT, {"tt_ranks": {3: 0}}, "tt_ranks must be from 1 to the largest, 5, got 0"),
        (FlexLoRA, {"ranks": [8, 9]}, "ranks must be from 1 to the largest, 8, got 9"),
        (FedTT, {"tt_ranks": 3}, "tt_ranks must be a list, or a rank by client, got 3"),
        (HetLoRA, {"ranks": {"a": 1}}, r"ranks must be by client numbers, got \['a'\]"),
        (HetLoRA, {"ranks": [2.5]}, "ranks must be from 1 to the largest, 8, got 2.5"),
        (FLoRA, {"ranks": {0: 0}}, "ranks must be from 1 to the largest, 8, got 0"),
        (FLoRA, {"rank": 0}, "rank must be >= 1, got 0"),
        (HetLoRA, {"ranks": [-1]}, "ranks must be from 1 to the largest, 8, got -1"),
        (HetLoRA, {"weighting": "size"}, "weighting must be norm or examples, got size"),
        (FedExLoRA, {"alpha": -1.0}, "alpha must be > 0, got -1.0"),
        (FedSVD, {"every": 0}, "every must be >= 1, got 0"),
        (FedRotLoRA, {"align": "C"}, "align must be both, A or B, got C"),
        (FedFTG, {"rank": 0}, "rank must be >= 1, got 0"),
        (FedSB, {"rank": 0}, "rank must be >= 1, got 0"),
        (FedSB, {"init": "zero"}, "init must be one of gradient, svd, orthogonal, got zero"),
        (FedSB, {"targets": []}, r"targets must name at least one projection, got \[\]"),
        (Ravan, {"heads": 0}, "heads must be >= 1, got 0"),
        (SLoRA, {"sparse_rounds": 0}, "sparse_rounds must be >= 1, got 0"),
        (SLoRA, {"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        (SLoRA, {"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        (FedTTPlus, {"tt_rank": 0}, "tt_rank must be >= 1, got 0"),
        (FedTTPlus, {"schedule": "nonsense"}, "schedule must be cyclic or random, got nonsense"),
        (FedTTPlus, {"active": "two"}, "active must be three or one, got two"),
    ],
)
def test_hyperparameters_are_checked(
    cls: type[Method], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**fields)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_scl_s_rank_is_checked_against_the_model(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"method.rank must be <= {HIDDEN}, the smaller .* got {HIDDEN + 1}"
    ):
        SCL(rank=HIDDEN + 1).inject(tiny(name))
