"""A process keeps one session, shared by all that ask for the same configuration."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from fedpeft.config.load import join
from fedpeft.engine.session import Session, open_session
from tests.conftest import Runner


def test_one_session_at_a_time(base: list[str]) -> None:
    """Its rows must not keep a session that was replaced: each holds a whole model."""
    open_session.cache_clear()
    first = open_session(join(base), None)
    assert open_session(join(base), None) is first
    assert first.examples("test") is first.examples("test")
    assert first.client_examples(0) is first.client_examples(0)
    gone = weakref.ref(first)
    del first
    open_session(join([*base, "seed=1"]), None)
    gc.collect()
    assert gone() is None


def test_a_run_in_one_process_builds_one_session(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    build = Session.__init__

    def counted(session: Session, *args: object) -> None:
        built.append(1)
        build(session, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "__init__", counted)
    run()
    assert len(built) == 1


def test_load_leaves_nothing_of_the_client_before(opened: Callable[..., Session]) -> None:
    session = opened("method=fedsa_lora")
    with torch.no_grad():
        for name in session.trainable:
            session.model.get_parameter(name).fill_(9)
    some = session.trainable[0]
    session.load({some: torch.full_like(session.initial[some], 3)})
    for name in session.trainable:
        value = session.model.get_parameter(name)
        assert torch.equal(value, session.initial[name]) or name == some
    assert (session.model.get_parameter(some) == 3).all()


@pytest.mark.parametrize("method", ["lora", "ffa_lora", "fedsa_lora", "scl", "fedtt_plus"])
def test_the_same_seed_builds_the_same_parameters(
    method: str, opened: Callable[..., Session]
) -> None:
    """Frozen random parts, such as FFA-LoRA's A, are never sent: they must be alike everywhere."""
    torch.manual_seed(1)
    one = opened(f"method={method}").model.state_dict()
    torch.manual_seed(2)
    torch.randn(3)
    two = opened(f"method={method}").model.state_dict()
    other = opened(f"method={method}", "seed=1").model.state_dict()
    assert one.keys() == two.keys() == other.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert "classifier.weight" in differing
    random = {"scl": "compress", "fedtt_plus": "factor_1_of_4"}.get(method, "lora_A")
    assert [n for n in one if random in n] == [n for n in differing if random in n] != []


def test_building_does_not_move_the_global_generator(opened: Callable[..., Session]) -> None:
    torch.manual_seed(5)
    expected = torch.randn(1)
    torch.manual_seed(5)
    opened()
    assert torch.equal(torch.randn(1), expected)
