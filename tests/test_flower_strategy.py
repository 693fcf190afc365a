"""FederatedPEFT is a Flower strategy: Flower's own start runs it, in any ServerApp."""

import importlib.util
import os
import sys
from typing import Any

import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy

from fedpeft.config.overrides import join
from fedpeft.engine.engine import open_engine
from fedpeft.server.strategy import FederatedPEFT
from fedpeft.simulation.grid import InProcessGrid
from fedpeft.state import sha256
from tests.conftest import ROOT, Runner, command
from tests.expected.methods import TINY
from tests.grids import one_by_one

EXAMPLE = ROOT / "docs" / "flower_app.py"
# The example on Flower's simulation engine, with Flower's own start. It prints a hash of the
# server's state, and the clients' numbers of messages, which the mod counts.
IN_FLOWERS_ENGINE = """
import sys
import flower_app
from flwr.serverapp.strategy import Strategy
from flwr.simulation import run_simulation
from fedpeft.state import sha256

class Watched(flower_app.FederatedPEFT):
    def start(self, *arguments, **options):
        result = Strategy.start(self, *arguments, **options)
        print("state", sha256(self.state))
        return result

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        seen = [reply.content.metric_records["seen"]["messages"] for reply in replies]
        print("seen", server_round, sorted(seen))
        return super().aggregate_train(server_round, replies)

(flower_app.OVERRIDES,) = sys.argv[1:]
flower_app.FederatedPEFT = Watched
init = {"num_cpus": 1, "logging_level": "ERROR", "log_to_driver": False}
backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0}, "init_args": init}
run_simulation(flower_app.server, flower_app.client, num_supernodes=3, backend_config=backend)
"""


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("lora", ()),
        ("fedsa_lora", ()),
        ("fedtt_plus", ()),
        ("fed_sb", ()),
        ("hetlora", ("method.ranks=[1,2,4]",)),  # it matters whose a reply is
    ],
)
def test_flowers_start_gives_the_same_state_as_ours(
    method: str, more: tuple[str, ...], run: Runner
) -> None:
    expected = run(f"method={method}", *more)["shared_state_sha256"]
    overrides = join([*run.base, f"method={method}", *TINY.get(method, []), *more])
    open_engine.cache_clear()
    strategy, grid = FederatedPEFT(overrides), InProcessGrid(3)
    result = Strategy.start(strategy, grid, strategy.initial_arrays(), num_rounds=2)
    assert sha256(strategy.state) == expected
    assert result.train_metrics_clientapp.keys() == {1, 2}
    personal = method == "fedsa_lora"
    assert bool(result.evaluate_metrics_clientapp) is personal
    assert set(result.arrays) == set(strategy.state)


def test_a_reply_to_no_message_is_ignored(run: Runner) -> None:
    """Flower's own loop hands over whatever its grid pulls."""
    expected = run("num_rounds=1")["shared_state_sha256"]
    open_engine.cache_clear()
    strategy = FederatedPEFT(join([*run.base, *TINY["lora"], "num_rounds=1"]))

    class Stray(InProcessGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
            sent = list(messages)
            replies = super().send_and_receive(sent, timeout=timeout)
            strays = [Message(RecordDict(), reply_to=message) for message in sent[:1]]
            for stray in strays:
                stray.metadata.__dict__["_reply_to_message_id"] = "junk"
            return [*strays, *replies]

    Strategy.start(strategy, Stray(3), strategy.initial_arrays(), num_rounds=1)
    assert strategy.seen.refused == {} and sha256(strategy.state) == expected


def test_evaluations_that_measure_too_little_or_twice_do_not_end_flowers_loop(run: Runner) -> None:
    open_engine.cache_clear()
    given = ["method=fedsa_lora", "num_rounds=1", "runtime.min_replies=2"]
    strategy = FederatedPEFT(join([*run.base, *given]))

    class Spoiling(InProcessGrid):
        """Client 1 measures nothing, and client 2 is there twice."""

        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
            replies = super().send_and_receive(messages, timeout=timeout)
            if replies and replies[0].metadata.message_type == "evaluate":
                replies[1].content["metrics"] = MetricRecord()
                return [*replies, replies[2]]
            return replies

    result = Strategy.start(strategy, Spoiling(3), strategy.initial_arrays(), num_rounds=1)
    assert result.evaluate_metrics_clientapp == {1: MetricRecord()}  # one measured, two must
    refused = strategy.seen.refused
    assert refused[2] == "evaluation: the client replied twice"
    assert refused[1].startswith("evaluation: ") and refused.keys() == {1, 2}


def test_arrays_of_somebody_else_are_the_start(run: Runner) -> None:
    overrides = join([*run.base, *TINY["lora"]])
    open_engine.cache_clear()
    first = FederatedPEFT(overrides)
    first.start(InProcessGrid(3), num_rounds=1)
    second = FederatedPEFT(overrides)
    second.start(InProcessGrid(3), first.arrays(), num_rounds=0)
    assert sha256(second.state) == sha256(first.state)
    assert second.values.keys() == first.values.keys()
    unknown = first.arrays()
    unknown["nobody.weight"] = next(iter(unknown.values()))
    with pytest.raises(ValueError, match=r"nobody.weight .* is no parameter of this method"):
        second.start(InProcessGrid(3), unknown, num_rounds=0)


def test_the_example_of_the_documentation(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("flower_app", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    overrides = join([*run.base, *TINY["lora"]])
    open_engine.cache_clear()
    context = Context(1, 0, {}, RecordDict(), {"overrides": overrides})
    grid = InProcessGrid(3, one_by_one(example.client))
    example.server(grid, context)
    # A and B of four modules at rank 4, and the head
    assert capsys.readouterr().out.endswith(f"rounds: {2 * 2 * 4 * 64 + 132}\n")
    # the mod stood around the ClientApp, and a node's state lasts from round to round
    counted = [grid.context(node).state.metric_records["seen"] for node in grid.get_node_ids()]
    assert [dict(record) for record in counted] == [{"messages": 2}] * 3


@pytest.mark.slow
def test_the_example_on_flowers_simulation_engine(run: Runner) -> None:
    """Flower's own start; tests/test_doors.py has ours on this engine, by ``flwr run``."""
    expected = run("method=fedsa_lora")["shared_state_sha256"]
    patient = "runtime.join_timeout=380"  # Flower starts Ray, which a busy machine delays
    overrides = join([*run.base, "method=fedsa_lora", *TINY.get("fedsa_lora", []), patient])
    path = os.pathsep.join([str(EXAMPLE.parent), *sys.path])
    done = command(
        *(sys.executable, "-c", IN_FLOWERS_ENGINE, overrides),
        PYTHONPATH=path,
        FLWR_TELEMETRY_ENABLED="0",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("state ")] == [f"state {expected}"]
    assert sum(line.startswith("parameters after two rounds: ") for line in lines) == 1
    # A query, and a training in each round; as parameters are personal, an evaluation between.
    expected_lines = [f"seen {r} {[n] * 3}" for r, n in ((1, 2), (2, 4))]
    assert [line for line in lines if line.startswith("seen ")] == expected_lines
