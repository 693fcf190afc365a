"""A configuration is right, or one sentence says which key is wrong and what it must be."""

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path

import pytest
from hydra.utils import get_class

from fedpeft.config import load
from fedpeft.config.compose import CONF, GROUPS, _from_files, addable, composed
from fedpeft.config.load import load_config
from fedpeft.config.message import for_clients, of_message
from fedpeft.config.optimization import Optimization
from fedpeft.config.overrides import join, split
from fedpeft.config.schema import Config, ConfigError, Settings
from fedpeft.data.partitions.base import IID, Dirichlet
from fedpeft.engine.engine import Engine
from fedpeft.methods.lora import FedSALoRA, LoRA
from fedpeft.models.pretrained import Pretrained
from fedpeft.simulation import launch
from tests.conftest import Runner


def names(group: str) -> str:
    return ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))


CASES = [
    # misspelt keys, at the top, in a group and in a nested dataclass
    ("num_client=4", "unknown key num_client: did you mean num_clients?"),
    ("lrr=0.1", "unknown key lrr: did you mean lr?"),
    ("optimiser.name=sgd", "unknown key optimiser.name: did you mean optimizer.name?"),
    (
        "optimizer.nme=sgd",
        "unknown key optimizer.nme: Optimization has no such field: did you mean optimizer.name?",
    ),
    (
        "evaluation.evry=2",
        "unknown key evaluation.evry: Evaluation has no such field: did you mean evaluation.every?",
    ),
    (
        "checkpoint.evry=2",
        "unknown key checkpoint.evry: Checkpointing has no such field: did you mean "
        "checkpoint.every?",
    ),
    ("metod=lora", "unknown key metod: did you mean method?"),
    ("methd.rank=4", "unknown key methd.rank: did you mean method.rank?"),
    ("zzz=4", "unknown key zzz"),
    ("grün=4", "unknown key grün"),
    # keys without their group
    ("rank=4", "unknown key rank: did you mean method.rank?"),
    ("kind=ray", "unknown key kind: did you mean runtime.kind?"),
    ("checkpoint.keep=0", "checkpoint.keep must be >= 1, got 0"),
    (
        "runtime.min_replies=0",
        "runtime.min_replies must be a count >= 1 or a share in (0, 1], got 0",
    ),
    ("runtime.threads=100000", "runtime.threads must be <= 1024, got 100000"),
    ("num_clients=1000000000", "num_clients must be <= 10000000, got 1000000000"),
    (
        "runtime.thread=2",
        "unknown key runtime.thread: Runtime has no such field: did you mean runtime.threads?",
    ),
    # several values, of which a run takes one
    (
        "method=lora,scl",
        "method=lora,scl has several values: fedpeft run -m method=lora,scl makes a run of each",
    ),
    (
        "lr=range(1,3)",
        "lr=range(1,3) has several values: fedpeft run -m 'lr=range(1,3)' makes a run of each",
    ),
    (
        "data.text=a,b",
        "data.text=a,b has several values: fedpeft run -m data.text=a,b makes a run of each; a "
        "list is data.text=[a,b], and a text with a comma \"data.text='a,b'\"",
    ),
    ("+extra=1", "unknown key extra: Settings has no such field"),
    # unknown names of groups
    *(
        (f"{group}=zzz", f"{group} must be one of {names(group)}, got zzz")
        for group in (*GROUPS, "runtime", "experiment")
    ),
    ("method=lroa", f"method must be one of {names('method')}, got lroa: did you mean lora?"),
    # fields that the chosen class lacks
    (
        "method.rnk=4",
        "unknown key method.rnk: LoRA has no such field: did you mean method.rank?",
    ),
    (
        "method=fedtt method.rank=4",
        "unknown key method.rank: FedTT has no such field: did you mean method.tt_rank?",
    ),
    (
        "data.pth=/x",
        "unknown key data.pth: Docstrings has no such field: did you mean data.path?",
    ),
    ("partition=iid partition.alpha=1", "unknown key partition.alpha: IID has no such field"),
    (
        "model.pth=/x",
        "unknown key model.pth: Pretrained has no such field: did you mean model.path?",
    ),
    # wrong types
    ("method.rank=four", "method.rank must be Integer, got four"),
    ("method.rank=null", "method.rank must be int, got null"),
    ("method.targets=q", "method.targets must be a [list]"),
    ("num_clients=2.5", "num_clients must be Integer, got 2.5"),
    ("num_clients=null", "num_clients must be int, got null"),
    ("lr=fast", "lr must be Float, got fast"),
    ("bucketing=perhaps", "bucketing must be bool, got perhaps"),
    ("optimizer.warmup=x", "optimizer.warmup must be Float, got x"),
    ("optimizer=sgd", "optimizer is a group of keys: set one, such as optimizer.name=…, got sgd"),
    ("clients_per_round=half", "clients_per_round must be Optional[Union[int, float]], got half"),
    ("optimizer=null", "optimizer is a group of keys: set one, such as optimizer.name=…, got null"),
    ("clients_per_round=[1]", "clients_per_round must be Optional[Union[int, float]], got [1]"),
    ("run_dir=[1]", "run_dir must be str, got [1]"),
    ("data.max_train_rows=x", "data.max_train_rows must be Integer, got x"),
    ("model.settings=5", "model.settings must be {key: value} pairs, got 5"),
    ("evaluation.every='{a: 1}'", "evaluation.every must be Integer, got {'a': 1}"),
    (
        "method.targets=[null]",
        "method.targets[0]: Invalid type assigned: NoneType is not a subclass of str. value: None",
    ),
    # keys below one that has no keys, and a group left out
    ("lr.x=1", "unknown key lr.x"),
    ("method={a:1}", "unknown key method.a"),
    ("~method", "no method is set"),
    (
        "data.path=/x",
        "data.path must not be set, because this set builds its own rows, got /x: choose a set "
        "that reads a folder, such as data=table or data=instructions",
    ),
    # interpolations
    ("lr=${x}", "lr: Interpolation key 'x' not found"),
    # impossible values
    ("num_clients=0", "num_clients must be >= 1, got 0"),
    ("seed=-1", "seed must be >= 0, got -1"),
    ("num_rounds=-1", "num_rounds must be >= 0, got -1"),
    ("batch_size=0", "batch_size must be >= 1, got 0"),
    ("local_steps=0", "local_steps must be >= 1, got 0"),
    (
        "local_epochs=2",
        "give either local_steps or local_epochs and set the other to null, got 10 and 2",
    ),
    (
        "local_steps=null",
        "give either local_steps or local_epochs and set the other to null, got None and None",
    ),
    ("lr=0", "lr must be > 0, got 0.0"),
    ("lr=nan", "lr must be > 0, got nan"),
    ("lr=inf", "lr must be > 0, got inf"),
    ("precision=fp16", "precision must be fp32 or bf16, got fp16"),
    ("method.rank=0", "method.rank must be >= 1, got 0"),
    ("method.dropout=1", "method.dropout must be in [0, 1), got 1.0"),
    ("method.alpha=0", "method.alpha must be > 0, got 0.0"),
    (
        "method=scl method.init=zero",
        "method.init must be one of random_pinv, svd, residual, got zero",
    ),
    ("method=fedtt method.init=zero", "method.init must be normal or zero_last, got zero"),
    ("method=fedtt_plus method.active=two", "method.active must be three or one, got two"),
    (
        "method=fedsa_lora method.head=shared",
        "method.head is now personal=head, or personal=null, for every method",
    ),
    ("runtime.cohort=2", "runtime.cohort is now runtime.clients_per_pass"),
    (
        "unpadding=false",
        "unpadding is gone: buckets of rows of like length save nearly as much",
    ),
    ("personal=[1]", "personal must be head, a pattern of names, a list of them or null, got [1]"),
    ("layers=3", "layers must be all, first:N, last:N or a list of block numbers, got 3"),
    (
        "accumulate=2 runtime.clients_per_pass=3",
        "accumulate=2 computes a client's batch in parts, but runtime.clients_per_pass=3 puts "
        "several clients' batches into one pass: set one of them to 1",
    ),
    ("partition.alpha=0", "partition.alpha must be > 0, got 0.0"),
    ("partition.alpha=nan", "partition.alpha must be > 0, got nan"),
    (
        "partition.min_size=0",
        "partition.min_size must be >= 3, one row each to train, validate and test, got 0",
    ),
    ("strategy.weights=rows", "strategy.weights must be examples or uniform, got rows"),
    ("model.pooling=cls", "model.pooling must be mean or null, got cls"),
    ("data.max_length=1", "data.max_length must be >= 2, got 1"),
    ("data.validation_fraction=1", "data.validation_fraction must be in (0, 1), got 1.0"),
    ("optimizer.name=adam", "optimizer.name must be one of adamw, sgd, got adam"),
    (
        "optimizer.schedule=step",
        "optimizer.schedule must be one of constant, linear, cosine, got step",
    ),
    (
        "optimizer.round_schedule=step",
        "optimizer.round_schedule must be one of constant, linear, cosine, got step",
    ),
    ("optimizer.warmup=1", "optimizer.warmup must be in [0, 1), got 1.0"),
    ("optimizer.max_grad_norm=0", "optimizer.max_grad_norm must be > 0, got 0.0"),
    (
        "optimizer.weight_decay=-1",
        "optimizer.weight_decay must be >= 0 and optimizer.momentum in [0, 1), got -1.0 and 0.0",
    ),
    ("evaluation.clients=no", "evaluation.clients must be auto, always or never, got no"),
    (
        "evaluation.every=0",
        "evaluation.every must be >= 1, got 0",
    ),
    (
        "evaluation.max_client_rows=0",
        "evaluation.max_client_rows must be >= 1 or null, got 0",
    ),
    ("runtime.kind=dask", "runtime.kind must be ray or inprocess, got dask"),
    ("runtime.device=tpu", "runtime.device must be auto, cpu or cuda, got tpu"),
    (
        "optimizer.momentum=1",
        "optimizer.weight_decay must be >= 0 and optimizer.momentum in [0, 1), got 0.0 and 1.0",
    ),
    ("runtime.total_cpus=0", "runtime.total_cpus must be >= 1 or null, got 0"),
    (
        "runtime.threads=0",
        "runtime.threads must be >= 1, num_cpus > 0 and num_gpus >= 0, got 0, 1.0 and 0.0",
    ),
    (
        "runtime.round_timeout=0",
        "runtime.round_timeout and runtime.join_timeout must be > 0, got 0.0 and 120.0",
    ),
    # classes that a server must not name to a client
    ("method._target_=os.system", "method._target_ must be a class of fedpeft, got os.system"),
    ("data._target_=builtins.eval", "data._target_ must be a class of fedpeft, got builtins.eval"),
    ("model._target_=null", "model._target_ must be a class of fedpeft, got None"),
    (
        "method._target_=fedpefty.methods.lora.LoRA",
        "method._target_ must be a class of fedpeft, got fedpefty.methods.lora.LoRA",
    ),
    (
        "method._target_=fedpeft.models.pretrained.Pretrained",
        "method._target_ must be a Method, got fedpeft.models.pretrained.Pretrained",
    ),
    (
        "method._target_=fedpeft.methods.lora.Nope",
        "method._target_: there is no class fedpeft.methods.lora.Nope",
    ),
    (
        "method._target_=fedpeft.seeding.derive",
        "method._target_: there is no class fedpeft.seeding.derive",
    ),
    # no overrides at all
    ("num_clients", "num_clients is no override: write key=value"),
    ("--lr", "unknown option --lr: fedpeft COMMAND --help shows a command's options"),
    ("'num_clients=3 num_rounds=2'", "num_clients must be Integer, got 3 num_rounds=2"),
    (
        "data.labels=[ä,b]",
        "data.labels must be a list or a mapping whose texts are in quotes, such as "
        "['a b','c'], got [ä,b]",
    ),
    ("method=null", "Config group override must be a string or a list. Got NoneType"),
    ("data@foo=x", "Could not override 'data@foo'; Did you mean to override data?"),
    (
        "method.targets={a:1}",
        "Error merging override ++method.targets={a:1}; Cannot merge DictConfig with ListConfig",
    ),
    ("model.path='/a", "No closing quotation"),
]


