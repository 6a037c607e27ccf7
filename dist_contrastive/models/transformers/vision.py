"""Any vision model of `transformers` as an encoder, from scratch or from a checkpoint."""

import contextlib
import inspect
import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dist_contrastive.errors import ConfigError
from dist_contrastive.models.transformers.tower import (
    TransformersTower,
    first_sentence,
    known_fields,
    load_model,
)

logger = logging.getLogger(__name__)

MOST_SPECIAL_TOKENS = 16  # class, distillation and register tokens of known models: 8 at most


class TransformersEncoder(TransformersTower):
    """A `transformers` vision model: images [b, C, H, W] in [0, 1] to representations [b, D].

    Parameters that the output does not depend on (mask tokens, an unused pooler) are frozen,
    because DDP would wait for their gradients.

    Raises:
        ConfigError: unknown model, not a vision model, wrong fields, images it cannot read.
    """

    class Config(TransformersTower.Config):
        """A vision model of `transformers`: `model_type` (random weights) or `pretrained`."""

        name: Literal["transformers"] = "transformers"
        pool: Literal["auto", "pooler", "mean"] = "auto"
        """`pooler`: the model's own pooled output; `mean`: the mean of the last hidden state over
        positions; `auto`: the pooled output where the model has one."""
        normalise: tuple[float, float] | None = None
        """Mean and standard deviation subtracted from and divided into pixels in [0, 1]; null:
        those of the checkpoint, of each channel, or else 0.5 and 0.5."""

    config: Config
    mean: Tensor
    std: Tensor

    def __init__(self, config: Config, shape: tuple[int, ...]) -> None:
        super().__init__()
        channels, height, width = shape
        self.config, self.image_shape = config, (channels, height, width)
        self.model, missing = _load(config, channels, (height, width))
        mean, std = (torch.tensor(x).view(-1, 1, 1) for x in _pixel_statistics(config))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.options = _resized(config, self.model, (height, width))
        self.dim = self._prepare(self._represent_grey, missing)

    def forward(self, rows: Tensor) -> Tensor:
        if len(rows) == 0:
            return self._representations(_blank(rows))[:0]
        return self._representations(rows)

    def with_maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The representation [b, D], and a map [b, C, h, w] of each hidden state, the first one
        (an embedding, in most models) included.

        Class and register tokens are left out. Maps are the hidden states as the model returns
        them: in most transformers the last one is that before the final norm. There are none
        where the model returns none.

        Raises:
            ConfigError: hidden states that are not over a grid of positions.
        """
        if len(images) == 0:
            representations, maps = self.with_maps(_blank(images))
            return representations[:0], [map_[:0] for map_ in maps]
        output = self._run(images, output_hidden_states=True)
        states = getattr(output, "hidden_states", None) or ()
        arranged = getattr(output, "reshaped_hidden_states", None) or states
        pairs = zip(states, arranged, strict=True)
        return self._pooled(output), [self._map(state, grid) for state, grid in pairs]

    def _map(self, state: Tensor, arranged: Tensor) -> Tensor:
        """A hidden state as [b, D, h, w]; `arranged` is it, or the model's own way to say that."""
        if state.ndim == 4:
            return state
        if arranged.ndim == 4:  # channels first in Swin, last in Hiera
            return arranged if arranged.shape[1] == state.shape[2] else arranged.movedim(3, 1)
        patch = getattr(self.model.config, "patch_size", None)
        grid = _grid(state.shape[1], self.image_shape[1:], patch) if state.ndim == 3 else None
        if grid is None:
            raise ConfigError(
                f"a hidden state of {self.config.title} has shape {tuple(state.shape)}, which "
                "is neither [b, D, h, w] nor a grid of positions [b, positions, D]: use its pooled "
                "representation alone."
            )
        return state[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)

    def _run(self, images: Tensor, **options: bool) -> Any:
        return self.model(pixel_values=(images - self.mean) / self.std, **self.options, **options)

    def _representations(self, images: Tensor) -> Tensor:
        return self._pooled(self._run(images))

    def _pooled(self, output: Any) -> Tensor:
        projected = getattr(output, "image_embeds", None)  # of a checkpoint of two towers
        pooled = getattr(output, "pooler_output", projected)
        if self.config.pool == "pooler" and pooled is None:
            raise ConfigError(
                f"pool: pooler needs a model with a pooled output, and {self.config.title} "
                "has none: use pool: mean."
            )
        if pooled is not None and self.config.pool != "mean":
            return pooled.flatten(1)
        hidden = output.last_hidden_state  # [b, positions, D] or [b, D, h, w]
        if hidden.ndim not in (3, 4):
            raise ConfigError(
                f"the last hidden state of {self.config.title} has shape "
                f"{tuple(hidden.shape)}, which is neither [b, positions, D] nor [b, D, h, w]: use "
                "a model of single images."
            )
        return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.mean(dim=(2, 3))

    def _represent_grey(self) -> Tensor:
        """The representation of one grey image."""
        try:
            return self._representations(torch.full((1, *self.image_shape), 0.5))
        except ConfigError:
            raise
        except (ValueError, RuntimeError, TypeError) as error:
            shape = "x".join(map(str, self.image_shape))
            raise ConfigError(
                f"{self.config.title} cannot read images of {shape} (channels x height x width): "
                f"set image size, patch size and channels in config ({first_sentence(error)})."
            ) from error


