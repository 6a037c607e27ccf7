"""Encoders: rows of one modality [b, ...] to representations [b, D], and the head on top.

Every row of the output depends on its own row of the input alone: no batch statistics and no
dropout, so that the same rows give the same result however they are shared out over ranks. All
work for b = 0 too, forward and backward, since a rank may have no rows.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dist_contrastive.errors import ConfigError
from dist_contrastive.models.layers import GROUPS, ResidualBlock, check_widths
from dist_contrastive.settings import ComponentSettings, Count, Settings, Size

PADDING = 0
BEGIN = 257  # after the bytes, which are 1 ... 256
VOCABULARY = 258


class Encoder(nn.Module, ABC):
    """Rows [b, ...] of what it `reads` to representations [b, D].

    A subclass is made as ``Class(config, shape)``, where shape is that of one row: (channels,
    height, width) of images in [0, 1], any of vectors, () of texts.
    """

    class Config(ComponentSettings):
        """Settings of an encoder."""

    reads: ClassVar[Literal["images", "vectors", "texts"]] = "images"
    """What a row is; one of texts has `tokens` too."""
    dim: int
    """D."""
    num_read: int = 0
    """Texts of which this process has made `tokens`."""
    num_cut: int = 0
    """Those of them that were longer than what is read."""

    @abstractmethod
    def forward(self, rows: Tensor) -> Tensor:
        """Representations [b, D]."""

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Rows [b, ...] of texts, which `forward` takes."""
        raise NotImplementedError(f"{type(self).__name__} reads {self.reads}")


