"""The model card of an exported folder."""

from dataclasses import fields
from typing import Any

from fedpeft.export.run import FinishedRun
from fedpeft.reporting.observer import SPREAD

LOADS = {
    "peft": """import torch
from peft import PeftConfig, PeftModel
from transformers import {processor}, {auto}

processor = {processor}.from_pretrained("DIR")
source = PeftConfig.from_pretrained("DIR").base_model_name_or_path  # or your folder of the base
base = {auto}.from_pretrained(source, dtype=torch.{dtype}{labels})
{pad}{names}model = PeftModel.from_pretrained(base, "DIR").eval()""",
    "transformers": """from transformers import {processor}, {auto}

processor = {processor}.from_pretrained("DIR")
model = {auto}.from_pretrained("DIR").eval()""",
    "fedpeft": """import fedpeft
from transformers import {processor}

processor = {processor}.from_pretrained("DIR")
model = fedpeft.load("DIR")  # base="FOLDER" if the base model is elsewhere""",
}

ASKS = """

inputs = processor("A text to classify.", return_tensors="pt")
{within}print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])"""
# An adapter stays in float32, whatever the base model is in.
AUTOCAST = 'with torch.autocast("cpu", torch.{dtype}):  # because the adapter is in float32\n    '


def card(run: FinishedRun, form: str, difference: float) -> str:
    """Return the text of ``README.md``.

    Args:
        run: the run whose model is exported.
        form: the folder's form, one of ``FORMS``.
        difference: largest difference of a logit of the folder from the run's.
    """
    config, summary = run.config, run.summary
    name = type(config.method).__name__
    sections = [
        _front_matter(run, form),
        f"# {name} by federated fine-tuning\n\n{_sentence(run)}",
        f"```python\n{_loading(run, form)}\n```",
        _table("Made of", _facts(run)),
        _table("Measures", _numbers(_main(run.measures))),
        _table("Bytes of all rounds", _numbers(summary["bytes"])),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(run, difference)),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(run: FinishedRun, form: str) -> str:
    library = "peft" if form == "peft" else "transformers"
    lines = [f"library_name: {library}", "tags: [fedpeft, federated-learning]"]
    if not run.config.model.random:
        lines.insert(0, f"base_model: {_base(run)}")
    return "---\n" + "\n".join(lines) + "\n---"


def _base(run: FinishedRun) -> str:
    model = run.config.model
    return str(model.path or model.package or model.architecture.get("model_type"))


def _sentence(run: FinishedRun) -> str:
    kind = "best" if run.best else "last"
    whose = (
        "the model of all clients" if run.client is None else f"the model of client {run.client}"
    )
    return (
        f"This is {whose} after round {run.measures['round']}, the {kind} of a run of "
        f"{run.config.num_rounds} rounds with {run.config.num_clients} clients."
    )


def _loading(run: FinishedRun, form: str) -> str:
    task = run.config.data
    reads_text = task.needs == "tokenizer"
    labels = task.label_names
    loading = LOADS[form].format(
        processor="AutoTokenizer" if reads_text else "AutoImageProcessor",
        auto=task.auto_class,
        dtype=run.config.model.dtype,
        labels="" if task.num_labels is None else _labels(task.num_labels),
        pad="base.config.pad_token_id = processor.pad_token_id\n" if reads_text else "",
        names=f"base.config.id2label = {dict(enumerate(labels))}\n" if labels else "",
    )
    mixed = form == "peft" and run.config.model.dtype != "float32"
    within = AUTOCAST.format(dtype=run.config.model.dtype) if mixed else ""
    return loading + (ASKS.format(within=within) if reads_text and labels else "")


def _labels(count: int) -> str:
    """Return the arguments of a head; the base model's may have another number of labels."""
    return f", num_labels={count}, ignore_mismatched_sizes=True"


def _facts(run: FinishedRun) -> dict[str, Any]:
    config, summary = run.config, run.summary
    data = summary["data"]
    labels = config.data.label_names
    return {
        "base model": _base(run),
        "revision": config.model.revision,
        "sha256 of its weights": _weights(run),
        "method": _named(config.method),
        "task": type(config.data).__name__,
        "labels": None if labels is None else ", ".join(labels),
        "rows": ", ".join(f"{split} {count}" for split, count in data["rows"].items()),
        "sha256 of the rows": data["sha256"],
        "partition": _named(config.partition),
        "strategy": type(config.strategy).__name__,
        "seed": config.seed,
        "learning rate": config.lr,
        "sha256 of the shared state": summary["shared_state_sha256"],
        "versions": ", ".join(f"{name} {v}" for name, v in summary["versions"].items()),
    }


def _weights(run: FinishedRun) -> str:
    """Return the hash of the base model's weights, or why there is none."""
    if run.config.model.random:
        return "none, because they were random"
    return run.summary["weights_sha256"] or "unknown"


def _named(part: Any) -> str:
    """Return the class and the fields of a part of the configuration, without a file's path.

    The card may be published, and a path says how folders of this machine are named.
    """
    shown = [f.name for f in fields(part) if f.name != "file"]
    values = ", ".join(f"{name}={getattr(part, name)}" for name in shown)
    return f"{type(part).__name__}({values})"


def _main(measures: dict[str, Any]) -> dict[str, Any]:
    """Return the measures without their spread over the clients, which the run's summary has."""
    return {name: value for name, value in measures.items() if not name.endswith(SPREAD)}


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Return numbers as text; a summary has null for a number that was not finite."""
    return {name: _number(value) for name, value in values.items()}


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _table(title: str, rows: dict[str, Any]) -> str:
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows.items() if value is not None]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _limits(run: FinishedRun, difference: float) -> list[str]:
    lines = [
        f"Loaded again, the folder gives the run's logits within {difference:.1e} on made-up rows.",
        "One seed. The measures are of this run alone and say nothing of rows of another kind.",
        "What clients shared, and so this model, may reveal something of their rows.",
    ]
    if run.config.model.random:
        lines.append("The base model had random weights: this is a dry run and no model to use.")
    if run.config.model.load_in is not None:
        lines.append(f"Trained on a base of model.load_in={run.config.model.load_in}.")
    if run.client is not None:
        lines.append("Fitted to one client's rows; the measures are means over all clients.")
    return lines
