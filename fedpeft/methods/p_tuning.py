"""P-tuning: soft prompts that a small network computes (https://arxiv.org/abs/2103.10385)."""

from dataclasses import dataclass

from peft import PromptEncoderConfig
from peft.tuners import PromptEncoder
from torch import nn

from fedpeft.methods.base import Method
from fedpeft.methods.parts.exported import PeftForm
from fedpeft.methods.parts.prompts import prompt_form
from fedpeft.models.sites import freeze_all_but_head, reads_text, word_embedding
from fedpeft.nn.virtual import Prompted
from fedpeft.state import State


@dataclass(frozen=True)
class PTuning(Method):
    """The virtual tokens' vectors, the network that transforms them, and the head are shared.

    The network is HF PEFT's ``PromptEncoder``. All of it is sent, because the next round goes on
    training it. PEFT's wrapper around the model is not used, see ``Prompted``.

    Args:
        num_tokens: number of virtual tokens, >= 1.
        encoder: ``mlp`` (three layers) or ``lstm`` (bidirectional, then two layers, as in the
            paper).
        hidden: the network's inner width, >= 1; open in the paper.
    """

    num_tokens: int = 20
    encoder: str = "mlp"
    hidden: int = 128

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens must be >= 1, got {self.num_tokens}")
        if self.encoder not in ("mlp", "lstm"):
            raise ValueError(f"encoder must be mlp or lstm, got {self.encoder}")
        if self.hidden < 1:
            raise ValueError(f"hidden must be >= 1, got {self.hidden}")

    def inject(self, model: nn.Module) -> nn.Module:
        """Return a ``Prompted`` around the model.

        Raises:
            ValueError: the model reads images.
        """
        words = word_embedding(reads_text(model))
        freeze_all_but_head(model)
        config = PromptEncoderConfig(
            num_virtual_tokens=self.num_tokens,
            token_dim=words.embedding_dim,
            num_transformer_submodules=1,
            encoder_reparameterization_type=self.encoder.upper(),  # type: ignore[arg-type]
            encoder_hidden_size=self.hidden,
        )
        return Prompted(model, PromptEncoder(config), self.num_tokens)

    def peft_form(self, model: nn.Module, start: State) -> PeftForm | None:
        """See ``Method.peft_form`` and ``prompt_form``."""
        return prompt_form(model)
