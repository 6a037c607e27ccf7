"""Multi-scale features of images from a frozen encoder: groups of points for the force."""

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor, nn

from dist_contrastive.errors import ConfigError
from dist_contrastive.models.encoders import frozen
from dist_contrastive.settings import Settings

VARIANCE_FLOOR = 1e-6  # added before the square root, whose gradient at 0 is infinite


class FeatureMaps(nn.Module):
    """Images [b, C, H, W] in [0, 1] to named features [b, groups, dim], in one forward pass.

    Names are `pooled`, and `stage1.locations`, `stage1.mean`, `stage1.std`, `stage1.patch2.mean`,
    `stage1.patch2.std` and so on. Groups of locations and patches come row by row. Standard
    deviations are sqrt(variance + 1e-6), with the variance over all n locations, not n - 1.
    Gradients flow to the images; the encoder is frozen and in eval mode always. Works for b = 0.

    Args:
        config: which features.
        encoder: one with a method `with_maps` (residual, transformers), or any module whose output
            is [b, D], the representation, or [b, D, h, w], one map, of which it is the mean.
        image_shape: (channels, height, width); `shapes` holds (groups, dim) of each feature of
            such images.
    Raises:
        ConfigError: the encoder's output is something else; stages that it does not have; patches
            that tile no map; nothing is left.
    References:
        Deng et al. 2026, arXiv 2602.04770: features at several scales and locations.
    """

    class Config(Settings):
        """Which features of which maps; a map without room for one of them goes without it."""

        stages: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None
        """Maps by their number; 0 is the stem's or embedding's, where the encoder has one. All of
        them where not set."""
        kinds: tuple[Literal["pooled", "locations", "mean", "std"], ...] = (
            "pooled",
            "locations",
            "mean",
            "std",
        )
        """`pooled`: the representation, 1 group; `locations`: a group for each location of a map;
        `mean`, `std`: over all locations, 1 group each; a map of one location has no `std`."""
        patches: tuple[Annotated[int, Field(ge=2)], ...] = ()
        """Sizes s: mean and standard deviation over each patch of s x s locations, a group for each
        patch. A map has those of the patches that tile it with two or more."""

        @model_validator(mode="after")
        def _something(self) -> Self:
            if not self.kinds and not self.patches:
                raise ValueError(
                    "feature maps without kinds and without patches are nothing: set one"
                )
            return self

        @property
        def use_maps(self) -> bool:
            """Whether any feature is one of a map."""
            return bool(set(self.kinds) - {"pooled"} or self.patches)

    def __init__(
        self, config: Config, encoder: nn.Module, image_shape: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.config, self.encoder = config, frozen(encoder)
        like = next(encoder.parameters(), torch.empty(0))
        with torch.no_grad():
            encoded = self._encoded(like.new_full((1, *image_shape), 0.5))
            features = self._features(*encoded)
        self.shapes = {name: (x.shape[1], x.shape[2]) for name, x in features.items()}
        sizes = [f"{map_.shape[2]}x{map_.shape[3]}" for map_ in encoded[1]]
        _check(config, list(self.shapes), " and ".join(sizes))

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, whatever `mode` is."""
        return super().train(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self._features(*self._encoded(images))

    def _encoded(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The representation [b, D], and maps [b, C, h, w], if features are made of them."""
        with_maps = getattr(self.encoder, "with_maps", None)
        if self.config.use_maps and with_maps is not None:
            return with_maps(images)
        output = self.encoder(images)
        if output.ndim == 4:
            return output.mean(dim=(2, 3)), [output]
        if output.ndim == 2:
            return output, []
        raise ConfigError(
            f"the encoder makes {tuple(output.shape)} of images {tuple(images.shape)}, and "
            "features are made of [b, D] or [b, D, h, w]: use an encoder with one of these."
        )

    def _features(self, pooled: Tensor, maps: list[Tensor]) -> dict[str, Tensor]:
        features = {"pooled": pooled.unsqueeze(1)} if "pooled" in self.config.kinds else {}
        if not self.config.use_maps:
            return features
        if not maps:
            raise ConfigError(
                "the encoder has no maps, of which locations, mean, std and patches are made: set "
                "kinds: [pooled] and patches: []."
            )
        for stage in self.config.stages or range(len(maps)):
            if stage >= len(maps):
                raise ConfigError(
                    f"stage {stage} is asked for, and the encoder has {len(maps)} maps: set stages "
                    f"of 0 to {len(maps) - 1}."
                )
            named = _map_features(maps[stage], self.config)
            features |= {f"stage{stage}.{name}": feature for name, feature in named.items()}
        return features


def _map_features(map_: Tensor, config: FeatureMaps.Config) -> dict[str, Tensor]:
    """Features [b, groups, C] of a map [b, C, h, w]."""
    height, width = map_.shape[2:]
    mean, std = _mean_and_std(map_, height, width)
    features = {"locations": map_.flatten(2).transpose(1, 2), "mean": mean, "std": std}
    if height * width == 1:  # the same for all images
        del features["std"]
    features = {name: feature for name, feature in features.items() if name in config.kinds}
    for size in config.patches:
        if height % size == 0 and width % size == 0 and height * width > size**2:
            mean, std = _mean_and_std(map_, size, size)
            features |= {f"patch{size}.mean": mean, f"patch{size}.std": std}
    return features


def _mean_and_std(map_: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Of each tile of height x width, row by row: [b, tiles, C] of a map [b, C, h, w]."""
    rows, columns = map_.shape[2] // height, map_.shape[3] // width
    tiles = map_.reshape(*map_.shape[:2], rows, height, columns, width)
    mean = tiles.mean(dim=(3, 5), keepdim=True)
    variance = (tiles - mean).square().mean(dim=(3, 5))  # torch.var warns where there are no rows
    std = (variance + VARIANCE_FLOOR).sqrt()
    return mean[:, :, :, 0, :, 0].flatten(2).transpose(1, 2), std.flatten(2).transpose(1, 2)


def _check(config: FeatureMaps.Config, names: list[str], sizes: str) -> None:
    for size in config.patches:
        if not any(name.endswith(f".patch{size}.mean") for name in names):
            raise ConfigError(
                f"patches of {size}x{size} tile none of the encoder's maps ({sizes}) with two or "
                "more: leave them out of patches, or choose other stages."
            )
    if not names:
        raise ConfigError(
            f"no feature is left: std needs a map of two locations or more, and the maps are "
            f"{sizes}: choose other kinds or stages."
        )
