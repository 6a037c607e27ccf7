"""Random views of images whose randomness belongs to the sample, never to the batch.

A view depends only on (seed, epoch, sample index, view number): the same bits on any rank, in
any worker, in a batch of any size. Parameters come from `keyed_random`; kornia's functional
operations, which take one parameter per image, apply them. kornia is imported at the first view.
"""

import math
from abc import ABC, abstractmethod
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from dist_contrastive.data import keyed_random
from dist_contrastive.errors import ConfigError
from dist_contrastive.settings import Choice, ComponentSettings, ImageSize

VIEW_STREAM = 0x76696577  # "view": keeps these keys apart from other uses of the same seed


class Views(ABC):
    """Base of the augmentations: one random view of each image.

    An own one is named in the config by its import path:
    ``views: {name: "my_package.views:MyViews", ...}``.
    """

    class Config(ComponentSettings):
        """Settings that all augmentations share."""

        size: ImageSize | None = None
        """Height and width of the view in pixels; None keeps the image's. The image is resampled
        bilinearly, so that one much larger than `size` should be shrunk before it is packed."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """One view of each image.

        Row i must depend on images[i] and keys[i] alone, as numbers of `keyed_random` do: then
        views are the same on any rank, in batches of any size, and after a resume.

        Args:
            images: float [b, C, H, W] in [0, 1]; b = 0 is allowed.
            keys: int64 [b], from `view_keys`.
        Returns:
            [b, C, size, size], or [b, C, H, W] without a size, in [0, 1].
        """


class RandomViews(Views):
    """Crops, flips, affine changes, colours, blur, noise and erased rectangles."""

    class Config(Views.Config):
        """What a view may change; every default leaves the image as it is.

        Ranges are drawn from uniformly. Geometry is one resampling, colour comes after it.
        """

        name: Literal["random"] = "random"
        crop_area: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
        """Random resized crop: fraction of the image's area, at most 1."""
        crop_aspect: float = Field(default=1.0, ge=1)
        """Crops have a width / height between 1 / crop_aspect and crop_aspect, log-uniformly."""
        flip: float = Field(default=0.0, ge=0, le=1)
        """Probability of a horizontal flip."""
        rotation_deg: NonNegativeFloat = 0.0
        """Rotation between minus and plus this many degrees."""
        translate: NonNegativeFloat = 0.0
        """Shift along each axis, as a fraction of the image's side."""
        scale: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
        """Magnification."""
        aspect: float = Field(default=1.0, ge=1)
        """Magnification of height over width between 1 / aspect and aspect, log-uniformly."""
        shear_deg: NonNegativeFloat = 0.0
        """Horizontal shear between minus and plus this many degrees."""
        brightness: NonNegativeFloat = 0.0
        """Added to pixels: between minus and plus this."""
        contrast: float = Field(default=0.0, ge=0, le=1)
        """Pixels times a factor between 1 - contrast and 1 + contrast."""
        saturation: float = Field(default=0.0, ge=0, le=1)
        """Saturation factor between 1 - saturation and 1 + saturation; three channels only."""
        hue_deg: float = Field(default=0.0, ge=0, le=180)
        """Rotation of the hue; three channels only."""
        greyscale: float = Field(default=0.0, ge=0, le=1)
        """Probability of losing the colours; three channels only."""
        blur_sigma: tuple[NonNegativeFloat, NonNegativeFloat] = (0.0, 0.0)
        """Standard deviation of a Gaussian blur in pixels."""
        noise_std: NonNegativeFloat = 0.0
        """Gaussian noise of a standard deviation between 0 and this."""
        erase: float = Field(default=0.0, ge=0, le=1)
        """Probability of a black rectangle."""
        erase_side: tuple[PositiveFloat, PositiveFloat] = (0.2, 0.4)
        """Its sides, as fractions of the image's."""

        @model_validator(mode="after")
        def _ordered(self) -> Self:
            for name in ("crop_area", "scale", "blur_sigma", "erase_side"):
                low, high = getattr(self, name)
                if low > high or (name == "crop_area" and high > 1):
                    most = " and at most 1" if name == "crop_area" else ""
                    raise ValueError(
                        f"{name} is [{low}, {high}], but a range goes from low to high{most}: "
                        f"write it as [low, high]."
                    )
            return self

    config: Config

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """One random view of each image.

        Raises:
            ConfigError: changes of colour asked for images that have not three channels.
        """
        settings = self.config
        _check_channels(images.shape[1], settings)
        if len(images) == 0:
            height, width = _out_size(images, settings)
            return images.new_zeros(0, images.shape[1], height, width)
        draws = _Draws(keys)
        images = _warp(images, draws, settings)
        images = _colour(images, draws, settings)
        images = _light(images, draws, settings)
        images = _blur(images, draws, settings)
        if settings.noise_std:
            std = draws.between("noise_std", 0, settings.noise_std)
            noise = keyed_random.normal(draws.keys_of("noise"), images[0].numel())
            images = images + std[:, None, None, None] * noise.view_as(images)
        images = _erase(images, draws, settings)
        return images.clamp(0, 1)


