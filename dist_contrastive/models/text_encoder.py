"""A small transformer over the bytes of a text: no vocabulary, no tokeniser, any language.

Every row of the output depends on its own text alone: texts are padded to one fixed length, not
to the longest of their batch, and there is no dropout. Works for b = 0, forward and backward.
"""

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from dist_contrastive.settings import Settings

PADDING = 0
BEGIN = 257  # after the bytes, which are 1 ... 256
VOCABULARY = 258


class TextEncoderSettings(Settings):
    """A small transformer over UTF-8 bytes."""

    name: Literal["text"] = "text"
    width: PositiveInt = 64
    """Of the hidden states, and D of the representation."""
    layers: PositiveInt = 2
    heads: PositiveInt = 4
    """Attention heads; they divide the width."""
    max_bytes: PositiveInt = 64
    """What of a text is read; every text costs as much as one of this length."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} of the text encoder cannot be divided among its "
                f"{self.heads} attention heads: set width to a multiple of {self.heads}."
            )
        return self


class TextEncoder(nn.Module):
    """Texts to representations [b, D]: the mean of the last hidden states of a text's bytes.

    A begin token stands before the bytes and counts in the mean, so that an empty text has a
    representation too. Layers are pre-norm, with GELU and a hidden layer of 4 x width.
    """

    def __init__(self, settings: TextEncoderSettings) -> None:
        super().__init__()
        self.dim, self.max_bytes = settings.width, settings.max_bytes
        self.embedding = nn.Embedding(VOCABULARY, settings.width)
        self.positions = nn.Parameter(0.1 * torch.randn(1 + settings.max_bytes, settings.width))
        layer = nn.TransformerEncoderLayer(
            settings.width,
            settings.heads,
            4 * settings.width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(
            layer, settings.layers, nn.LayerNorm(settings.width), enable_nested_tensor=False
        )

    def forward(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Representations [b, D] of b texts, or of their `text_tokens` int64 [b, max_bytes]."""
        tokens = texts if isinstance(texts, Tensor) else text_tokens(texts, self.max_bytes)
        tokens = nn.functional.pad(tokens.to(self.positions.device), (1, 0), value=BEGIN)
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
