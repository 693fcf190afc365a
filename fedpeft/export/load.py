"""Loading an exported folder: ``fedpeft.load(folder)``. Nothing here knows of federation."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel, PeftType
from torch import nn

from fedpeft.config.load import typed
from fedpeft.config.overrides import quoted
from fedpeft.config.schema import Config
from fedpeft.engine.replica import injected
from fedpeft.export import folder as files
from fedpeft.models.hub import fetching, one_sentence
from fedpeft.models.precision import train_in_float32
from fedpeft.models.pretrained import DTYPES
from fedpeft.seeding import torch_seed
from fedpeft.state import load_state, read

# Functions import transformers, because it takes seconds.


class Opened(NamedTuple):
    """A trained model, ready to answer.

    Attributes:
        model: the trained model, in evaluation mode.
        config: the exported folder's typed configuration, whose ``data`` is the task; keys outside
            ``folder.KEYS`` have their defaults, not the run's values.
        processor: the model's tokenizer or image processor.
    """

    model: nn.Module
    config: Config
    processor: Any


def load(folder: str | Path, base: str | None = None) -> nn.Module:
    """Return the model of an exported folder, on the CPU and in evaluation mode.

    Args:
        folder: made by ``fedpeft export``.
        base: folder or hub name of the base model, if it is no longer where it was.

    Raises:
        ValueError: this is no exported folder, or its base model cannot be had or has other weights
            now.
    """
    overrides = [] if base is None else [f"model.path={quoted(base)}"]
    return opened(Path(folder), overrides).model


def opened(folder: Path, overrides: Sequence[str] = ()) -> Opened:
    """Load an exported folder with its task.

    Args:
        folder: made by ``fedpeft export``.
        overrides: overrides of the configuration, such as ``data.path=...`` or ``model.path=...``.

    Raises:
        ValueError: this is no exported folder, its base model cannot be had or has other weights
            now, or an override is wrong.
    """
    about = files.read(folder)
    config = typed(files.tree_of(about, overrides))
    here = str(folder.resolve())
    pretrained = replace(config.model, tokenizer_path=here, load_in=None)
    if about["form"] == "transformers":
        pretrained = replace(
            pretrained,
            path=here,
            revision=None,
            architecture={},
            settings={},
            random=False,
            pooling=None,
        )
    else:
        config.model.check_weights(about.get("weights_sha256"), str(folder))
    config = replace(config, model=replace(pretrained, gradient_checkpointing=False))
    processor = getattr(config.model, config.data.needs)()
    model = {"peft": _peft, "transformers": _base, "fedpeft": _own}[about["form"]](folder, config)
    if about["setting"]:
        config.method.arrange(model, about["setting"])
    if config.data.needs == "tokenizer":
        model.config.pad_token_id = processor.pad_token_id
    files.name_labels(model, about["labels"])
    return Opened(model.eval(), config, processor)


def _base(folder: Path, config: Config) -> Any:
    """Return the transformers model at ``model.path``, as anybody loads it."""
    import transformers

    task, source = config.data, config.model.source()
    auto = getattr(transformers, task.auto_class)
    labels: dict[str, Any] = {}
    if task.num_labels is not None:
        # A base model's head of another size starts anew, as in the run; the folder has the run's.
        anew = source != str(folder.resolve())
        labels = {"num_labels": task.num_labels, "ignore_mismatched_sizes": anew}
    more = fetching(source, config.model.revision)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with one_sentence(source, config.model.revision):
        return auto.from_pretrained(source, dtype=DTYPES[config.model.dtype], **labels, **more)


def _peft(folder: Path, config: Config) -> Any:
    """Return the base model with HF PEFT's adapter in it."""
    with warnings.catch_warnings():  # PEFT calls what transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        model = PeftModel.from_pretrained(_base(folder, config), str(folder))
    adapter: Any = model.active_peft_config
    if adapter.peft_type == PeftType.PROMPT_TUNING:
        model.register_forward_hook(lambda *call: _of_text(call[2], adapter.num_virtual_tokens))
    return model


def _of_text(output: Any, virtual: int) -> Any:
    """Leave out the logits of virtual tokens, which a decoder gives before the text's logits."""
    if output.logits.dim() == 3:
        output.logits = output.logits[:, virtual:]
    return output


def _own(folder: Path, config: Config) -> nn.Module:
    """Return the base model with the method in it and the folder's values."""
    task = config.data
    model = config.model.build(task.auto_class, task.num_labels, config.seed)
    with torch_seed(config.seed, "method"):
        model = injected(config, model)
    train_in_float32(model)
    load_state(model, read(folder / files.WEIGHTS))
    config.method.arrange(model, "")
    return model