VIEWS = Choice("augmentation", Views, {"random": RandomViews}, default="random")
AnyViews = Annotated[Views.Config, VIEWS]


def view_keys(seed: int, epoch: int | Tensor, index: Tensor, view: int) -> Tensor:
    """Keys int64 [b] of view number `view` of the samples with global `index` int64 [b]."""
    return keyed_random.combine(seed, VIEW_STREAM, epoch, index, view)


def make_view(images: Tensor, keys: Tensor, config: Views.Config) -> Tensor:
    """One view of each image by the augmentation that a config names, as `Views.__call__`."""
    return VIEWS.build(config)(images, keys)


# Each number drawn has its own stream, so that switching one change on leaves the others alone.
_STREAMS = (
    *("area", "crop_aspect", "crop_x", "crop_y", "flip", "rotation", "shift_x", "shift_y"),
    *("scale", "aspect", "shear", "brightness", "contrast", "saturation", "hue", "greyscale"),
    *("blur", "noise_std", "noise", "erase", "erase_x", "erase_y", "erase_w", "erase_h"),
)


class _Draws:
    """Uniform numbers [b] by name."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys
        self.unit = keyed_random.uniform(keys, len(_STREAMS))

    def between(self, name: str, low: float, high: float) -> Tensor:
        return low + (high - low) * self.unit[:, _STREAMS.index(name)]

    def log_between(self, name: str, largest: float) -> Tensor:
        """Log-uniform between 1 / largest and largest."""
        return self.between(name, -math.log(largest), math.log(largest)).exp()

    def chance(self, name: str, probability: float) -> Tensor:
        return self.unit[:, _STREAMS.index(name)] < probability

    def keys_of(self, name: str) -> Tensor:
        return keyed_random.combine(self.keys, _STREAMS.index(name))


def _warp(images: Tensor, draws: _Draws, s: RandomViews.Config) -> Tensor:
    """Crop, flip and affine change in one bilinear resampling; black outside the image."""
    out = _out_size(images, s)
    same_size = out == tuple(images.shape[-2:])
    neutral = RandomViews.Config()
    fields = (
        "crop_area",
        "crop_aspect",
        "flip",
        "rotation_deg",
        "translate",
        "scale",
        "aspect",
        "shear_deg",
    )
    if same_size and all(getattr(s, name) == getattr(neutral, name) for name in fields):
        return images
    from kornia.geometry import warp_affine

    matrix = _crop_matrix(draws, s, images.shape[-2:], out) @ _affine_matrix(
        draws, s, images.shape[-2:]
    )
    return warp_affine(images, matrix[:, :2].to(images.dtype), out, align_corners=True)


def _affine_matrix(draws: _Draws, s: RandomViews.Config, size: torch.Size) -> Tensor:
    """Pixel coordinates of the image to those of the changed one [b, 3, 3], about the centre."""
    from kornia.geometry import get_affine_matrix2d

    height, width = size
    rotation = draws.between("rotation", -s.rotation_deg, s.rotation_deg)
    scale = draws.between("scale", *s.scale)
    aspect = draws.log_between("aspect", s.aspect).sqrt()
    shift_x = draws.between("shift_x", -s.translate, s.translate) * width
    shift_y = draws.between("shift_y", -s.translate, s.translate) * height
    shear = draws.between("shear", -s.shear_deg, s.shear_deg) * (math.pi / 180)
    centre = [torch.full_like(rotation, (pixels - 1) / 2) for pixels in (width, height)]
    return get_affine_matrix2d(
        translations=torch.stack([shift_x, shift_y], dim=1),
        center=torch.stack(centre, dim=1),
        scale=torch.stack([scale / aspect, scale * aspect], dim=1),
        angle=rotation,
        sx=shear,
        sy=torch.zeros_like(shear),
    )


def _crop_matrix(
    draws: _Draws, s: RandomViews.Config, size: torch.Size, out: tuple[int, int]
) -> Tensor:
    """Pixel coordinates of the image to those of its crop resized to `out` [b, 3, 3]."""
    area = draws.between("area", *s.crop_area)
    aspect = draws.log_between("crop_aspect", s.crop_aspect).sqrt()
    matrix = torch.zeros(len(area), 3, 3, device=area.device)
    matrix[:, 2, 2] = 1
    sides = {"crop_x": (0, area.sqrt() * aspect), "crop_y": (1, area.sqrt() / aspect)}
    for name, (axis, fraction) in sides.items():
        side, out_side = size[1 - axis], out[1 - axis]
        length = fraction.clamp(max=1) * side
        start = draws.between(name, 0, 1) * (side - length)
        # Pixel i covers [i, i + 1): centres map by (i + 0.5 - start) * zoom - 0.5.
        zoom = out_side / length
        matrix[:, axis, axis] = zoom
        matrix[:, axis, 2] = (0.5 - start) * zoom - 0.5
    mirrored = draws.chance("flip", s.flip)
    matrix[:, 0, 2] = torch.where(mirrored, out[1] - 1 - matrix[:, 0, 2], matrix[:, 0, 2])
    matrix[:, 0, 0] = torch.where(mirrored, -matrix[:, 0, 0], matrix[:, 0, 0])
    return matrix


def _colour(images: Tensor, draws: _Draws, s: RandomViews.Config) -> Tensor:
    if not (s.saturation or s.hue_deg or s.greyscale):
        return images
    from kornia.color import rgb_to_grayscale
    from kornia.enhance import adjust_hue, adjust_saturation

    if s.saturation:
        factor = draws.between("saturation", 1 - s.saturation, 1 + s.saturation)
        images = adjust_saturation(images, factor)
    if s.hue_deg:
        turn = draws.between("hue", -s.hue_deg, s.hue_deg) * (math.pi / 180)
        images = adjust_hue(images, turn)
    if s.greyscale:
        grey = draws.chance("greyscale", s.greyscale)[:, None, None, None]
        images = torch.where(grey, rgb_to_grayscale(images).expand_as(images), images)
    return images


def _light(images: Tensor, draws: _Draws, s: RandomViews.Config) -> Tensor:
    if not (s.brightness or s.contrast):
        return images
    from kornia.enhance import adjust_brightness, adjust_contrast

    if s.contrast:
        factor = draws.between("contrast", 1 - s.contrast, 1 + s.contrast)
        images = adjust_contrast(images, factor)
    if s.brightness:
        offset = draws.between("brightness", -s.brightness, s.brightness)
        images = adjust_brightness(images, offset)
    return images


def _blur(images: Tensor, draws: _Draws, s: RandomViews.Config) -> Tensor:
    if not s.blur_sigma[1]:
        return images
    from kornia.filters import gaussian_blur2d

    sigma = draws.between("blur", *s.blur_sigma).clamp(min=1e-3)
    size = 2 * math.ceil(3 * s.blur_sigma[1]) + 1
    size = min(size, 2 * (min(images.shape[-2:]) - 1) + 1)  # reflection needs size/2 < side
    return gaussian_blur2d(images, size, torch.stack([sigma, sigma], dim=1))


def _erase(images: Tensor, draws: _Draws, s: RandomViews.Config) -> Tensor:
    if not s.erase:
        return images
    inside = draws.chance("erase", s.erase)[:, None, None]
    for axis, name in ((1, "y"), (2, "x")):
        side = images.shape[axis + 1]
        half = draws.between("erase_h" if name == "y" else "erase_w", *s.erase_side) * side / 2
        centre = draws.between(f"erase_{name}", 0, side)
        pixels = torch.arange(side, device=images.device) + 0.5
        near = (pixels - centre[:, None]).abs() < half[:, None]
        inside = inside & near.unsqueeze(3 - axis)
    return images.masked_fill(inside[:, None], 0)


def _check_channels(channels: int, settings: RandomViews.Config) -> None:
    for name in ("saturation", "hue_deg", "greyscale"):
        if channels != 3 and getattr(settings, name):
            raise ConfigError(
                f"{name} is {getattr(settings, name)}, but changes of colour need 3 channels and "
                f"the images have {channels}: set {name} to 0."
            )


def _out_size(images: Tensor, settings: RandomViews.Config) -> tuple[int, int]:
    height, width = images.shape[-2:]
    return (settings.size, settings.size) if settings.size else (height, width)
