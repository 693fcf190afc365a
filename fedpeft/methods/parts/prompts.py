"""Virtual tokens as HF PEFT saves them."""

from peft import PromptTuningConfig
from torch import nn

from fedpeft.methods.parts.exported import PeftForm, of_virtual_tokens
from fedpeft.models.sites import reads_last_token
from fedpeft.nn.virtual import Prompted


def prompt_form(model: nn.Module) -> PeftForm | None:
    """Return a model's virtual tokens as PEFT's prompt tuning, however they are computed.

    Null for a decoder with a head: PEFT passes it vectors alone, so it would read padding.
    """
    assert isinstance(model, Prompted)
    if reads_last_token(model.inner):
        return None
    vectors = model.vectors
    config = PromptTuningConfig(
        num_virtual_tokens=model.num_tokens,
        token_dim=vectors.shape[1],
        num_transformer_submodules=1,
    )
    return of_virtual_tokens(config, vectors)
