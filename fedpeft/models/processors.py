"""Image processors for weights that come without one."""

from collections.abc import Mapping
from typing import Any


def image_side(config: Any, fields: Mapping[str, Any]) -> int:
    """Return how many pixels high the images are that a model reads.

    Args:
        config: the transformers configuration of the part that reads images. Its own size may be
            another, because some models interpolate their positions.
        fields: fields of the image processor, such as ``size``.
    """
    return fields.get("size", {}).get("height", config.image_size)


def plain_image_processor(config: Any, fields: Mapping[str, Any]) -> Any:
    """Return a ViT's image processor, on PIL alone.

    It makes squares of the configuration's size and normalises by mean and standard deviation 0.5,
    where ``fields`` do not say otherwise.

    Args:
        config: the transformers configuration of a model that reads images.
        fields: fields of the processor, such as ``size`` and ``image_mean``.
    """
    from transformers import ViTImageProcessorPil  # here, because it takes seconds

    config = getattr(config, "vision_config", config)
    side, half = image_side(config, fields), [0.5] * config.num_channels
    size = {"height": side, "width": side}
    plain: dict[str, Any] = {"size": size, "image_mean": half, "image_std": half}
    return ViTImageProcessorPil(**(plain | dict(fields)))
