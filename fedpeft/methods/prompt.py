"""Soft prompts: trained vectors before the text's own (https://arxiv.org/abs/2104.08691)."""

from dataclasses import dataclass

from peft import PromptTuningConfig
from peft.tuners import PromptEmbedding
from torch import nn

from fedpeft.methods.base import Method
from fedpeft.methods.parts.exported import PeftForm
from fedpeft.methods.parts.prompts import prompt_form
from fedpeft.models.sites import freeze_all_but_head, reads_text, word_embedding
from fedpeft.nn.virtual import Prompted
from fedpeft.state import State


@dataclass(frozen=True)
class Prompt(Method):
    """``num_tokens`` vectors and the head are shared.

    The vectors are HF PEFT's ``PromptEmbedding``; PEFT's wrapper around the model is not used, see
    ``Prompted``. As with PEFT, they stand before an encoder's first token, so a head that reads the
    first place reads a virtual token.

    Args:
        num_tokens: number of virtual tokens, >= 1.
        init: ``vocabulary`` (embeddings of tokens drawn from the vocabulary) or ``normal``.
    """

    num_tokens: int = 20
    init: str = "vocabulary"

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens must be >= 1, got {self.num_tokens}")
        if self.init not in ("vocabulary", "normal"):
            raise ValueError(f"init must be vocabulary or normal, got {self.init}")

    def inject(self, model: nn.Module) -> nn.Module:
        """Return a ``Prompted`` around the model.

        Raises:
            ValueError: the model reads images.
        """
        words = word_embedding(reads_text(model))
        freeze_all_but_head(model)
        config = PromptTuningConfig(
            num_virtual_tokens=self.num_tokens,
            token_dim=words.embedding_dim,
            num_transformer_submodules=1,
            prompt_tuning_init="SAMPLE_VOCAB" if self.init == "vocabulary" else "RANDOM",
        )
        return Prompted(model, PromptEmbedding(config, words), self.num_tokens)

    def peft_form(self, model: nn.Module, start: State) -> PeftForm | None:
        """See ``Method.peft_form`` and ``prompt_form``."""
        return prompt_form(model)
