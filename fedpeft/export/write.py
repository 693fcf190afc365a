"""The folders that ``fedpeft export`` writes, and the check that they give the run's logits."""

import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PromptLearningConfig, TaskType
from safetensors.torch import save_file

from fedpeft.engine.replica import injected
from fedpeft.export import folder as files
from fedpeft.export.card import card
from fedpeft.export.load import opened
from fedpeft.export.run import FinishedRun
from fedpeft.export.verify import difference, logits, made_up
from fedpeft.methods.parts.exported import INNER, PeftForm
from fedpeft.models.sites import head_names
from fedpeft.state import save

HOW = {
    "peft": "PeftModel.from_pretrained(base, DIR), as its README.md shows, or fedpeft.load(DIR)",
    "transformers": "AutoModel....from_pretrained(DIR)",
    "fedpeft": "fedpeft.load(DIR)",
}

Writer = Callable[[Path], None]


class _Impossible(ValueError):
    """A method, or a base model, does not have a form."""


class Written(NamedTuple):
    """An exported folder.

    Attributes:
        folder: the folder.
        form: one of ``FORMS``.
        difference: largest difference of a logit from the run's, on made-up rows.
    """

    folder: Path
    form: str
    difference: float


def export(run: FinishedRun, to: Path, form: str | None = None) -> Written:
    """Write a run's model into a folder, load it again and compare logits.

    Args:
        run: the run whose model is written.
        to: the folder; it must not hold anything yet.
        form: one of ``FORMS``; null for the first form that the method has.

    Raises:
        ValueError: the folder is not empty, the method has no such form, or what was written gives
            other logits.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"--to {to} must be a new or an empty folder")
    draft = to.absolute().with_name(f".{to.absolute().name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        written = _written(run, draft, form)
        draft.replace(to)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return written._replace(folder=to)


def _written(run: FinishedRun, draft: Path, form: str | None) -> Written:
    inputs, precision = made_up(run), run.replica.config.precision
    expected = logits(run.replica.model, inputs, precision)
    chosen, save_weights = _plan(run, form)
    labels = run.config.data.label_names
    save_weights(draft)
    _processor(run).save_pretrained(draft)
    files.write(
        draft,
        chosen,
        run.tree,
        setting=run.setting if chosen == "fedpeft" else "",
        labels=labels,
        rows_sha256=run.summary["data"]["sha256"],
        weights_sha256=run.summary.get("weights_sha256"),
    )
    largest = difference(logits(opened(draft).model, inputs, precision), expected, run)
    (draft / "README.md").write_text(card(run, chosen, largest))
    return Written(draft, chosen, largest)


def _processor(run: FinishedRun) -> Any:
    """Return the tokenizer or image processor; only a model that writes has a chat template."""
    processor = run.replica.processor
    if run.config.data.auto_class == "AutoModelForCausalLM" or run.config.data.needs != "tokenizer":
        return processor
    processor = deepcopy(processor)
    processor.chat_template = None
    return processor


def _plan(run: FinishedRun, form: str | None) -> tuple[str, Writer]:
    """Return the form and a function that writes the weights.

    Raises:
        ValueError: the method does not have the form that is asked for.
    """
    reasons: dict[str, str] = {}
    for candidate in files.FORMS if form is None else (form,):
        try:
            return candidate, _WRITERS[candidate](run)
        except _Impossible as error:
            reasons[candidate] = str(error)
    assert form is not None, reasons  # fedpeft's own form is always possible
    raise ValueError(f"{reasons[form]}; {_advice(run, form)}")


def _advice(run: FinishedRun, form: str) -> str:
    possible = []
    for other in files.FORMS:
        try:
            if other != form:
                _WRITERS[other](run)
                possible.append(other)
        except _Impossible:
            pass
    return f"possible is --as {' or '.join(possible)}"


def _peft(run: FinishedRun) -> Writer:
    _check_base(run)
    name = type(run.config.method).__name__
    if run.config.model.random:
        raise _Impossible(
            "HF PEFT's folder names its base model, and this one is of random weights"
        )
    form = run.config.method.peft_form(run.replica.model, run.replica.initial)
    if form is None:
        raise _Impossible(f"HF PEFT cannot represent {name} on this model after this run")
    return lambda folder: _save_peft(run, form, folder)


def _save_peft(run: FinishedRun, form: PeftForm, folder: Path) -> None:
    model: Any = run.replica.model
    inner = getattr(model, "inner", model)
    config: Any = deepcopy(form.config)
    heads = head_names(inner)
    source = run.config.model.source()
    config.base_model_name_or_path = (
        str(Path(source).resolve()) if Path(source).is_dir() else source
    )
    config.revision = run.config.model.revision
    kinds = {
        "AutoModelForSequenceClassification": TaskType.SEQ_CLS,
        "AutoModelForCausalLM": TaskType.CAUSAL_LM,
    }
    config.task_type = kinds.get(run.config.data.auto_class)
    config.modules_to_save = heads or None
    config.inference_mode = True
    prefix = "base_model." if isinstance(config, PromptLearningConfig) else INNER
    tensors = dict(form.tensors)
    for head in heads:
        for name, value in inner.get_submodule(head).state_dict().items():
            tensors[f"{prefix}{head}.{name}"] = value
    config.save_pretrained(str(folder))
    whole = {n: v.detach().cpu().contiguous().clone() for n, v in tensors.items()}
    save_file(whole, folder / "adapter_model.safetensors", {"format": "pt"})


def _check_base(run: FinishedRun) -> None:
    """Refuse a classifier that transformers has no class for.

    Raises:
        _Impossible: this is one.
    """
    pooling = run.config.model.pooling
    if pooling is not None and run.config.data.num_labels is not None:
        raise _Impossible(f"transformers has no class for model.pooling={pooling}")


def _plain(run: FinishedRun) -> Writer:
    _check_base(run)
    config, task, method = run.config.model, run.config.data, run.config.method
    if config.load_in is not None:
        raise _Impossible(
            f"a plain folder would not hold weights of model.load_in={config.load_in}"
        )
    model = config.build_meta(task.auto_class, task.num_labels)
    known = set(model.state_dict())
    with torch.device("meta"):
        model = method.folded(injected(run.config, model))
    if strange := [name for name in model.state_dict() if name not in known]:
        raise _Impossible(
            f"a plain transformers model has no place for what {type(method).__name__} adds, such "
            f"as {strange[0]}"
        )
    return lambda folder: _save_plain(run, folder)


def _save_plain(run: FinishedRun, folder: Path) -> None:
    """Fold the method into the model, which is no longer the run's then, and save it."""
    model: Any = run.config.method.folded(run.replica.model)
    files.name_labels(model, run.config.data.label_names)
    model.save_pretrained(folder)


def _own(run: FinishedRun) -> Writer:
    model = run.replica.model
    whole = dict(model.named_parameters()) if run.config.model.random else run.replica.added()
    return lambda folder: save(folder / files.WEIGHTS, {n: p.detach() for n, p in whole.items()})


_WRITERS: dict[str, Callable[[FinishedRun], Writer]] = {
    "peft": _peft,
    "transformers": _plain,
    "fedpeft": _own,
}
