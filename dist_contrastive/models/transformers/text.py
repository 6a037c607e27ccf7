"""Any text model of `transformers` with its tokenizer as an encoder; folders of
sentence-transformers with their pooling."""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dist_contrastive.errors import ConfigError
from dist_contrastive.models.transformers.sentence_folder import SentenceFolder
from dist_contrastive.models.transformers.tower import (
    TransformersTower,
    check_there,
    first_sentence,
    known_fields,
    load_model,
)
from dist_contrastive.settings import Count, Size

Pool = Literal["cls", "mean", "last", "pooler"]
_MOST_TOKENS = 512  # of a text, where neither the settings nor the checkpoint say
_UNLIMITED = 10**9  # tokenizers without a limit have 1e30

# How towers of checkpoints with two of them were trained, by the model_type of the half.
_POOLS: dict[str, Pool] = {
    "clip_text_model": "last",
    "metaclip_2_text_model": "last",
    "siglip_text_model": "pooler",
    "siglip2_text_model": "pooler",
}
_READ_PADDING = ("siglip_text_model", "siglip2_text_model")


class TransformersTextEncoder(TransformersTower):
    """A `transformers` text model: texts to representations [b, D].

    A row is the ids of a text's tokens and the mask of those that are read, int64 [2, L]: what
    stands beyond the mask changes nothing. Texts are padded on the right to the longest of those
    tokenised together. Of the hidden states [L, D] of a text

        ``cls``     is the first,
        ``mean``    the mean of those that are read,
        ``last``    the last that is read,
        ``pooler``  what the model itself makes of them.

    A folder of sentence-transformers brings its pooling, its length, and layers after these; the
    text tower of a CLIP the state of the end, and its projection; that of a SigLIP its own pooling,
    of texts in lower case that are padded to their full length, and the padding is read.

    Raises:
        ConfigError: unknown model, not a text model, a tokenizer or checkpoint that does not fit.
    """

    class Config(TransformersTower.Config):
        """A text model of `transformers` and its tokenizer: `model_type` (random weights) or
        `pretrained`."""

        name: Literal["transformers_text"] = "transformers_text"
        tokenizer: str | None = None
        """Folder or hub name of the tokenizer; null: that of `pretrained`."""
        pool: Literal["auto"] | Pool = "auto"
        """The representation: the state of the first token (cls), of the last, the mean of all, or
        the model's own pooled output. auto: as the checkpoint was trained, where that is known,
        else mean."""
        max_tokens: Size | None = None
        """Tokens of a text that are read, special ones included; longer texts are cut. null: as
        many as the checkpoint was made for."""
        prompt: str = ""
        """Text before every text, as `query: `."""
        pad_to: Count = 8
        """Lengths are padded to a multiple of it."""

    config: Config
    reads = "texts"

    def __init__(self, config: Config, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.config = config
        folder = SentenceFolder.open(config.pretrained)
        self.tokenizer = _tokenizer(config)
        self.model, missing = _load(config, len(self.tokenizer))
        kind = str(getattr(self.model.config, "model_type", ""))
        self.reads_padding = kind in _READ_PADDING
        self.to_lower = folder.do_lower_case or self.reads_padding
        known: Pool = folder.pool or _POOLS.get(kind, "mean")
        self.pool: Pool = known if config.pool == "auto" else config.pool
        self.max_tokens = _limit(config, folder, self.tokenizer, self.model)
        self.after: nn.Module = folder.layers()
        self.dim = self._prepare(lambda: self(self.tokens(["a text"])), missing)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Ids and mask of texts: int64 [b, 2, L].

        A text of which the tokenizer makes nothing is one token, that of the end or of padding.
        """
        texts = [self.config.prompt + text for text in texts]
        if self.to_lower:
            texts = [text.lower() for text in texts]
        # Padding is made here: that of a tokenizer is a state that its users share.
        found = self.tokenizer(texts, truncation=True, max_length=self.max_tokens) if texts else {}
        ids = [x or [_nothing(self.tokenizer)] for x in found.get("input_ids", ())]
        self.num_read += len(ids)
        self.num_cut += sum(bool(x.overflowing) for x in getattr(found, "encodings", ()))
        length = max(map(len, ids), default=1)
        length = min(-(-length // self.config.pad_to) * self.config.pad_to, self.max_tokens)
        if self.reads_padding:
            length = self.max_tokens
        rows = torch.zeros(len(ids), 2, length, dtype=torch.int64)
        rows[:, 0] = self.tokenizer.pad_token_id
        for row, tokens in zip(rows, ids, strict=True):
            row[0, : len(tokens)], row[1, : len(tokens)] = torch.tensor(tokens), 1
        if self.reads_padding:
            rows[:, 1] = 1
        return rows

    def forward(self, rows: Sequence[str] | Tensor) -> Tensor:
        """Representations [b, D] of b texts, or of their `tokens` int64 [b, 2, L]."""
        rows = rows if isinstance(rows, Tensor) else self.tokens(rows)
        rows = rows.to(next(self.model.parameters()).device)
        if len(rows) == 0:  # many models cannot reshape 0 rows; one token keeps the graph
            return self._representations(rows.new_ones(1, 2, 1))[:0]
        return self._representations(rows)

    def _representations(self, rows: Tensor) -> Tensor:
        ids, mask = rows.unbind(1)
        output = self.model(input_ids=ids, attention_mask=mask)
        pooled = self._pooled(output, mask)
        if (projection := getattr(self.model, "text_projection", None)) is not None:
            pooled = projection(pooled)
        return self.after(pooled)

    def _pooled(self, output: Any, mask: Tensor) -> Tensor:
        if self.pool == "pooler":
            pooled: Tensor | None = getattr(output, "pooler_output", None)
            if pooled is None:
                raise ConfigError(
                    f"pool: pooler needs a model with a pooled output, and {self.config.title} has "
                    f"none: use cls, mean or last."
                )
            return pooled
        hidden: Tensor = output.last_hidden_state
        if self.pool == "cls":
            return hidden[:, 0]
        if self.pool == "last":
            row = torch.arange(len(mask), device=mask.device)
            return hidden[row, mask.sum(1) - 1]
        read = mask[:, :, None].to(hidden.dtype)
        return (hidden * read).sum(1) / read.sum(1)


def _tokenizer(config: TransformersTextEncoder.Config) -> Any:
    from transformers import AutoTokenizer

    name = config.tokenizer or config.pretrained
    if name is None:
        raise ConfigError(
            f"{config.title} has random weights and no tokenizer; set tokenizer to a folder or hub "
            f"name that has one"
        )
    check_there(name)
    try:
        # On the right, since learned positions count from the first token, padding included.
        tokenizer = AutoTokenizer.from_pretrained(
            name, padding_side="right", truncation_side="right", trust_remote_code=False
        )
    except Exception as error:  # transformers and the hub have kinds of their own
        raise ConfigError(
            f"cannot load the tokenizer {name!r}: {first_sentence(error)}; give tokenizer a folder "
            f"with tokenizer.json"
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer {name!r} has neither a token of padding nor one of the end; add a "
                f"pad_token to its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token  # never read: the mask travels with the ids
    return tokenizer


def _load(config: TransformersTextEncoder.Config, vocabulary: int) -> tuple[nn.Module, set[str]]:
    fields = config.config
    if config.pretrained is None:
        known = known_fields(config)
        fields = ({"vocab_size": vocabulary} if "vocab_size" in known else {}) | fields
    kind = "a text model such as bert, roberta or modernbert"
    model, missing = load_model(config, fields, "text", kind)
    parameters = inspect.signature(model.forward).parameters
    if not {"input_ids", "attention_mask"} <= set(parameters) or "pixel_values" in parameters:
        raise ConfigError(f"{config.title} does not take texts alone: use {kind}")
    rows = model.get_input_embeddings().num_embeddings
    if vocabulary > rows:
        raise ConfigError(
            f"the tokenizer of {config.title} has {vocabulary} tokens, and the model embeds "
            f"{rows}; name the tokenizer that it was trained with"
        )
    return model, missing


def _limit(
    config: TransformersTextEncoder.Config, folder: SentenceFolder, tokenizer: Any, model: nn.Module
) -> int:
    """Tokens of a text that are read."""
    architecture: Any = model.config
    most = getattr(architecture, "max_position_embeddings", None) or _UNLIMITED
    padding = getattr(architecture, "pad_token_id", None)
    if getattr(architecture, "model_type", "") in _OFFSET_POSITIONS and padding is not None:
        most -= padding + 1
    if config.max_tokens is not None:
        if config.max_tokens > most:
            raise ConfigError(
                f"max_tokens={config.max_tokens} is more than the {most} positions of "
                f"{config.title}; set it to at most that"
            )
        return config.max_tokens
    known = folder.max_tokens or int(min(tokenizer.model_max_length, _UNLIMITED))
    return min(known if known < _UNLIMITED else _MOST_TOKENS, most)


# The first rows of their table of positions, up to that of the padding, are no positions.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")


def _nothing(tokenizer: Any) -> int:
    """The token of a text without tokens."""
    ids = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id
    return next(x for x in ids if x is not None)
