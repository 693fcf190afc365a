"""Stand-ins for models, tokenizers and image processors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def tokenizer_of_words(*words: str, single: str = "<s> $A") -> Any:
    """Return a tokenizer that splits at white space.

    Args:
        words: the vocabulary, beside ``<pad>``, ``<s>``, ``</s>`` and ``<unk>``, numbered 0 to 3.
        single: template by which a text ``$A`` is encoded.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *dict.fromkeys(words)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


class Logits(nn.Module):
    """A model that gives the same logits for every batch."""

    def __init__(self, logits: Tensor | Sequence[Any]) -> None:
        super().__init__()
        self.logits = torch.as_tensor(logits)

    def forward(self, **_: Tensor) -> "Logits":
        return self


class Refusing:
    """A tokenizer or image processor that fails when it is to encode something.

    Args:
        processor: gives all attributes, so that both have the same key in the cache.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("was asked again")