@pytest.mark.parametrize(("overrides", "sentence"), CASES, ids=[o for o, _ in CASES])
def test_one_sentence_names_the_key_and_the_rule(overrides: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    assert str(caught.value) == sentence


TEXTS = [
    "with space ä/notes 1.csv",
    "notes (1), a copy [2]/{3}.csv",
    "it's \\' quoted\\",
    "a=b",
    "{{ question }}",
    "#1",
    "病历/数据.csv",
    "line\nbreak",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_read_as_the_shell_gives_it(text: str) -> None:
    """The client gets the same as the server, through the message's one string."""
    overrides = [f"data.path={text}", f"run_dir={text}", "data=table"]
    assert composed(overrides).run_dir == text
    assert load_config(overrides).data.path == text
    assert load_config(of_message(for_clients(overrides))).data.path == text


def test_a_text_in_quotes_is_what_the_quotes_hold() -> None:
    assert composed(["run_dir='a ä'"]).run_dir == composed(['run_dir="a ä"']).run_dir == "a ä"


def test_errors_come_before_anything_is_built(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was built")

    monkeypatch.setattr(Engine, "__init__", never)
    monkeypatch.setattr(Pretrained, "build", never)
    monkeypatch.setattr(Pretrained, "tokenizer", never)
    with pytest.raises(ConfigError, match=r"method\.rank must be >= 1"):
        run("method.rank=0")
    assert not run.run_dir.exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("method.rank=0", "method.rank must be >= 1, got 0"),
        ("strategy.nosuch=1", "unknown key strategy.nosuch"),
        ("partition.alpha=0", "partition.alpha must be > 0, got 0.0"),
        ("compression.nosuch=1", "unknown key compression.nosuch"),
        ("data.max_length=0", "data.max_length must be >= 2, got 0"),
    ],
)
def test_impossible_fields_are_refused_before_workers_start(
    monkeypatch: pytest.MonkeyPatch, override: str, says: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("workers were started")

    monkeypatch.setattr(launch, "local_grid", never)
    with pytest.raises(ConfigError, match=f"^{re.escape(says)}"):
        launch.run([override, "runtime=ray"])


def test_only_groups_whose_fields_are_set_are_loaded_the_fastest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(load, "_group", lambda node, name, base: loaded.append(name))
    load.check_fields(["method=scl", "method.rank=4", "lr=0.1", "++partition.alpha=2", "data=sst2"])
    assert loaded == ["partition", "method"]


# --- values of a configuration -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "clients", "expected"),
    [
        ("null", 5, 5),
        ("1", 5, 1),
        ("5", 5, 5),
        ("1.0", 5, 5),
        ("0.5", 10, 5),
        ("0.25", 10, 2),
        ("0.3", 10, 3),
        ("0.01", 10, 1),
    ],
)
def test_clients_per_round(value: str, clients: int, expected: int) -> None:
    config = load_config([f"clients_per_round={value}", f"num_clients={clients}"])
    assert config.cohort_size() == expected
    assert isinstance(config.clients_per_round, float) == ("." in value)


@pytest.mark.parametrize("value", ["0", "6", "-1", "0.0", "1.5", "-0.5"])
def test_impossible_clients_per_round(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([f"clients_per_round={value}", "num_clients=5"])
    assert str(caught.value) == (
        "clients_per_round must be a count from 1 to num_clients=5 or a share in (0, 1] such as "
        f"0.5, got {value}"
    )


def test_the_defaults() -> None:
    config = load_config()
    assert config.method == LoRA(rank=8, alpha=16.0, targets=["q", "v"], dropout=0.0)
    assert config.partition == Dirichlet(alpha=0.5, min_size=10)
    assert (config.lr, config.num_clients, config.local_steps) == (3e-3, 5, 10)
    assert config.runtime.kind == "ray"
    assert config.optimizer == Optimization()
    with pytest.raises(FrozenInstanceError):
        config.lr = 1.0  # type: ignore[misc]


def test_overrides_arrive_with_their_types() -> None:
    config = load_config(
        "method=fedsa_lora method.rank=3 method.alpha=5 method.targets=[q,k] lr=1 "
        "partition.alpha=inf optimizer.max_grad_norm=null evaluation.max_client_rows=7 "
        "data.labels=[no,yes] runtime.total_cpus=2 local_steps=null local_epochs=3"
    )
    assert config.method == FedSALoRA(rank=3, alpha=5.0, targets=["q", "k"])
    assert type(config.method.targets) is list and type(config.method.alpha) is float
    assert config.lr == 1.0 and type(config.lr) is float
    assert config.partition.alpha == math.inf
    assert config.optimizer.max_grad_norm is None
    assert config.evaluation.max_client_rows == 7
    assert config.data.labels == ["no", "yes"] and type(config.data.labels) is list
    assert (config.local_steps, config.local_epochs, config.runtime.total_cpus) == (None, 3, 2)


def test_an_override_of_the_learning_rate_wins_over_the_method_s() -> None:
    assert load_config("method=scl").lr == 3e-3
    assert load_config("method=fedtt").lr == 1e-2
    assert load_config("method=scl lr=0.5").lr == 0.5
    assert load_config("lr=0.5 method=scl").lr == 0.5


def test_an_experiment_wins_over_the_defaults_and_loses_to_overrides() -> None:
    quickstart = load_config("experiment=quickstart")
    assert quickstart.num_rounds == 6 != load_config().num_rounds
    assert quickstart.partition == Dirichlet(alpha=1.0, min_size=10)
    assert load_config("experiment=quickstart num_rounds=3 partition.alpha=9").num_rounds == 3
    assert load_config("experiment=quickstart partition.alpha=9").partition.alpha == 9


@pytest.mark.parametrize(
    "overrides",
    [
        ["num_rounds=3", "++num_rounds=4"],
        ["++num_rounds=4", "num_rounds=3"],
        ["num_rounds=3", "method=scl", "lr=0.5", "num_rounds=5"],
        ["method.rank=4", "~method.rank"],
        ["runtime.num_cpus=2", "runtime=inprocess"],
        ["optimizer={name: sgd}", "optimizer.momentum=0.5"],
    ],
)
def test_values_set_in_a_copy_are_those_that_hydra_composes(overrides: list[str]) -> None:
    assert composed(overrides) == _from_files(tuple(overrides))


def test_fields_that_no_yaml_lists_can_be_set() -> None:
    """Hydra wants ``++`` before them, which ``addable`` puts there."""
    assert load_config("method=fedtt method.train_layernorm=true").method.train_layernorm is True
    assert load_config("data.subset=x").data.subset == "x"
    assert load_config("optimizer.name=sgd runtime.join_timeout=5").runtime.join_timeout == 5.0
    assert addable("method.rank=2") == "++method.rank=2"
    assert addable("lr=2") == "++lr=2"
    assert addable("method=scl") == "method=scl"
    assert addable("num_clients=2") == "num_clients=2"


def test_modules_imported_before_ray_starts_need_no_torch() -> None:
    code = (
        "import sys; from fedpeft import cli; from fedpeft.client import app; "
        "from fedpeft.config import load as config; from fedpeft.reporting import progress; "
        "from fedpeft.simulation import launch; "
        "assert config.settings(['num_clients=7', 'runtime.threads=3']).num_clients == 7; "
        "print(sorted({'torch', 'transformers', 'ray', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def yaml_files() -> Iterator[tuple[str, str]]:
    for path in sorted(CONF.rglob("*.yaml")):
        if path.parent.parent == CONF:  # files below those of a group are a part of one of them
            yield path.parent.name, path.stem


@pytest.mark.matrix
@pytest.mark.parametrize(("group", "name"), list(yaml_files()))
def test_every_file_composes_and_loads(group: str, name: str) -> None:
    config = load_config([f"{group}={name}"])
    tree = composed([f"{group}={name}"])
    if group in GROUPS:
        value = getattr(config, group)
        assert isinstance(value, get_class(GROUPS[group]))
        assert f"{type(value).__module__}.{type(value).__name__}" == tree[group]["_target_"]
        # every field of the file is one of the class, with the file's value
        for key in tree[group]:
            if key != "_target_":
                in_file, loaded = tree[group][key], getattr(value, str(key))
                assert loaded == in_file or dict(loaded) == dict(in_file)


def test_every_key_of_config_is_in_the_yaml() -> None:
    # A method's file may set ``personal``, which one in config.yaml would overrule.
    tree, settings = composed([]), load.settings()
    assert {f.name for f in fields(Config)} - {"personal"} == set(tree)
    nested = {f.name: getattr(settings, f.name) for f in fields(Settings)}
    for name, value in nested.items():
        if is_dataclass(value) and name != "runtime":  # a group, whose files set what they change
            assert {f.name for f in fields(value)} == set(tree[name]), name


def test_the_strings_of_overrides() -> None:
    overrides = [
        "model.path='/my models/it''s'",
        'data.path="/a b/c"',
        "data.labels=[yes please,no]",
        "method.targets=['q','v']",
        "run_dir=/x y",
        "lr=1e-3",
    ]
    assert split(join(overrides)) == overrides
    assert split(overrides) == overrides
    assert split("a=1  'b=c d'\nlr=2") == ["a=1", "b=c d", "lr=2"]
    config = load_config(
        join(["model=local", "model.path='/my models/x y'", "data.labels=['a b',c]"])
    )
    assert config.model.path == "/my models/x y"
    assert config.data.labels == ["a b", "c"]


def test_a_bad_path_is_named(base: list[str], tmp_path: Path) -> None:
    model = load_config([*base, f"model.path={tmp_path / 'none'}"]).model
    with pytest.raises(ValueError, match="/none is no folder with a config.json"):
        model.tokenizer()
    with pytest.raises(ValueError, match="model.path is not set"):
        load_config(["model=local"]).model.tokenizer()
    settings = load_config([*base, "model.settings.dropuot=0.1"]).model
    with pytest.raises(ValueError, match="model.settings.dropuot is no field of BertConfig"):
        settings.config(4)


def test_iid_is_a_partition_of_its_own() -> None:
    assert load_config("partition=iid").partition == IID()


def test_a_fault_of_a_method_s_own_module_is_not_a_missing_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedpeft.methods

    (tmp_path / "own.py").write_text("from fedpeft.methods.lora import LoRAA\n")
    monkeypatch.setattr(fedpeft.methods, "__path__", [*fedpeft.methods.__path__, str(tmp_path)])
    with pytest.raises(ConfigError, match="methods.own cannot be imported, ImportError: .*'LoRAA'"):
        load_config("method._target_=fedpeft.methods.own.Own")
