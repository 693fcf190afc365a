"""A classifier on the mean of a backbone's last layer, as sentence encoders are trained."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooledClassifier(nn.Module):
    """A backbone, the mean of its last layer over real tokens, and one linear layer."""

    base_model_prefix = "backbone"

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.config: Any = backbone.config
        self.backbone = backbone
        if getattr(backbone, "pooler", None) is not None:
            backbone.register_module(
                "pooler", None
            )  # reads the first token only; nothing would use it
        self.classifier = nn.Linear(self.config.hidden_size, self.config.num_labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, **more: Any
    ) -> SequenceClassifierOutput:
        """(B, L) token ids and mask to logits (B, num_labels).

        Args:
            more: the backbone's, such as keys and values, which a longer mask then begins with.
        """
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **more)[0]
        mask = attention_mask[:, -hidden.shape[1] :].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return SequenceClassifierOutput(logits=self.classifier(mean))  # type: ignore[arg-type]
