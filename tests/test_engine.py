"""A process keeps one engine, its model and its seeds; roles say what is sent by round."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedpeft.config.load import load_config
from fedpeft.config.overrides import join
from fedpeft.engine.engine import Engine, open_engine
from fedpeft.engine.plan import Job
from fedpeft.engine.roles import Roles
from fedpeft.state import Role, names_with
from tests.conftest import Runner


def test_one_engine_at_a_time(base: list[str]) -> None:
    """A replaced engine is freed even if its rows were read, because it holds a whole model."""
    open_engine.cache_clear()
    first = open_engine(join(base), None)
    assert open_engine(join(base), None) is first
    assert first.rows.examples("test") is first.rows.examples("test")
    assert first.rows.client_examples(0) is first.rows.client_examples(0)
    gone = weakref.ref(first)
    del first
    open_engine(join([*base, "seed=1"]), None)
    gc.collect()
    assert gone() is None


def test_an_engine_that_nobody_holds_goes(opened: Callable[..., Engine]) -> None:
    """An engine's roles, passes and stacks do not keep it after a run."""
    engine = opened("num_clients=2", "batch_size=1")
    jobs = [Job(engine.replica.roles.at(1, i), engine.replica.initial) for i in range(2)]
    assert not any(isinstance(result, Exception) for result in engine.train(jobs))
    assert not any(isinstance(result, Exception) for result in engine.train(jobs[:1]))
    engine.replica.roles.down(2)
    gone = [weakref.ref(part) for part in (engine, engine.replica, engine.replica.roles)]
    del engine
    gc.collect()
    assert [part() for part in gone] == [None] * 3


def test_a_run_in_one_process_builds_one_engine(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    build = Engine.__init__

    def counted(engine: Engine, *args: object) -> None:
        built.append(1)
        build(engine, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "__init__", counted)
    run()
    assert len(built) == 1


def test_load_leaves_nothing_of_the_client_before(opened: Callable[..., Engine]) -> None:
    engine = opened("method=fedsa_lora")
    with torch.no_grad():
        for name in engine.replica.roles.names:
            engine.replica.model.get_parameter(name).fill_(9)
    some = engine.replica.roles.names[0]
    engine.replica.load({some: torch.full_like(engine.replica.initial[some], 3)})
    for name in engine.replica.roles.names:
        value = engine.replica.model.get_parameter(name)
        assert torch.equal(value, engine.replica.initial[name]) or name == some
    assert (engine.replica.model.get_parameter(some) == 3).all()


@pytest.mark.parametrize("method", ["lora", "ffa_lora", "fedsa_lora", "scl", "fedtt_plus"])
def test_the_same_seed_builds_the_same_parameters(
    method: str, opened: Callable[..., Engine]
) -> None:
    """Frozen random parameters, such as FFA-LoRA's A, must be equal because none is ever sent."""
    torch.manual_seed(1)
    one = opened(f"method={method}").replica.model.state_dict()
    torch.manual_seed(2)
    torch.randn(3)
    two = opened(f"method={method}").replica.model.state_dict()
    other = opened(f"method={method}", "seed=1").replica.model.state_dict()
    assert one.keys() == two.keys() == other.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert "classifier.weight" in differing
    random = {"scl": "compress", "fedtt_plus": "factor_1_of_4"}.get(method, "lora_A")
    assert [n for n in one if random in n] == [n for n in differing if random in n] != []


def test_building_does_not_move_the_global_generator(opened: Callable[..., Engine]) -> None:
    torch.manual_seed(5)
    expected = torch.randn(1)
    torch.manual_seed(5)
    opened()
    assert torch.equal(torch.randn(1), expected)


# --- roles ---------------------------------------------------------------------------------------


def roles_of(method: str, *names: str) -> Roles:
    """Return the roles of a model with these parameters alone; the first one is the body's."""
    model = nn.Module()
    model.base_model_prefix = names[0].partition(".")[0]  # type: ignore[assignment]
    for name in names:
        *path, last = name.split(".")
        module = model
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(torch.zeros(1)))
    assert {name for name, _ in model.named_parameters()} == set(names)
    return Roles(load_config(f"method={method}"), model)


def test_roles_and_names() -> None:
    names = ["l.lora_A.w", "l.lora_B.w", "classifier.bias"]
    roles = roles_of("fedsa_lora", *names)
    table = roles.by_name(1)
    assert names_with(table, Role.SHARED) == ["l.lora_A.w"] == roles.shared(1)
    assert names_with(table, Role.PERSONAL) == ["l.lora_B.w", "classifier.bias"]
    assert names_with(table, Role.FROZEN) == []
    assert roles.trained(1) == roles.names == names
    assert roles.has_personal and not roles_of("lora", *names).has_personal
    assert roles.down(5) == ["l.lora_A.w"]
    assert roles_of("lora", *names).down(1) == names


def test_all_parameters_shared_so_far_go_down() -> None:
    names = [f"up.factor_{j}_of_6" for j in range(1, 7)] + ["classifier.bias"]
    roles = roles_of("fedtt_plus", *names)
    numbers = [[int(n[10]) for n in roles.down(round)[:-1]] for round in range(1, 6)]
    # rounds train {1, m, 6} with m = 2 + t mod 4: 3, 4, 5, 2, 3
    expected = [[1, 3, 6], [1, 3, 4, 6], [1, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]] + [[1, 2, 3, 4, 5, 6]]
    assert numbers == expected
    again = roles_of("fedtt_plus", *names)  # the order of calls does not matter
    later = [[int(n[10]) for n in again.down(round)[:-1]] for round in (5, 4, 3, 2, 1)]
    assert later == expected[::-1]