class ResidualEncoder(Encoder):
    """Residual network with GroupNorm and mean pooling: [b, C, H, W] in [0, 1] to [b, D]."""

    class Config(Encoder.Config):
        """A small residual convolutional network."""

        name: Literal["residual"] = "residual"
        widths: tuple[Size, ...] = Field(default=(16, 32, 64), min_length=1)
        """Channels of each stage, the last of them D; each stage after the first halves height and
        width."""
        blocks: Count = 1
        """Residual blocks in each stage."""

    def __init__(self, config: Config, shape: tuple[int, ...]) -> None:
        super().__init__()
        check_widths(config.widths)
        self.dim, self.blocks_per_stage = config.widths[-1], config.blocks
        self.stem = nn.Conv2d(shape[0], config.widths[0], 3, 1, 1, bias=False)
        blocks: list[nn.Module] = []
        width_in = config.widths[0]
        for stage, width in enumerate(config.widths):
            for block in range(config.blocks):
                first = stage > 0 and block == 0
                blocks.append(ResidualBlock(width_in, width, scale=0.5 if first else 1))
                width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(GROUPS, width_in)

    def forward(self, rows: Tensor) -> Tensor:
        h = self.blocks(self.stem(2 * rows - 1))
        return F.silu(self.norm(h)).mean(dim=(2, 3))

    def with_maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The representation [b, D], and maps [b, C, h, w]: the stem's, then each stage's.

        Maps are what blocks add to, before any norm, as the next block is given them; the last is
        that after the final norm and SiLU, so that its mean is the representation.
        """
        h = self.stem(2 * images - 1)
        maps = [h]
        for number, block in enumerate(self.blocks, start=1):
            h = block(h)
            if number % self.blocks_per_stage == 0:
                maps.append(h)
        maps[-1] = F.silu(self.norm(h))
        return maps[-1].mean(dim=(2, 3)), maps


class TextEncoder(Encoder):
    """Small transformer over UTF-8 bytes: no vocabulary, no tokeniser, any language.

    The representation is the mean of the last hidden states of a text's bytes.
    A begin token stands before the bytes and counts in the mean, so that an empty text has a
    representation too. Layers are pre-norm, with GELU and a hidden layer of 4 x width.
    """

    class Config(Encoder.Config):
        """A small transformer over UTF-8 bytes."""

        name: Literal["text"] = "text"
        width: Size = 64
        """Dimension of the hidden states, and D of the representation."""
        layers: Count = 2
        """Transformer layers."""
        heads: Count = 4
        """Attention heads; they divide the width."""
        max_bytes: Size = 64
        """Bytes of a text that are read; every text costs as much as one of this length."""

        @model_validator(mode="after")
        def _heads_divide_width(self) -> Self:
            if self.width % self.heads:
                raise ValueError(
                    f"width {self.width} of the text encoder cannot be divided among its "
                    f"{self.heads} attention heads: set width to a multiple of {self.heads}."
                )
            return self

    reads = "texts"

    def __init__(self, config: Config, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.dim, self.max_bytes = config.width, config.max_bytes
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.positions = nn.Parameter(0.1 * torch.randn(1 + config.max_bytes, config.width))
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            4 * config.width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(
            layer, config.layers, nn.LayerNorm(config.width), enable_nested_tensor=False
        )

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """`text_tokens` of as many bytes as are read."""
        self.num_read += len(texts)
        self.num_cut += sum(len(text.encode(errors="replace")) > self.max_bytes for text in texts)
        return text_tokens(texts, self.max_bytes)

    def forward(self, rows: Sequence[str] | Tensor) -> Tensor:
        """Representations [b, D] of b texts, or of their `tokens` int64 [b, max_bytes]."""
        tokens = rows if isinstance(rows, Tensor) else self.tokens(rows)
        tokens = F.pad(tokens.to(self.positions.device), (1, 0), value=BEGIN)
        if len(tokens) == 0:  # attention cannot reshape 0 rows; one empty text keeps the graph
            return self._representations(tokens.new_full((1, tokens.shape[1]), BEGIN))[:0]
        return self._representations(tokens)

    def _representations(self, tokens: Tensor) -> Tensor:
        padding = tokens == PADDING
        hidden = self.layers(self.embedding(tokens) + self.positions, src_key_padding_mask=padding)
        read = (~padding).unsqueeze(2)
        return (hidden * read).sum(dim=1) / read.sum(dim=1)


def text_tokens(texts: Sequence[str], max_bytes: int) -> Tensor:
    """UTF-8 bytes of each text, plus 1, then 0 up to `max_bytes`: int64 [b, max_bytes].

    A longer text is cut at the last whole character that fits. What UTF-8 cannot hold (half of
    a surrogate pair) counts as a question mark.
    """
    rows = []
    for text in texts:
        cut = text.encode(errors="replace")[:max_bytes].decode(errors="ignore").encode()
        rows.append([byte + 1 for byte in cut] + [PADDING] * (max_bytes - len(cut)))
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), max_bytes)


class VectorEncoder(Encoder):
    """Vectors [b, F] (or arrays [b, ...] of F numbers a row) to representations [b, D].

    Each hidden layer is normalised (LayerNorm), so that features may be of any common scale. The
    input is not: with few features that would erase them, with one feature entirely.

    Raises:
        ConfigError: F is 0.
    """

    reads = "vectors"

    class Config(Encoder.Config):
        """An MLP with SiLU."""

        name: Literal["vector"] = "vector"
        hidden: Size = 64
        """Dimension of the hidden layers."""
        out: Size = 64
        """Dimension of the representation, D."""
        layers: Count = 2
        """Linear layers; 1 is a plain linear map."""

    def __init__(self, config: Config, shape: tuple[int, ...]) -> None:
        super().__init__()
        num_features = math.prod(shape)
        if num_features < 1:
            raise ConfigError(
                f"a vector encoder needs 1 feature or more, but the field has {num_features}: "
                "name a field that holds numbers."
            )
        self.dim, self.num_features = config.out, num_features
        widths = [num_features, *[config.hidden] * (config.layers - 1), config.out]
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.LayerNorm(width_out), nn.SiLU()]
        self.net = nn.Sequential(*layers[:-2])

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows.reshape(len(rows), self.num_features))


class ProjectionHead(nn.Module):
    """MLP from representations [b, D] to embeddings [b, out]; the loss normalises them."""

    class Config(Settings):
        """The MLP between the representation and the space in which the loss compares."""

        hidden: Size = 256
        """Dimension of the hidden layers."""
        out: Size = 64
        """Dimension of the compared embedding."""
        layers: Annotated[int, Field(ge=0, le=1024)] = 2
        """Linear layers; 1 is a plain linear map, 0 leaves the representation as it is."""

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        if config.layers == 0:
            self.net, self.dim = nn.Sequential(), dim
            return
        widths = [dim, *[config.hidden] * (config.layers - 1), config.out]
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.SiLU()]
        self.net = nn.Sequential(*layers[:-1])
        self.dim = config.out

    def forward(self, representations: Tensor) -> Tensor:
        return self.net(representations)


def frozen(module: nn.Module) -> nn.Module:
    """`module` in eval mode and without gradients for its parameters; inputs still get theirs."""
    return module.eval().requires_grad_(False)


def representations_of(encoder: nn.Module, inputs: Tensor, chunk: int = 1024) -> Tensor:
    """Representations of all inputs [n, ...] without gradients, `chunk` rows at a time, computed
    where the encoder is and returned to where the inputs are."""
    there, here = device_of(encoder, inputs.device), inputs.device
    with torch.no_grad():
        return torch.cat([encoder(part.to(there)).to(here) for part in inputs.split(chunk)])


def device_of(module: nn.Module, default: torch.device) -> torch.device:
    """Device of a module's weights; `default` if it has none."""
    return next((x.device for x in itertools.chain(module.parameters(), module.buffers())), default)
