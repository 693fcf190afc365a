"""A server sets at a site what the site's policy names, and nothing else."""

import re
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config.compose import composed
from fedpeft.config.overrides import join
from fedpeft.deployment.node import parse, read_policy
from fedpeft.deployment.policy import LIMITS, Policy
from fedpeft.errors import public_text
from tests.conftest import ROOT

SITE = ("model=minilm", "data=table", "data.path=/notes", "data.text=note", "data.label=ward")


def test_method_and_steps_are_the_server_s_and_the_data_the_site_s() -> None:
    asked = "method=fedtt method.tt_rank=3 lr=0.5 num_rounds=7 data=sst2 data.path=/etc"
    tree = composed(Policy(SITE).merged(asked))
    assert (tree.method.tt_rank, tree.lr, tree.num_rounds) == (3, 0.5, 7)
    assert (tree.data.path, tree.data.text, tree.data.label) == ("/notes", "note", "ward")
    assert tree.data._target_ == composed(["data=table"]).data._target_


@pytest.mark.parametrize("words", [["data=table"], []])
def test_a_node_s_own_folder_takes_the_place_of_the_server_s(
    words: list[str], tmp_path: Path
) -> None:
    """Also where its name wants quotes, and where the site says nothing else of the data."""
    (folder := tmp_path / "ward 7 (ä)").mkdir()
    node = ["--superlink", "127.0.0.1:1", "--insecure", "--partition", "0"]
    policy = read_policy(parse([*node, "--data-path", str(folder), *words]))
    asked = f"{' '.join(words)} method=fedtt data.path=/data/public"
    tree = composed(policy.merged(asked))
    assert (tree.data.path, tree.method._target_) == (
        str(folder),
        composed(["method=fedtt"]).method._target_,
    )
    with pytest.raises(ValueError, match="does not let a server set data.path"):
        read_policy(parse([*node, *words])).merged(asked)


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        ("model.path=/etc/passwd", "model.path"),
        ("data.labels=[a,b]", "data.labels"),
        ("data.pair=diagnosis", "data.pair"),
        ("partition=natural partition.column=ward", "partition.column"),
        ("partition=saved partition.file=/etc/passwd", "partition.file"),
        ("experiment=llm", "study.methods"),
        ("~model.sha256", "model.sha256"),
    ],
)
def test_a_key_that_the_policy_does_not_name(asked: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"this site's policy does not let a server set {key}"):
        Policy(SITE).merged(asked)


@pytest.mark.parametrize(
    "asked",
    [
        *("data.labels.x=1", "data.labels.0.x=1", "+data.labels.0=9", "++data.labels.0=9"),
        *("data.labels@foo=1", "~data.labels.0", "data.path.x=1", "data.label=a data.label.x=2"),
    ],
)
def test_nothing_below_a_key_of_the_site_is_the_server_s(asked: str) -> None:
    """Hydra's error would quote the site's value."""
    site = (*SITE, "data.labels=[hiv,none]")
    assert Policy(site).merged(f"{asked} lr=0.5") == join(["lr=0.5", *site])


def test_keys_of_a_group_that_the_site_chooses_are_the_server_s() -> None:
    tree = composed(Policy(SITE).merged("data.max_length=17"))
    assert (tree.data.max_length, tree.data.path) == (17, "/notes")


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (
            "method=hetlora method.ranks=[4]",  # the site sets a key where the server has a list
            "this site's configuration cannot be composed with what the server sets: method, "
            "method.ranks (this node's log says more)",
        ),
        ("methd.rank=3", "unknown key methd.rank: did you mean method.rank?"),
    ],
)
def test_an_error_names_what_the_server_sets_alone(asked: str, sentence: str) -> None:
    with pytest.raises(ValueError) as raised:
        Policy(["method.ranks.ward=hiv"]).merged(asked)
    assert public_text(raised.value) == sentence


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("num_rounds=10001", "limits num_rounds to 10000, got 10001"),
        ("runtime.threads=1000", "limits runtime.threads to 64, got 1000"),
        ("evaluation.max_tokens=100000000", "limits evaluation.max_tokens to"),
        ("local_steps='\"9999999\"'", "limits local_steps to 10000, got '9999999'"),
        ("method.rank=100000", "limits method.rank to 4096, got 100000"),
        ("method=hetlora method.ranks=[4,100000]", "limits method.ranks to 4096, got 100000"),
        ("runtime.clients_per_pass=10000", "limits runtime.clients_per_pass to 64"),
        ("precision=${oc.env:HOME}", "must not hold an interpolation"),
        ("hydra.searchpath=[file:///tmp]", "must not set Hydra itself"),
        ("+hydra/launcher=joblib", "must not set Hydra itself"),
    ],
)
def test_what_costs_too_much_or_reads_the_machine(asked: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(SITE).merged(asked)


def test_the_documented_run_passes_the_documented_policy(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "deployment.md").read_text()
    policy = re.search(r"```yaml\n(configuration.*?)```", text, re.DOTALL)
    run = re.search(r"overrides=\"(method=.*?) run_dir", text)
    assert policy is not None and run is not None
    (tmp_path / "policy.yaml").write_text(policy[1])
    tree = composed(Policy.read(tmp_path / "policy.yaml").merged(run[1]))
    assert (tree.num_rounds, tree.model.path) == (20, "/models/bert")


def test_a_policy_s_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("allow: [lr, method.rank, data.max_length]\nlimits: {lr: 0.01}\n")
    policy = Policy.read(path)
    assert policy.limits == LIMITS | {"lr": 0.01}
    assert composed(policy.merged("lr=0.005 method.rank=2")).method.rank == 2
    with pytest.raises(ValueError, match="limits lr to 0.01, got 0.1"):
        policy.merged("lr=0.1")
    with pytest.raises(ValueError, match="does not let a server set num_rounds"):
        policy.merged("num_rounds=3")
    saved = Policy(SITE, policy.allow, policy.limits)
    saved.save(path)
    assert Policy.read(path) == Policy(list(SITE), policy.allow, policy.limits)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alow: [lr]", "must have no other keys than configuration, allow, limits"),
        ("allow: lr", "allow of a policy must be a list of texts, got lr"),
        ("allow: [1]", "allow of a policy must be a list of texts"),
        ("limits: {lr: high}", "limits.lr of a policy must be a number, got high"),
        ("limits: 3", "limits of a policy must be a number for each key, got 3"),
        ("- lr", "must have no other keys"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_policy(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Policy.read(tmp_path / "policy.yaml")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give --certificate and --key, or --insecure alone"),
        (["--insecure", "--certificate", "c"], "give --certificate and --key, or --insecure alone"),
        (["--certificate", "c", "--key", "k"], "--certificate: there is no c"),
        (["--insecure", "--data-path", "d"], "--data-path: there is no d"),
        (["--insecure", "--policy", "p"], "--policy: there is no p"),
        (["--insecure", "model=nothing"], "nothing"),
        (["--insecure", "model.path=${oc.env:HOME}"], "must hold no interpolation: model.path="),
    ],
)
def test_wrong_arguments_of_a_node(
    arguments: list[str], sentence: str, fedpeft: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        fedpeft("node", "--superlink", "127.0.0.1:1", "--partition", "0", *arguments)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
