"""The model card of an exported folder."""

from typing import Any

from fedpeft.export.run import FinishedRun

LOADS = {
    "peft": """from peft import PeftModel
from transformers import AutoTokenizer, {auto}

tokenizer = AutoTokenizer.from_pretrained("DIR")
base = {auto}.from_pretrained("{base}"{labels})
base.config.pad_token_id = tokenizer.pad_token_id
model = PeftModel.from_pretrained(base, "DIR").eval()""",
    "transformers": """from transformers import {auto}

model = {auto}.from_pretrained("DIR").eval()""",
    "fedpeft": """import fedpeft

model = fedpeft.load("DIR")  # base="FOLDER" where the base model is not at {base}""",
}


def card(run: FinishedRun, form: str, difference: float) -> str:
    """Return the text of ``README.md``.

    Args:
        run: the model.
        form: of the folder.
        difference: largest difference of a logit of the folder from the run's.
    """
    config, summary = run.config, run.summary
    name = type(config.method).__name__
    sections = [
        _front_matter(run, form),
        f"# {name} by federated fine-tuning\n\n{_sentence(run)}",
        f"```python\n{_loading(run, form)}\n```",
        _table("Made of", _facts(run)),
        _table("Measures", _numbers(run.measures)),
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
    count = run.config.data.num_labels
    labels = "" if count is None else f", num_labels={count}"
    auto = run.config.data.auto_class
    text = LOADS[form].format(auto=auto, base=_base(run), labels=labels)
    if run.config.data.needs != "tokenizer":
        text = "\n".join(
            line for line in text.split("\n") if "okenizer" not in line or "peft" in line
        )
    return text


def _facts(run: FinishedRun) -> dict[str, Any]:
    config, summary = run.config, run.summary
    data, fields = summary["data"], vars(config.method)
    labels = getattr(config.data, "label_names", None)
    return {
        "base model": _base(run),
        "revision": config.model.revision,
        "sha256 of its weights": summary["weights_sha256"] or "random weights",
        "method": f"{type(config.method).__name__} {fields}",
        "task": type(config.data).__name__,
        "labels": None if labels is None else ", ".join(labels),
        "rows": ", ".join(f"{split} {count}" for split, count in data["rows"].items()),
        "sha256 of the rows": data["sha256"],
        "partition": f"{type(config.partition).__name__} {vars(config.partition)}",
        "strategy": type(config.strategy).__name__,
        "seed": config.seed,
        "learning rate": config.lr,
        "sha256 of the shared state": summary["shared_state_sha256"],
        "versions": ", ".join(f"{name} {v}" for name, v in summary["versions"].items()),
    }


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    return {k: f"{v:.4f}" if isinstance(v, float) else f"{v:,}" for k, v in values.items() if v}


def _table(title: str, rows: dict[str, Any]) -> str:
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows.items() if value is not None]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\\\|")


def _limits(run: FinishedRun, difference: float) -> list[str]:
    lines = [
        f"Loaded again, the folder gives the run's logits within {difference:.1e} on made-up rows.",
        "One seed. The measures are of this run alone and say nothing of rows of another kind.",
        "No differential privacy: what was shared may reveal something of the clients' rows.",
    ]
    if run.config.model.random:
        lines.append("The base model had random weights: this is a dry run and no model to use.")
    if run.config.model.load_in is not None:
        lines.append(f"Trained on a base of model.load_in={run.config.model.load_in}.")
    if run.client is not None:
        lines.append("Fitted to one client's rows; the measures are means over all clients.")
    return lines
