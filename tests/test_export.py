"""Exported folders give the run's logits, whoever loads them; commands answer and measure."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from flwr.app import Context, Message
from safetensors.torch import load_file, save_file
from torch import Tensor

import fedpeft as package
from fedpeft.client.app import app as client_app
from fedpeft.commands import model as commands
from fedpeft.config.compose import CONF, composed
from fedpeft.config.load import typed
from fedpeft.data.clients import ClientRows
from fedpeft.data.partitions.saved import Saved
from fedpeft.engine.evaluate import scored
from fedpeft.export import folder as files
from fedpeft.export.card import _named
from fedpeft.export.load import opened
from fedpeft.export.run import FinishedRun, open_run
from fedpeft.export.write import _processor, export
from fedpeft.methods.base import Method
from fedpeft.methods.ia3 import IA3
from fedpeft.methods.lora import LoRA
from fedpeft.methods.parts.exported import INNER
from fedpeft.methods.prompt import Prompt
from fedpeft.methods.ravan import Ravan
from fedpeft.methods.scl import SCL
from fedpeft.reporting.run_files import CHECKPOINTS
from fedpeft.server.checkpoint import Checkpoints
from fedpeft.server.selection import Selection
from fedpeft.simulation import launch
from fedpeft.simulation.grid import InProcessGrid
from fedpeft.state import read, save
from tests.conftest import ROOT, Runner, Stopping, quiet, with_fields
from tests.data.files import image, write
from tests.expected.architectures import logits, tiny
from tests.expected.methods import PERSONAL

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
BY_PEFT = {
    *("lora", "ffa_lora", "fedsa_lora", "rolora", "fedsvd", "fedrot_lora", "lora_fair", "flasc"),
    *("flexlora", "hetlora", "federa", "slora", "dora", "ditto", "feddpa", "fed_sb", "ravan"),
    *("ia3", "prompt", "fedprompt", "p_tuning", "prefix", "scl"),
}
VIRTUAL = {"prompt", "fedprompt", "p_tuning", "prefix"}
OWN = {"fedtt", "fedtt_plus", "adapter"}
WITHOUT_COMMON = {"fedsa_lora"}
OF_ALL = [(method, None) for method in METHODS if method not in WITHOUT_COMMON]
OF_ONE = [(method, 1) for method in sorted(PERSONAL)]
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT's own use
)
Finished = Callable[..., Path]
Command = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for this file's runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def finished(base: list[str], folder: Path) -> Finished:
    """``finished("lora", ...)`` gives the directory of a method's run, made once."""

    def run(method: str, *overrides: str) -> Path:
        path = folder / "_".join([method, *overrides]).replace("=", "_")
        if not path.exists():
            fields = [f"method={method}", "evaluation.interference=false", *overrides]
            launch.run(with_fields(base, [*fields, f"run_dir={path}"]), quiet())
        return path

    return run


