"""Any vision model of `transformers` as an encoder, from scratch or from a checkpoint.

`transformers` is imported when a model is built, not before: the import costs seconds.
"""

import difflib
import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dist_contrastive.errors import ConfigError
from dist_contrastive.models.encoders import Encoder

MOST_SPECIAL_TOKENS = 16  # class, distillation and register tokens of known models: 8 at most


class TransformersEncoder(Encoder):
    """A `transformers` vision model: images [b, C, H, W] in [0, 1] to representations [b, D].

    Parameters that the output does not depend on (mask tokens, an unused pooler) are frozen,
    because DDP would wait for their gradients.

    Raises:
        ConfigError: unknown model, not a vision model, wrong fields, images it cannot read.
    """

    class Config(Encoder.Config):
        """A vision model of `transformers`: `model_type` (random weights) or `pretrained`."""

        name: Literal["transformers"] = "transformers"
        model_type: str | None = None
        """Architecture by its `transformers` name, as `vit`, `dinov2`, `convnext`, `swin`."""
        pretrained: str | None = None
        """Folder or hub name of a checkpoint; its weights must be safetensors."""
        config: dict[str, Any] = Field(default_factory=dict)
        """Fields of the model's configuration to override, as `{hidden_size: 192}`. Image size and
        channels are set from the data for `model_type` models that have these fields."""
        pool: Literal["auto", "pooler", "mean"] = "auto"
        """`pooler`: the model's own pooled output; `mean`: the mean of the last hidden state over
        positions; `auto`: the pooled output where the model has one."""
        normalise: tuple[float, float] = (0.5, 0.5)
        """Mean and standard deviation subtracted from and divided into pixels in [0, 1]."""
        row_independent: bool = True
        """Keep the model in eval mode while training: no dropout or stochastic depth, stored batch
        statistics. A row's output then depends on that row alone, which every promise about ranks
        needs; turn it off only to train a model that cannot do without."""

        @model_validator(mode="after")
        def _one_source(self) -> Self:
            if (self.model_type is None) == (self.pretrained is None):
                raise ValueError(
                    f"a transformers encoder needs either model_type or pretrained, but model_type "
                    f"is {self.model_type!r} and pretrained is {self.pretrained!r}: set exactly "
                    f"one."
                )
            for name in ("trust_remote_code", "auto_map"):
                if name in self.config:
                    raise ValueError(
                        f"config.{name} would run code that came with a checkpoint; leave it out, "
                        f"and name a model of your own by its import path instead"
                    )
            return self

    def __init__(self, config: Config, shape: tuple[int, ...]) -> None:
        super().__init__()
        channels, height, width = shape
        self.config, self.image_shape = config, (channels, height, width)
        self.model = _load(config, channels, (height, width))
        self.dim = self._probe()
        self.train()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.model.train(mode and not self.config.row_independent)
        return self

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
                f"a hidden state of {_title(self.config)} has shape {tuple(state.shape)}, which "
                "is neither [b, D, h, w] nor a grid of positions [b, positions, D]: use its pooled "
                "representation alone."
            )
        return state[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)

    def _run(self, images: Tensor, **options: bool) -> Any:
        mean, std = self.config.normalise
        return self.model(pixel_values=(images - mean) / std, **options)

    def _representations(self, images: Tensor) -> Tensor:
        return self._pooled(self._run(images))

    def _pooled(self, output: Any) -> Tensor:
        pooled = getattr(output, "pooler_output", None)
        if self.config.pool == "pooler" and pooled is None:
            raise ConfigError(
                f"pool: pooler needs a model with a pooled output, and {_title(self.config)} "
                "has none: use pool: mean."
            )
        if pooled is not None and self.config.pool != "mean":
            return pooled.flatten(1)
        hidden = output.last_hidden_state  # [b, positions, D] or [b, D, h, w]
        if hidden.ndim not in (3, 4):
            raise ConfigError(
                f"the last hidden state of {_title(self.config)} has shape "
                f"{tuple(hidden.shape)}, which is neither [b, positions, D] nor [b, D, h, w]: use "
                "a model of single images."
            )
        return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.mean(dim=(2, 3))

    def _probe(self) -> int:
        """The representation's dimension, from one grey image; freezes unused parameters."""
        self.eval()
        try:
            with torch.enable_grad():
                output = self._representations(torch.full((1, *self.image_shape), 0.5))
        except ConfigError:
            raise
        except (ValueError, RuntimeError, TypeError) as error:
            shape = "x".join(map(str, self.image_shape))
            raise ConfigError(
                f"{_title(self.config)} cannot read images of {shape} (channels x height x "
                f"width): set image size, patch size and channels in config ({_first(error)})."
            ) from error
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(output.sum(), list(trainable.values()), allow_unused=True)
        for parameter, grad in zip(trainable.values(), grads, strict=True):
            parameter.requires_grad_(grad is not None)
        return output.shape[1]


def _load(
    config: TransformersEncoder.Config, channels: int, image_size: tuple[int, int]
) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    try:
        if config.pretrained is not None:
            model = AutoModel.from_pretrained(
                config.pretrained, use_safetensors=True, trust_remote_code=False, **config.config
            )
        else:
            assert config.model_type is not None  # the settings have exactly one source
            fields = _config_fields(config, channels, image_size)
            model = AutoModel.from_config(AutoConfig.for_model(config.model_type, **fields))
    except ConfigError:
        raise
    except Exception as error:  # transformers and the hub have kinds of their own
        raise ConfigError(
            f"cannot build {_title(config)}: {_first(error)}; give model_type a vision model's "
            "name such as vit, dinov2, convnext or swin, or pretrained a folder with safetensors."
        ) from error
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"{_title(config)} does not take images: use a vision model such as vit, dinov2, "
            "convnext or swin."
        )
    return model


def _config_fields(
    config: TransformersEncoder.Config, channels: int, image_size: tuple[int, int]
) -> dict[str, Any]:
    """The configuration overrides, with what the data fixes, and unknown names refused."""
    from transformers import AutoConfig

    assert config.model_type is not None  # the settings have exactly one source
    known = AutoConfig.for_model(config.model_type).to_dict()
    for name in config.config:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{_title(config)} has no configuration field {name!r}: "
                + (f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(known)}.")
            )
    as_pair = len(set(image_size)) == 2 or isinstance(known.get("image_size"), list | tuple)
    size = image_size if as_pair else image_size[0]
    from_data = {"image_size": size, "num_channels": channels}
    return {k: v for k, v in from_data.items() if k in known} | config.config


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


def _title(config: TransformersEncoder.Config) -> str:
    return f"transformers model {(config.model_type or config.pretrained)!r}"


def _first(error: Exception) -> str:
    """The first sentence of an error, short enough to quote."""
    return str(error).strip().split("\n")[0].split(". ")[0][:160]