def _load(
    config: TransformersEncoder.Config, channels: int, image_size: tuple[int, int]
) -> tuple[nn.Module, set[str]]:
    fields = config.config
    if config.pretrained is None:
        known = known_fields(config)
        as_pair = len(set(image_size)) == 2 or isinstance(known.get("image_size"), list | tuple)
        size = image_size if as_pair else image_size[0]
        from_data = {"image_size": size, "num_channels": channels}
        fields = {k: v for k, v in from_data.items() if k in known} | fields
    kind = "a vision model such as vit, dinov2, convnext or swin"
    model, missing = load_model(config, fields, "vision", kind)
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"{config.title} does not take images: use a vision model such as vit, dinov2, "
            "convnext or swin."
        )
    return model, missing


def _pixel_statistics(config: TransformersEncoder.Config) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, or of all."""
    if config.normalise is not None:
        mean, std = config.normalise
        return [mean], [std]
    if config.pretrained is not None:
        from transformers import BaseImageProcessor

        with contextlib.suppress(OSError):  # there is no such file
            known, _ = BaseImageProcessor.get_image_processor_dict(config.pretrained)
            if known.get("do_normalize", True) and "image_mean" in known:
                return known["image_mean"], known["image_std"]
    return [0.5], [0.5]


def _resized(
    config: TransformersEncoder.Config, model: nn.Module, image_size: tuple[int, int]
) -> dict[str, bool]:
    """What a model is told that was made for images of another size than these."""
    architecture: Any = model.config
    made_for = getattr(architecture, "image_size", None)
    made_for = (made_for, made_for) if isinstance(made_for, int) else made_for
    takes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    if config.pretrained is None or made_for is None or tuple(made_for) == image_size or not takes:
        return {}
    logger.info(
        f"{config.title} was trained on images of {made_for[0]} x {made_for[1]} pixels: its "
        f"embeddings of positions are interpolated for {image_size[0]} x {image_size[1]}"
    )
    return {"interpolate_pos_encoding": True}


def _blank(images: Tensor) -> Tensor:
    """One black image in place of none, which many models cannot reshape; it keeps the graph, to
    the weights and to `images` [0, C, H, W]."""
    return images.new_zeros(1, *images.shape[1:]) + images.sum()


def _grid(
    positions: int, image_size: tuple[int, int], patch: int | Sequence[int] | None
) -> tuple[int, int] | None:
    """Height and width of the grid in so many positions; special tokens may come before it.

    The grid is that of the patches, or else all positions in the proportions of the image, as
    where a model merges patches on its way. None where there is no such grid.
    """
    height, width = image_size
    if patch:
        patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
        rows, columns = height // patch_height, width // patch_width
        if 0 <= positions - rows * columns <= MOST_SPECIAL_TOKENS:
            return rows, columns
    rows = max(1, math.isqrt(positions * height // width))
    columns = positions // rows
    return (
        (rows, columns) if (rows * columns, rows * width) == (positions, columns * height) else None
    )