def rows_of(checkpoint: Path) -> dict[str, Tensor]:
    """Return a padded batch of two rows."""
    from transformers import AutoTokenizer

    texts = ["the bread and the soup were very salt", "rain in the city"]
    encoded = AutoTokenizer.from_pretrained(checkpoint)(texts, padding=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def of_run(run: FinishedRun, rows: dict[str, Tensor]) -> Tensor:
    """Return the logits of a run's model, which must be another than the start."""
    logits = run.replica.model(**rows).logits
    values = run.replica.values()
    trained = {n: p.detach().clone() for n, p in run.replica.model.named_parameters()}
    run.replica.load()
    start = run.replica.model(**rows).logits
    run.replica.load({name: trained[name] for name in values})
    run.config.method.arrange(run.replica.model, run.setting)
    assert (logits - start).abs().max() > 1e-3
    return logits


@torch.no_grad()
def of_folder(folder: Path, form: str, checkpoint: Path, rows: dict[str, Tensor]) -> Tensor:
    """Return the logits of a folder as others load it; fedpeft loads its own form alone."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification as Auto

    if form == "fedpeft":
        model: Any = package.load(folder)
    elif form == "transformers":
        model = Auto.from_pretrained(folder)
    else:
        model = PeftModel.from_pretrained(
            Auto.from_pretrained(checkpoint, num_labels=4), str(folder)
        )
    return model.eval()(**rows).logits


def forms_of(method: str) -> set[str]:
    """Return the forms that a method has, by hand."""
    forms = {"fedpeft"}
    forms |= {"peft"} if method in BY_PEFT else set()
    return forms | ({"transformers"} if method not in OWN | VIRTUAL else set())


@pytest.mark.matrix
@pytest.mark.parametrize(("method", "client"), [*OF_ALL, *OF_ONE])
def test_every_form_of_a_method_gives_the_run_s_logits(
    method: str, client: int | None, finished: Finished, checkpoint: Path, tmp_path: Path
) -> None:
    path, rows = finished(method), rows_of(checkpoint)
    for form in ("fedpeft", "peft", "transformers"):  # the last one folds the run's model
        run = open_run(path, client=client)
        if form not in forms_of(method):
            with pytest.raises(ValueError, match="; possible is --as .*fedpeft"):
                export(run, tmp_path / form, form)
            continue
        expected = of_run(run, rows)
        assert export(run, tmp_path / form, form).difference < 1e-5
        actual = of_folder(tmp_path / form, form, checkpoint, rows)
        assert (actual - expected).abs().max() < 1e-5


LOADED = """
import json, sys
from pathlib import Path
import fedpeft
from safetensors.torch import load_file

job = json.loads(sys.stdin.read())
rows = load_file(job["rows"])
differences = {}
for name, form in job["folders"].items():
    folder = Path(job["folder"]) / name
    if form == "fedpeft":
        model = fedpeft.load(folder)
    else:
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification as Auto
        source = folder if form == "transformers" else job["checkpoint"]
        model = Auto.from_pretrained(source, num_labels=4)
        if form == "peft":
            model = PeftModel.from_pretrained(model, str(folder))
    expected = load_file(folder.with_suffix(".safetensors"))["logits"]
    logits = model.eval()(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    differences[name] = float((logits - expected).abs().max())
packages = {name.split(".")[0] for name in sys.modules}
ours = {name for name in sys.modules if name.startswith(("fedpeft.server", "fedpeft.client"))}
print(json.dumps([differences, sorted(packages & {"flwr", "ray", "flwr_datasets"}), sorted(ours)]))
"""


@pytest.mark.slow
def test_a_fresh_process_loads_the_folders_of_all_methods_without_federation(
    finished: Finished, checkpoint: Path, tmp_path: Path
) -> None:
    rows, folders = rows_of(checkpoint), {}
    save_file(rows, tmp_path / "rows.safetensors")
    for method in METHODS:
        run = open_run(finished(method), client=0 if method in PERSONAL else None)
        logits = of_run(run, rows)
        written = export(run, tmp_path / method)
        save_file({"logits": logits}, tmp_path / f"{method}.safetensors")
        folders[method] = written.form
    assert set(folders.values()) == {"peft", "transformers", "fedpeft"}
    job = {"rows": str(tmp_path / "rows.safetensors"), "folders": folders}
    job |= {"folder": str(tmp_path), "checkpoint": str(checkpoint)}
    done = subprocess.run(
        [sys.executable, "-c", LOADED],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    differences, federation, ours = json.loads(done.stdout.splitlines()[-1])
    assert set(differences) == set(METHODS)
    assert max(differences.values()) < 1e-5
    assert (federation, ours) == ([], [])


# --- which model ----------------------------------------------------------------------------------


def test_a_model_that_stays_on_clients_needs_one(finished: Finished) -> None:
    path = finished("fedsa_lora")
    with pytest.raises(ValueError, match="^6 parameters stay on the clients .* --client, 0 to 2$"):
        open_run(path)
    with pytest.raises(ValueError, match="^--client must be from 0 to 2, got 3$"):
        open_run(path, client=3)


def test_a_client_s_model_is_the_one_that_it_keeps(finished: Finished) -> None:
    path = finished("fedsa_lora")
    (kept,) = path.glob("clients/*/client_1/00002.safetensors")
    own = load_file(kept)
    mine, other = (open_run(path, client=client).replica.model for client in (1, 2))
    assert all(torch.equal(mine.get_parameter(name), own[name]) for name in own)
    assert not any(torch.equal(other.get_parameter(name), own[name]) for name in own)


def test_a_client_s_state_that_lies_elsewhere_is_named_and_found(
    finished: Finished, tmp_path: Path, fedpeft: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run, states = tmp_path / "run", tmp_path / "node"
    shutil.copytree(finished("fedsa_lora"), run)
    expected = open_run(run, client=1).replica.model.state_dict()
    (run / "clients").rename(states)
    with pytest.raises(ValueError, match="lacks 00002.safetensors, .* the node's --state-folder"):
        open_run(run, client=1)
    found = open_run(run, client=1, states=states).replica.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    with pytest.raises(ValueError, match="^--state-folder .* choose one with --client$"):
        open_run(run, states=states)
    to = str(tmp_path / "out")
    fedpeft("export", str(run), "--client", "1", "--state-folder", str(states), "--to", to)
    with pytest.raises(SystemExit):
        fedpeft("predict", to, "--state-folder", str(states))
    assert "--state-folder choose one of a run" in capsys.readouterr().err


def test_best_is_the_best_round_s_state(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished("lora"), tmp_path / "run")
    last = read(tmp_path / "run" / "shared_state.safetensors")
    best = {name: value + 0.1 for name, value in last.items()}
    save(tmp_path / "run" / "best_shared_state.safetensors", best)
    for flag, state in ((False, last), (True, best)):
        model = open_run(tmp_path / "run", best=flag).replica.model
        assert all(torch.equal(model.get_parameter(name), state[name]) for name in state)


@pytest.mark.parametrize(
    ("fields", "round"),
    [(["num_rounds=6", "lr=0.1", "local_steps=6"], 3), (["lr=1e-7"], 0)],
)
def test_the_best_round_of_a_personal_method_can_be_measured_again(
    fields: list[str], round: int, finished: Finished
) -> None:
    """The best round's state and what clients kept after it give the summary's measures."""
    path = finished("fedsa_lora", *fields)
    summary = json.loads((path / "summary.json").read_text())
    assert summary["best"]["round"] == round < summary["final"]["round"]
    loss = rows = 0.0
    for client in range(3):
        run = open_run(path, best=True, client=client)
        examples = ClientRows(run.config, run.replica.processor, False).client_examples(client)
        measures, _ = scored(run.replica.model, run.config, run.replica.processor, examples["test"])
        loss += measures["loss"] * len(examples["test"].rows)
        rows += len(examples["test"].rows)
    assert loss / rows == pytest.approx(summary["best"]["client_test_loss"], abs=1e-6)
    assert abs(summary["final"]["client_test_loss"] - loss / rows) > 1e-9


@pytest.mark.matrix
@pytest.mark.parametrize(
    "fields",
    [
        ["layers=[0]"],
        ["frozen=head"],
        ["compression=int8"],
        ["method=flasc"],
        ["precision=bf16", "model.dtype=bfloat16"],
        ["model.gradient_checkpointing=true"],
        ["method=hetlora", "method.ranks=[2,4]", "method.prune=0.9"],
        ["method=p_tuning", "method.encoder=lstm"],
        ["method=prefix", "method.projection=true"],
    ],
)
def test_a_folder_has_the_run_s_measures(
    fields: list[str], base: list[str], table: Path, tmp_path: Path
) -> None:
    run_dir = f"run_dir={tmp_path / 'run'}"
    summary = launch.run(with_fields(base, [*fields, run_dir]), quiet())
    assert export(open_run(tmp_path / "run"), tmp_path / "out").form == "peft"
    again = commands.measured(opened(tmp_path / "out", [f"data.path={table}"]))
    assert again["test_loss"] == pytest.approx(summary["final"]["test_loss"], abs=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("fields", "client"),
    [
        (["personal=head"], 1),
        (["strategy=local_only"], 2),
        (["strategy=local_only", "method=ditto"], 1),
        (["method=hetlora", "method.ranks=[2,4]", "method.weighting=examples"], 0),
        (["method=hetlora", "method.prune=0.5", "method.penalty=99", "num_rounds=3"], 1),
        (["method=feddpa", "method.variant=after"], 1),
    ],
)
def test_a_client_s_model_has_the_measures_that_the_client_found(
    fields: list[str], client: int, base: list[str], run: Runner
) -> None:
    found: dict[str, float] = {}

    def answer(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if run.recorder.kind == "evaluate" and run.recorder.client == client:
            found.update(dict(reply.content.metric_records["metrics"]))  # type: ignore[arg-type]
        return reply

    class Grid(InProcessGrid):
        def __init__(self, num_clients: int, app: Any) -> None:
            super().__init__(num_clients, app)
            self.state_folder = Path(run.run_dir) / "clients"

    run(*fields, "evaluation.clients=always", answer=answer, grid=Grid)
    model = open_run(run.run_dir, client=client)
    rows = ClientRows(model.config, model.replica.processor, False).client_examples(client)
    metrics, _ = scored(model.replica.model, model.config, model.replica.processor, rows["test"])
    assert metrics["loss"] == pytest.approx(found["test_loss"], abs=1e-6)


def test_a_client_s_best_model_has_the_rank_of_the_best_round(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its factors were cut to the rank of the last round, because pruning goes on."""
    monkeypatch.setattr(Selection, "better", lambda _, line: line["round"] == 1)
    found: dict[int, Any] = {}

    def answer(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if run.recorder.kind == "evaluate" and run.recorder.client == 1:
            found[run.recorder.round] = reply.content.metric_records["metrics"]["test_loss"]
        return reply

    fields = ("method.prune=0.5", "method.penalty=1", "num_rounds=3", "lr=0.05")
    run("method=hetlora", *fields, "evaluation.clients=always", answer=answer)
    (last,) = Checkpoints(run.run_dir / CHECKPOINTS, 1).load()[-1:]
    ranks = [memory.get("ranks", {}) for memory in (last.best_method_memory, last.method_memory)]
    assert int(ranks[1]["1"]) < int(ranks[0].get("1", torch.tensor(4)))
    model = open_run(run.run_dir, best=True, client=1)
    rows = ClientRows(model.config, model.replica.processor, False).client_examples(1)
    metrics, _ = scored(model.replica.model, model.config, model.replica.processor, rows["test"])
    assert metrics["loss"] == pytest.approx(found[2], abs=1e-6)  # measured as of the next round


@pytest.mark.parametrize(
    "given",
    [
        ["method=fedsa_lora", "method.rank=4"],
        ["method=hetlora", "method.rank=4", "method.prune=0.5", "method.penalty=1", "lr=0.05"],
    ],
    ids=["kept parameters", "ranks"],
)
def test_a_client_s_best_model_survives_a_resume(
    given: list[str], base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round 2 is the best, and only the checkpoint of round 3 is left when the run goes on."""
    monkeypatch.setattr(Selection, "better", lambda _, line: line["round"] == 2)

    def go(folder: str, *more: str, stop: int = -1) -> Any:
        path = tmp_path / folder
        whole = [*base, *given, "num_rounds=5", "checkpoint.keep=1", f"run_dir={path}", *more]
        launch.run(whole, Stopping(stop))
        return [open_run(path, best=True, client=client).replica.model for client in range(3)]

    whole = go("whole")
    with pytest.raises(KeyboardInterrupt):
        go("broken", stop=4)
    for one, other in zip(whole, go("broken", "resume=true"), strict=True):
        torch.testing.assert_close(dict(one.named_parameters()), dict(other.named_parameters()))


def test_what_changed_beside_an_adapter_is_not_left_out(finished: Finished, tmp_path: Path) -> None:
    path = finished("slora", "method.sparse_rounds=2", "num_rounds=3")
    shutil.copytree(path, tmp_path / "run")
    first = tmp_path / "run" / "shared_state.safetensors"
    state = read(first)
    (name,) = [n for n in state if n.endswith("layer.0.attention.self.query.base_layer.values")]
    save(first, state | {name: state[name] + 1})
    with pytest.raises(ValueError, match="^HF PEFT cannot represent SLoRA .* transformers or fed"):
        export(open_run(tmp_path / "run"), tmp_path / "out", "peft")
    assert export(open_run(tmp_path / "run"), tmp_path / "out").form == "transformers"


# --- folders --------------------------------------------------------------------------------------


def test_tokenizer_labels_and_card_go_along(
    finished: Finished, checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    path = finished("lora")
    export(open_run(path), tmp_path / "plain", "transformers")
    export(open_run(path), tmp_path / "adapter")
    summary = json.loads((path / "summary.json").read_text())
    names = ["food", "music", "sport", "weather"]
    assert summary["labels"] == names
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert [config["id2label"][str(i)] for i in range(4)] == names
    assert config["label2id"] == {name: i for i, name in enumerate(names)}
    about = json.loads((tmp_path / "adapter/fedpeft.json").read_text())
    assert about["labels"] == names
    assert about["config"]["data"]["path"] is None
    adapter = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(checkpoint)
    assert adapter["modules_to_save"] == ["classifier"] and adapter["r"] == 4
    for form in ("plain", "adapter"):
        tokens = AutoTokenizer.from_pretrained(tmp_path / form)("bread soup")["input_ids"]
        assert len(tokens) == 4
        card = (tmp_path / form / "README.md").read_text()
        assert f"| sha256 of its weights | {summary['weights_sha256']} |" in card
        assert f"| test_accuracy | {summary['final']['test_accuracy']:.4f} |" in card
        assert f"| uplink_bytes | {summary['bytes']['uplink_bytes']:,} |" in card
        assert "after round 2, the last of a run of 2 rounds with 3 clients" in card
        assert not re.search("_(unweighted|worst|p10) ", card)
        assert not list((tmp_path / form).glob("chat_template*"))
        assert "chat_template" not in (tmp_path / form / "tokenizer_config.json").read_text()


def test_a_model_that_writes_keeps_its_chat_template() -> None:
    tokenizer = SimpleNamespace(chat_template="{{ messages }}")
    data = SimpleNamespace(auto_class="AutoModelForCausalLM", needs="tokenizer")
    run: Any = SimpleNamespace(
        config=SimpleNamespace(data=data), replica=SimpleNamespace(processor=tokenizer)
    )
    assert _processor(run) is tokenizer
    data.auto_class = "AutoModelForSequenceClassification"
    assert _processor(run).chat_template is None
    assert tokenizer.chat_template == "{{ messages }}"  # the run may go on to answer with it


def test_the_card_names_no_file_of_this_machine() -> None:
    assert (
        _named(Saved(file="/home/me/parts.json", column="ward")) == "Saved(column=ward, min_size=3)"
    )


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("lora", []),
        ("scl", []),
        ("fedtt", []),
        ("lora", ["model.dtype=bfloat16", "precision=bf16", "lr=0.05"]),  # not the files' own
    ],
)
def test_the_code_of_the_card_loads_the_folder_and_names_the_class(
    method: str,
    fields: list[str],
    finished: Finished,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Without a cache, because the weights change in place.
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=bool(fields), cache_enabled=False)
    run, rows = open_run(finished(method, *fields)), rows_of(checkpoint)
    with mixed:
        expected = of_run(run, rows)
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    code = code.replace("A text to classify.", "the bread and the soup were very salt")
    exec(code.replace("DIR", str(tmp_path / "out")), names)
    topics = ["food", "music", "sport", "weather"]
    assert capsys.readouterr().out == topics[int(expected[0].argmax())] + "\n"
    assert list(names["model"].config.id2label.values()) == topics
    with mixed:
        found = names["model"](**rows).logits
    assert (found - expected).abs().max() < (0.05 if fields else 1e-5)
    assert len(names["processor"]("bread soup")["input_ids"]) == 4


def test_a_pooled_classifier_and_a_random_base_load_by_fedpeft(
    finished: Finished, checkpoint: Path, tmp_path: Path
) -> None:
    rows = rows_of(checkpoint)
    run = open_run(finished("lora", "model.pooling=mean"))
    with pytest.raises(ValueError, match="^transformers has no class for model.pooling=mean; pos"):
        export(run, tmp_path / "plain", "transformers")
    assert export(run, tmp_path / "pooled").form == "fedpeft"
    assert torch.equal(package.load(tmp_path / "pooled")(**rows).logits, of_run(run, rows))
    run = open_run(finished("lora", "model.random=true"))
    with pytest.raises(ValueError, match="this one is of random weights; possible is --as transf"):
        export(run, tmp_path / "adapter", "peft")
    expected = of_run(run, rows)
    export(run, tmp_path / "random", "fedpeft")
    card = (tmp_path / "random" / "README.md").read_text()
    assert "| sha256 of its weights | none, because they were random |" in card
    unknown = replace(open_run(finished("lora")), summary=run.summary | {"weights_sha256": None})
    export(unknown, tmp_path / "unknown", "fedpeft")
    card = (tmp_path / "unknown" / "README.md").read_text()
    assert "| sha256 of its weights | unknown |" in card
    weights = read(tmp_path / "random" / "fedpeft.safetensors")
    assert weights.keys() == dict(run.replica.model.named_parameters()).keys()
    assert torch.equal(package.load(tmp_path / "random")(**rows).logits, expected)


SMALL = "hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, patch_size: 8"
OF_IMAGES = {
    "vit_base": (f"{{model_type: vit, intermediate_size: 64, image_size: 16, {SMALL}}}", "{}"),
    "dinov2_small": (  # its positions are of 32 pixels, and it reads images of 16
        f"{{model_type: dinov2, mlp_ratio: 2, image_size: 32, {SMALL}}}",
        "{size: {height: 16, width: 16}}",
    ),
}


@pytest.mark.parametrize("name", OF_IMAGES)
def test_a_model_of_images_on_random_weights(
    name: str, base: list[str], fedpeft: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    architecture, processor = OF_IMAGES[name]
    rows = [{"image": {"bytes": image(i), "path": "x.png"}, "label": i % 2} for i in range(24)]
    path = write(tmp_path / "rows", kind="parquet", train=rows, test=rows)
    fields = [f"model={name}", "model.path=nobody/vit", "model.random=true"]
    fields += [f"model.architecture={architecture}", f"model.images={processor}"]
    fields += ["data=images", f"data.path={path}", "data.labels=[cat,dog]", "method.rank=2"]
    fields += ["data.duplicates=keep", "partition=iid", f"run_dir={tmp_path / 'run'}"]
    summary = launch.run([*base, *fields], quiet())
    for form in ("transformers", "fedpeft"):
        out = str(tmp_path / form)
        fedpeft("export", str(tmp_path / "run"), "--to", out, "--as", form)
        again = json.loads(fedpeft("evaluate", out, "--json", f"data.path={path}"))
        assert again["test_loss"] == pytest.approx(summary["final"]["test_loss"], abs=1e-5)
        size = json.loads((tmp_path / form / "preprocessor_config.json").read_text())["size"]
        assert size == {"height": 16, "width": 16}
    (tmp_path / "x.png").write_bytes(image(3))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{tmp_path / 'x.png'}\n"))
    answer = json.loads(fedpeft("predict", out))
    assert set(answer["probabilities"]) == {"cat", "dog"}


def test_a_base_model_that_moved(finished: Finished, checkpoint: Path, tmp_path: Path) -> None:
    export(open_run(finished("fedtt")), tmp_path / "out")
    moved = shutil.copytree(checkpoint, tmp_path / "moved model")
    about = json.loads((tmp_path / "out/fedpeft.json").read_text())
    about["config"]["model"]["path"] = "/nowhere"
    (tmp_path / "out/fedpeft.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="model.path=/nowhere is no folder with a config.json"):
        package.load(tmp_path / "out")
    rows = rows_of(checkpoint)
    model = package.load(tmp_path / "out", base=str(moved))
    expected = open_run(finished("fedtt")).replica.model(**rows).logits
    assert torch.equal(model(**rows).logits, expected)


def test_relative_paths_hold_from_every_folder(
    base: list[str],
    fedpeft: Command,
    checkpoint: Path,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run's relative paths start where the run did, and an exported folder has absolute ones."""
    shutil.copytree(checkpoint, tmp_path / "mini")
    (tmp_path / "rows").symlink_to(table)
    paths = ["model.path=mini", "data.path=rows", "run_dir=run"]
    final = json.loads(fedpeft("run", "--json", *base, *paths, "num_rounds=1"))["final"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    measured = json.loads(fedpeft("evaluate", str(tmp_path / "run"), "--json"))
    assert measured["test_loss"] == final["test_loss"]
    fedpeft("export", str(tmp_path / "run"), "--to", "out")
    about = json.loads(Path("out/fedpeft.json").read_text())
    assert about["config"]["model"]["path"] == str(tmp_path / "mini")
    assert package.load("out") is not None


def test_a_folder_that_would_differ_is_not_left_behind(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LoRA.peft_form

    def doubled(self: LoRA, model: Any, start: Any) -> Any:
        form = whole(self, model, start)
        assert form is not None
        return replace(form, tensors={n: v * 2 for n, v in form.tensors.items()})

    monkeypatch.setattr(LoRA, "peft_form", doubled)
    run = open_run(finished("lora"))
    with pytest.raises(
        ValueError, match="would give other logits than the run, by .* --as fedpeft"
    ):
        export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_a_package_has_no_path(tmp_path: Path) -> None:
    """The default model and rows come with packages, so their YAML names no folder."""
    names = [str(number) for number in range(10)]
    files.write(tmp_path, "fedpeft", composed(()), setting="", labels=names)
    config = typed(files.tree_of(files.read(tmp_path)))
    assert config.model == typed(composed(())).model and config.model.path is None
    assert config.data.label_names == names and config.data.num_labels == 10


def test_what_cannot_be_exported_is_refused(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ValueError, match="full must be a new or an empty folder"):
        export(open_run(finished("lora")), tmp_path / "full")
    with pytest.raises(ValueError, match="neither a finished run .* nor an exported folder"):
        open_run(tmp_path / "full")
    with pytest.raises(ValueError, match="is no exported folder: it has no fedpeft.json"):
        package.load(tmp_path / "full")


# --- other architectures --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [LoRA(rank=2), IA3(), SCL(rank=4), Ravan(2, ["q", "o"], heads=2)]
)
def test_a_transposed_weight_takes_the_change(method: Method) -> None:
    """GPT-2 holds its weights as (in, out)."""
    model: Any = tiny("gpt2")
    plain = set(model.state_dict())
    model = method.inject(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    expected = logits(model)
    folded = method.folded(model)
    assert set(folded.state_dict()) == plain
    assert (logits(folded) - expected).abs().max() < 1e-5
    assert (logits(tiny("gpt2")) - expected).abs().max() > 1e-3


def test_only_a_residual_layer_is_a_lora() -> None:
    model = SCL(rank=4, init="residual").inject(tiny("gpt2"))
    form = SCL(rank=4, init="residual").peft_form(model, {})
    assert form is not None and form.tensors[
        f"{INNER}transformer.h.0.mlp.c_proj.lora_A.weight"
    ].shape == (4, 96)
    assert (
        SCL(rank=4, init="svd").peft_form(SCL(rank=4, init="svd").inject(tiny("gpt2")), {}) is None
    )


def test_a_decoder_with_a_head_needs_ids() -> None:
    """PEFT passes it vectors alone, so it would read padding."""
    method = Prompt(num_tokens=3)
    assert method.peft_form(method.inject(tiny("llama")), {}) is None
    assert method.peft_form(method.inject(tiny("llama_lm")), {}) is not None
    assert method.peft_form(method.inject(tiny("bert")), {}) is not None


# --- commands -------------------------------------------------------------------------------------


def test_evaluate_gives_the_summary_s_measures_of_a_run_and_of_its_folder(
    finished: Finished, fedpeft: Command, table: Path
) -> None:
    path = finished("lora")
    said = fedpeft("export", str(path), "--to", "out")
    assert said.startswith("out holds the form peft: PeftModel.from_pretrained(base, DIR), as its ")
    final = json.loads((path / "summary.json").read_text())["final"]
    of_run = json.loads(fedpeft("evaluate", str(path), "--json"))
    tested = {k: v for k, v in final.items() if k.startswith("test_")}
    assert of_run == pytest.approx({**tested, "test_rows": 40})
    assert set(of_run) == {"test_loss", "test_accuracy", "test_f1_macro", "test_rows"}
    again = json.loads(fedpeft("evaluate", "out", "--json", f"data.path={table}"))
    assert again == pytest.approx(of_run, abs=1e-6)
    other = ["data=table", f"data.path={table}", "data.test_split=validation"]
    elsewhere = fedpeft("evaluate", "out", *other)
    validated = json.loads((path / "summary.json").read_text())["final"]["validation_accuracy"]
    assert f"test_accuracy: {validated:.4f}\n" in elsewhere and "test_rows: 40\n" in elsewhere


def test_a_new_table_without_a_test_split_is_measured_whole(
    finished: Finished, fedpeft: Command, table: Path
) -> None:
    path = str(finished("lora"))
    rows = pq.read_table(table / "validation.parquet")
    pq.write_table(rows, "new.parquet")
    new = json.loads(fedpeft("evaluate", path, "--json", "data.path=new.parquet"))
    same = ["data.path=new.parquet", "data.test_split=train"]
    assert new == json.loads(fedpeft("evaluate", path, "--json", *same))
    assert new["test_rows"] == 40
    apart = json.loads(fedpeft("evaluate", path, "--json", *same[:1], "data.test_split=null"))
    assert apart["test_rows"] == 4  # a tenth is set aside, as in training


def test_the_file_that_a_run_was_trained_on_is_measured_on_its_test_rows(
    base: list[str],
    fedpeft: Command,
    table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = pq.read_table(table / "train.parquet")
    pq.write_table(rows, tmp_path / "notes.parquet")
    pq.write_table(rows, tmp_path / "copy.parquet")
    pq.write_table(rows.slice(1), tmp_path / "other.parquet")
    pq.write_table(rows.slice(0, 1), tmp_path / "one.parquet")
    run = str(tmp_path / "run")
    given = [f"data.path={tmp_path / 'notes.parquet'}", "num_rounds=1", f"run_dir={run}"]
    final = launch.run([*base, *given], quiet())["final"]
    fedpeft("export", run, "--to", "out")
    for model in (run, "out"):
        for name, count in {"notes": 24, "copy": 24, "other": 239, "one": 1}.items():
            path = f"data.path={tmp_path / name}.parquet"
            commands.evaluate([model, "--json", path])
            out, err = capsys.readouterr()
            assert (measures := json.loads(out))["test_rows"] == count
            said = "so only the rows that the run set aside for its test are measured\n"
            assert err.endswith(said) == (count == 24)
            if count == 24:
                assert measures["test_accuracy"] == pytest.approx(final["test_accuracy"])


def test_a_limit_of_the_run_s_test_rows_is_none_of_a_new_set(
    finished: Finished, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, new = finished("lora", "data.max_test_rows=5"), table.parent / "new.parquet"
    pq.write_table(pq.read_table(table / "test.parquet").slice(0, 20), new)
    for own, count, said in (([], 20, "all rows"), (["data.max_test_rows=7"], 7, "at most 7 rows")):
        capsys.readouterr()
        commands.evaluate([str(run), "--json", f"data.path={new}", *own])
        out, err = capsys.readouterr()
        assert json.loads(out)["test_rows"] == count
        assert f"has no split test, so {said} are measured, " in err
    folder = tmp_path / "tested"
    folder.mkdir()
    for split in ("train", "test"):
        pq.write_table(pq.read_table(new), folder / f"{split}.parquet")
    commands.evaluate([str(run), "--json", f"data.path={folder}"])
    assert json.loads(capsys.readouterr().out)["test_rows"] == 20


@pytest.mark.parametrize("split", [[], ["data.test_split=train"]])
@pytest.mark.parametrize("rename", [str.upper, str])
def test_evaluate_says_which_class_another_name_of_a_new_set_counts_as(
    rename: Callable[[str], str],
    split: list[str],
    finished: Finished,
    table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, rows = finished("lora"), pq.read_table(table / "test.parquet").to_pydict()
    names = sorted(set(rows["label"]))
    numbered = rows | {"label": [names.index(name) for name in rows["label"]]}
    features = Features({"text": Value("string"), "label": ClassLabel(names=[*map(rename, names)])})
    new = tmp_path / "new.parquet"
    Dataset.from_dict(numbered, features=features).to_parquet(new)
    commands.evaluate([str(run), "--json", f"data.path={new}", *split])
    out, err = capsys.readouterr()
    final = json.loads((run / "summary.json").read_text())["final"]
    assert json.loads(out)["test_accuracy"] == pytest.approx(final["test_accuracy"])
    said = f"{names[0].upper()} counts as {names[0]}, {names[1].upper()} counts as {names[1]}, "
    assert (said in err) == (rename is str.upper)


def test_evaluate_measures_in_the_precision_of_the_run(
    finished: Finished, fedpeft: Command
) -> None:
    path = finished("lora", "precision=bf16")
    final = json.loads((path / "summary.json").read_text())["final"]
    of_run = json.loads(fedpeft("evaluate", str(path), "--json"))
    assert of_run["test_loss"] == final["test_loss"]
    in_float32 = json.loads(fedpeft("evaluate", str(path), "--json", "precision=fp32"))
    assert in_float32["test_loss"] != final["test_loss"]


def test_commands_of_the_page(
    finished: Finished,
    fedpeft: Command,
    table: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = (ROOT / "docs" / "export.md").read_text()
    block = page.partition("```bash")[2].partition("\n```")[0]  # the others are for other machines
    lines = re.findall(r"^fedpeft ([^#\n]*)", block, re.MULTILINE)
    assert len(lines) == 7
    for link, target in (("runs/mine", finished("lora")), ("data/table", table)):
        Path(link).parent.mkdir()
        Path(link).symlink_to(target)
    for line in lines:
        command, _, source = line.partition("<")
        if source:
            monkeypatch.setattr("sys.stdin", io.StringIO("bread\n"))
        assert fedpeft(*shlex.split(command))
    assert {path.name for path in Path("out").iterdir()} == {"adapter", "plain", "best", "client"}


def test_a_folder_s_metric_that_is_a_module_is_not_run(finished: Finished, tmp_path: Path) -> None:
    export(open_run(finished("lora")), tmp_path / "out")
    about = json.loads((tmp_path / "out/fedpeft.json").read_text())
    for metrics, expected in (
        (["/folder/mine", "f1_macro"], ["f1_macro"]),
        (["/folder/mine"], ["accuracy", "f1_macro"]),
    ):
        about["config"]["data"]["metrics"] = metrics
        (tmp_path / "out/fedpeft.json").write_text(json.dumps(about))
        assert opened(tmp_path / "out").config.data.metrics == expected
    about["config"]["method"]["_target_"] = "os.system"
    (tmp_path / "out/fedpeft.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="method._target_ must be a class of fedpeft, got os.sys"):
        opened(tmp_path / "out")


def test_merge_folds(finished: Finished, fedpeft: Command) -> None:
    said = json.loads(fedpeft("export", str(finished("lora")), "--merge", "--json", "--to", "out"))
    assert said["form"] == "transformers" and Path("out/model.safetensors").is_file()
    with pytest.raises(SystemExit):
        fedpeft("export", str(finished("lora")), "--merge", "--as", "peft", "--to", "other")


def test_predict_answers_each_line(
    finished: Finished, fedpeft: Command, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    path, rows = finished("lora"), rows_of(checkpoint)
    texts = ["the bread and the soup were very salt", '{"text": "rain in the city"}']
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n".join(texts) + "\n"))
    first, empty, second = map(json.loads, fedpeft("predict", str(path)).splitlines())
    assert empty is None
    answers = [first, second]
    names = ["food", "music", "sport", "weather"]
    expected = open_run(path).replica.model(**rows).logits.softmax(-1)
    for answer, shares in zip(answers, expected.tolist(), strict=True):
        assert answer["probabilities"] == pytest.approx(
            dict(zip(names, shares, strict=True)), abs=1e-5
        )
        assert answer["label"] == names[shares.index(max(shares))]


def test_a_line_that_is_no_question_is_named(
    finished: Finished,
    fedpeft: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(commands, "AT_ONCE", 1)
    for lines, fault in ((b"\nGr\xfc\xdfe\n", "line 2 is not UTF-8"), (b'{"a": 1}\n', "with text")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="ascii"))
        with pytest.raises(SystemExit):
            fedpeft("predict", str(finished("lora")))
        assert fault in capsys.readouterr().err


def test_class_names_of_other_rows_must_be_as_many(finished: Finished) -> None:
    with pytest.raises(ValueError, match="data.labels must name the model's 4 classes, got 2"):
        open_run(finished("lora"), ["data.labels=[a,b]"])
