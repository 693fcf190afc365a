"""A classifier on the mean of a backbone's last layer, because sentence encoders train it."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooledClassifier(nn.Module):
    """A linear classifier on the mean of a backbone's last layer over real tokens.

    Args:
        backbone: a transformers model without a head; ``num_labels`` stands in its configuration.
    """

    base_model_prefix = "backbone"

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.config: Any = backbone.config
        self.backbone = backbone
        if getattr(backbone, "pooler", None) is not None:
            # A pooler reads the first token alone, and nothing would use its output.
            backbone.register_module("pooler", None)
        self.classifier = nn.Linear(self.config.hidden_size, self.config.num_labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, **more: Any
    ) -> SequenceClassifierOutput:
        """Return logits (B, num_labels).

        Args:
            input_ids: (B, L).
            attention_mask: (B, L), or (B, n + L) if ``more`` holds n cached keys and values.
            more: further arguments of the backbone, such as ``past_key_values``.
        """
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **more)[0]
        mask = attention_mask[:, -hidden.shape[1] :].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return SequenceClassifierOutput(logits=self.classifier(mean))  # type: ignore[arg-type]
