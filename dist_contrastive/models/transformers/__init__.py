"""Models of `transformers` as encoders of images and of texts.

`transformers` is imported when a model is built, not before: the import costs seconds.
"""

from dist_contrastive.models.transformers.text import TransformersTextEncoder
from dist_contrastive.models.transformers.vision import TransformersEncoder

__all__ = ["TransformersEncoder", "TransformersTextEncoder"]
