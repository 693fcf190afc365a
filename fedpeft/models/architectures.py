"""Checks that an architecture fits a task, because transformers also builds some that do not."""

from collections.abc import Callable
from typing import Any

# Functions import transformers, because it takes seconds.


def writes_text(config: Any) -> bool:
    """Tell whether an architecture is a decoder.

    A causal class is not enough: an encoder that predicts masked tokens has one too, but its
    tokens attend to later ones.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind = type(config)
    if getattr(config, "is_decoder", False):
        return kind in MODEL_FOR_CAUSAL_LM_MAPPING
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING


def _classifies_text(config: Any) -> bool:
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    return type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


def _classifies_images(config: Any) -> bool:
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    return type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def _reads_text(config: Any) -> bool:
    return _classifies_text(config) or not _classifies_images(config)


TEXT = "choose one of text, e.g. model=roberta_base, or a data set of images"
IMAGES = "choose one of images, e.g. model=vit_base or model=siglip, or a data set of texts"
Rule = tuple[Callable[[Any], bool], str, str]
TASKS: dict[str, Rule] = {
    "AutoModelForCausalLM": (
        writes_text,
        "is no causal language model",
        "choose a decoder, e.g. model=tinyllama or model=gpt2, or a task of classification",
    ),
    "AutoModelForSequenceClassification": (_classifies_text, "classifies no text", TEXT),
    "AutoModelForImageClassification": (_classifies_images, "classifies no images", IMAGES),
}
PROCESSORS: dict[str, Rule] = {
    "tokenizer": (_reads_text, "reads no text", TEXT),
    "image processor": (_classifies_images, "reads no images", IMAGES),
}


def check_fits(auto_class: str, config: Any, name: str) -> None:
    """Check that an architecture can do a task.

    Args:
        auto_class: name of transformers' auto class for the task; a class that ``TASKS`` lacks is
            not checked.
        config: the model's transformers configuration.
        name: names the model in the error.

    Raises:
        ValueError: the architecture cannot do the task; the error says what to choose instead.
    """
    _check(TASKS.get(auto_class), config, name)


def check_modality(processor: str, config: Any, name: str) -> None:
    """Check that an architecture reads the output of a processor.

    Args:
        processor: ``tokenizer`` or ``image processor``.
        config: the model's transformers configuration.
        name: names the model in the error.

    Raises:
        ValueError: the architecture does not read it; the error says what to choose instead.
    """
    _check(PROCESSORS[processor], config, name)


def _check(rule: Rule | None, config: Any, name: str) -> None:
    if rule is None:
        return
    fits, fault, advice = rule
    if not fits(config):
        raise ValueError(f"{name} ({config.model_type}) {fault}: {advice}")
