"""``fedpeft check``: opens model and data, asks each node for its facts, trains nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedpeft.config.message import for_clients
from fedpeft.config.schema import Config
from fedpeft.data.rows.source import SPLITS
from fedpeft.engine.engine import open_engine
from fedpeft.engine.facts import NUMBERS, TEXTS, facts
from fedpeft.engine.parameters import parameter_counts
from fedpeft.reporting.check import Report, named
from fedpeft.server.limits import FRAME, check_size
from fedpeft.server.nodes import Nodes, exchange
from fedpeft.server.replies import printable, reason
from fedpeft.versions import SHOWN
from fedpeft.wire import sentence, wire_bytes

MOST_CHARACTERS = 100  # length of a version or a hash
Facts = Mapping[str, Any]


def check(grid: Grid, overrides: Sequence[str], simulated: bool = False) -> Report:
    """Check a run without training, and without a run directory.

    Args:
        grid: reaches the clients' nodes, which answer by their facts.
        overrides: the configuration.
        simulated: the clients are this machine's, so that Ray's workers need room on it.

    Returns:
        The facts, and the problems that were found.

    Raises:
        ValueError: the configuration, the model or the server's own data are wrong.
    """
    sent = for_clients(overrides)
    engine = open_engine(sent, None)
    config, replica = engine.config, engine.replica
    engine.rows.read_all()
    rows = {split: len(engine.rows.examples(split)) for split in SPLITS}
    here = facts(engine)
    nodes = Nodes(config.num_clients, config.runtime.join_timeout)
    try:
        nodes.join(grid)
        problems = list(nodes.left_out.values())
    except TimeoutError as error:
        problems = [str(error)]
    clients, failed = _asked(grid, nodes.of, sent, config.runtime.round_timeout)
    others, notes = differences(here, clients)
    if simulated:
        others += _no_room(config, here)
        notes += _workers(config, here)
    return Report(
        title=f"{type(config.method).__name__} on {type(replica.model).__name__}",
        server=here,
        clients=clients,
        rows=rows,
        parameters=parameter_counts(replica.roles, replica.model),
        problems=[*problems, *failed, *others],
        notes=[*engine.task.notes(), *notes],
    )


def _asked(
    grid: Grid, nodes: Mapping[int, int], overrides: str, timeout: float
) -> tuple[dict[int, Facts], list[str]]:
    """Return the clients' facts, and a problem for each reason why some have none."""
    config = RecordDict({"config": ConfigRecord({"overrides": overrides})})
    messages = {c: Message(config, node, MessageType.QUERY) for c, node in nodes.items()}
    answers: dict[int, Facts] = {}
    late = f"no answer within runtime.round_timeout={timeout:g} s"
    problems = dict.fromkeys(sorted(messages), late)
    for client, reply in exchange(grid, messages, timeout):
        try:
            answers[client] = read_facts(reply)
            del problems[client]
        except Exception as error:  # whatever a node answers, the check goes on
            problems[client] = printable(sentence(error))
    failed: dict[str, list[int]] = {}
    for client, text in problems.items():
        failed.setdefault(text, []).append(client)
    by_client = {client: answers[client] for client in sorted(answers)}
    return by_client, [f"{named(clients)}: {text}" for text, clients in failed.items()]


def read_facts(reply: Message) -> Facts:
    """Read and check a node's answer.

    Raises:
        ValueError: the answer is an error, or lacks or holds something that it should not.
    """
    if reply.has_error():
        raise ValueError(reason(reply))
    check_size(wire_bytes(reply.content), FRAME)
    if "facts" not in reply.content.config_records:
        raise ValueError("its fedpeft does not know how to answer a check: install the server's")
    record = reply.content.config_records["facts"]
    answer: dict[str, Any] = {}
    for key in TEXTS:
        value = record.get(key)
        if not isinstance(value, str) or len(value) > MOST_CHARACTERS:
            raise ValueError(f"{key} must be a short text, got {value!r:.40}")
        answer[key] = printable(value)
    for key in (*NUMBERS, *SPLITS):
        value = record.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{key} must be a whole number >= 0, got {value!r:.40}")
        answer[key] = value
    return answer


def differences(server: Facts, clients: Mapping[int, Facts]) -> tuple[list[str], list[str]]:
    """Compare each client's versions and weights with the server's.

    Returns:
        Problems (another fedpeft, other weights) and notes (other versions, which may change bits).
    """
    others: dict[str, dict[str, list[int]]] = {}
    for client, answer in clients.items():
        for name in ("weights", "python", *SHOWN):
            if answer[name] != server[name]:
                others.setdefault(name, {}).setdefault(answer[name], []).append(client)
    problems, notes = [], []
    for name, values in others.items():
        for value, who in values.items():
            here, clients_named = server[name], named(who)
            if name == "weights":
                text = f"{clients_named}: the weights are {value}, and the server's are {here}"
                problems.append(f"{text}: give all the same files")
            elif name == "fedpeft":
                text = f"{clients_named}: fedpeft is {value}, and the server's is {here}"
                problems.append(f"{text}: install the same")
            else:
                text = f"{clients_named}: {name} is {value}, and the server's is {here}"
                notes.append(f"{text}: the last bits of numbers may differ")
    return problems, notes


def _no_room(config: Config, here: Facts) -> list[str]:
    """Return a problem if Ray could start no worker here."""
    runtime, cores = config.runtime, here["cpus"]
    if not _ray_is_here(config) or runtime.total_cpus is not None or runtime.num_cpus <= cores:
        return []
    return [f"runtime.num_cpus={runtime.num_cpus:g} is more than the {cores} cores of this machine"]


def _workers(config: Config, here: Facts) -> list[str]:
    """Return a note on the memory of Ray's workers, if they may not fit."""
    runtime = config.runtime
    if not _ray_is_here(config):
        return []
    count = int((runtime.total_cpus or here["cpus"]) / runtime.num_cpus)
    used, free = (here[name] // 2**20 for name in ("used_bytes", "free_bytes"))
    count = min(count, config.num_clients)
    if not used or count * used <= free:
        return []
    return [
        f"{count} workers of about {used:,} MiB each may not fit into the {free:,} MiB that are "
        "free: set runtime.total_cpus, or a larger runtime.num_cpus"
    ]


def _ray_is_here(config: Config) -> bool:
    """Tell whether a run would start a Ray of this machine alone."""
    return config.runtime.kind == "ray" and config.runtime.cluster()[1] == "local"
