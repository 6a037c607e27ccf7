"""What encoders of images and of texts by `transformers` share: where weights come from, which of
them are trained."""

import difflib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from dist_contrastive.errors import ConfigError
from dist_contrastive.models.encoders import Encoder
from dist_contrastive.settings import Settings, Size

_HUB_TIMEOUT_S = 10
Half = Literal["text", "vision"]
# Checkpoints of two towers, by their model_type, and the classes of one of them.
_HALVES = {
    "clip": ("CLIPTextModelWithProjection", "CLIPVisionModelWithProjection"),
    "metaclip_2": ("MetaClip2TextModelWithProjection", "MetaClip2VisionModelWithProjection"),
    "siglip": ("SiglipTextModel", "SiglipVisionModel"),
    "siglip2": ("Siglip2TextModel", "Siglip2VisionModel"),
}

logger = logging.getLogger(__name__)


class LoraConfig(Settings):
    """Low-rank adapters (Hu et al., arXiv 2106.09685), trained in the place of the model."""

    rank: Size = 8
    """Rank of the change of each matrix."""
    alpha: PositiveInt | None = None
    """The change is multiplied by alpha / rank; null: by 2."""
    targets: tuple[str, ...] = Field(default=("query", "value"), min_length=1)
    """Linear layers that get one, by the last parts of their names; each must match some."""


class TransformersTower(Encoder):
    """Base of the encoders with a model of `transformers`."""

    class Config(Encoder.Config):
        """A model of `transformers`: `model_type` (random weights) or `pretrained`."""

        model_type: str | None = None
        """Architecture by its `transformers` name: of images `vit`, `dinov2`, `convnext` or `swin`,
        of texts `bert`, `modernbert` or `roberta`, and others."""
        pretrained: str | None = None
        """Folder or hub name of a checkpoint; its weights must be safetensors."""
        config: dict[str, Any] = Field(default_factory=dict)
        """Fields of the model's configuration to override, as `{hidden_size: 192}`. Those that
        `model_type` models have for the size and channels of images, or the number of tokens, are
        set from the data and the tokenizer."""
        initialise_missing: bool = False
        """Draw at random what the checkpoint lacks of the weights that are used, and say which;
        false refuses such a checkpoint."""
        train_blocks: Annotated[int, Field(ge=0, le=1024)] | None = None
        """Train the last so many blocks and what comes after them, and freeze the rest; 0 freezes
        the whole model, null trains it."""
        lora: LoraConfig | None = None
        """Train low-rank adapters and freeze the model; null: none. Needs the package peft."""
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
            if self.lora is not None and self.train_blocks is not None:
                raise ValueError(
                    "lora trains adapters alone, and train_blocks blocks of the model; leave out "
                    "one of them"
                )
            return self

        @property
        def title(self) -> str:
            """What messages call the model."""
            return f"transformers model {(self.model_type or self.pretrained)!r}"

    config: Config
    model: nn.Module

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.model.train(mode and not self.config.row_independent)
        return self

    def _prepare(self, output: Callable[[], Tensor], missing: set[str]) -> int:
        """D of what `output` makes; freezes what is not to be trained, and parameters that the
        output does not depend on, because DDP would wait for their gradients.

        Args:
            missing: weights that the checkpoint has not.

        Raises:
            ConfigError: the output depends on some of these; blocks or targets that are not there.
        """
        self.eval()
        dim, used = self._used(output)
        self._check_missing([name for name in used if name in missing])
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.removeprefix("model.") in used)
        if self.config.train_blocks is not None:
            self._freeze_before(self.config.train_blocks)
        if self.config.lora is not None:
            add_adapters(self.model, self.config.lora, self.config.title)
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("lora_" in name)
            _, used = self._used(output)
            idle = [
                n for n, p in self.model.named_parameters() if p.requires_grad and n not in used
            ]
            if idle:
                raise ConfigError(
                    f"lora.targets: {idle[0]} of {self.config.title} takes no part in its output, "
                    f"as where a layer's weight is read and the layer not called; leave that out"
                )
        self.train()
        return dim

    def _used(self, output: Callable[[], Tensor]) -> tuple[int, set[str]]:
        """D, and the trainable parameters of this module that the output depends on, named as in
        the model."""
        with torch.enable_grad():
            result = output()
            trainable = {name: p for name, p in self.named_parameters() if p.requires_grad}
            grads = torch.autograd.grad(result.sum(), list(trainable.values()), allow_unused=True)
        used = {
            name.removeprefix("model.")
            for name, grad in zip(trainable, grads, strict=True)
            if grad is not None
        }
        return result.shape[1], used

    def _freeze_before(self, count: int) -> None:
        """Freeze all but the last blocks, and what is defined after them."""
        if count == 0:
            self.requires_grad_(False)
            return
        name, blocks = blocks_of(self.model, self.config.title)
        if count > len(blocks):
            raise ConfigError(
                f"train_blocks={count}, and {self.config.title} has {len(blocks)} blocks; set it "
                f"to at most that, or null"
            )
        for at, parameter in self.model.named_parameters():
            if at.startswith(f"{name}.{len(blocks) - count}."):
                return
            parameter.requires_grad_(False)

    def _check_missing(self, names: list[str]) -> None:
        if not names:
            return
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        if not self.config.initialise_missing:
            raise ConfigError(
                f"{self.config.title} lacks weights that the encoder uses ({shown}); name a "
                f"checkpoint that has them, choose another pool, or draw them at random: "
                f"initialise_missing=true"
            )
        logger.warning(f"{self.config.title} lacks {shown}: drawn at random")


def blocks_of(model: nn.Module, title: str) -> tuple[str, nn.ModuleList]:
    """The blocks of a model and their name: the first of its longest lists of modules.

    Raises:
        ConfigError: it has none.
    """
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{x}.") for x, _ in lists)]
    if not outer:
        raise ConfigError(f"{title} has no list of blocks; set train_blocks to null or 0")
    return max(outer, key=lambda x: len(x[1]))


def add_adapters(model: nn.Module, config: LoraConfig, title: str) -> None:
    """Low-rank adapters in the place of linear layers.

    Raises:
        ConfigError: peft is not installed, or a target that matches no linear layer.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("lora needs the package peft: pip install peft") from error
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for target in config.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            ends = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ConfigError(
                f"lora.targets: no linear layer of {title} is named {target!r}; name some of "
                f"{', '.join(ends)}"
            )
    alpha = 2 * config.rank if config.alpha is None else config.alpha
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=alpha, target_modules=list(config.targets), lora_dropout=0.0
    )
    peft.inject_adapter_in_model(settings, model)


def load_model(
    config: TransformersTower.Config, fields: dict[str, Any], half: Half, kind: str
) -> tuple[Any, set[str]]:
    """The model in fp32, and the names of the weights that a checkpoint lacks.

    Args:
        fields: of the configuration. half: which is taken of a checkpoint of two towers.
        kind: of models that fit, with some names, for messages.

    Raises:
        ConfigError: it cannot be built.
    """
    import transformers

    if config.pretrained is not None:
        check_there(config.pretrained)
    try:
        if config.pretrained is None:
            assert config.model_type is not None  # the settings have exactly one source
            architecture = transformers.AutoConfig.for_model(config.model_type, **fields)
            return transformers.AutoModel.from_config(architecture), set()
        with _quiet():
            cls, known = _class_of(config.pretrained, half)
            model, found = cls.from_pretrained(
                config.pretrained,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which is refused below, in other words
                **known | fields,
            )
    except ConfigError:
        raise
    except Exception as error:  # transformers and the hub have kinds of their own
        raise ConfigError(
            f"cannot build {config.title}: {first_sentence(error)}; give model_type the name of "
            f"{kind}, or pretrained a folder with safetensors."
        ) from error
    if found["mismatched_keys"]:
        name = sorted(str(x[0]) for x in found["mismatched_keys"])[0]
        raise ConfigError(
            f"{config.title}: weights of another size than the configuration's, as {name}; leave "
            f"the field of config out that changes it"
        )
    return model, set(found["missing_keys"])


def _class_of(name: str, half: Half) -> tuple[Any, dict[str, Any]]:
    """The class that reads a checkpoint, and what its configuration needs to know; of two towers
    that of one."""
    import transformers

    whole = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    if whole.model_type not in _HALVES:
        return transformers.AutoModel, {}
    cls = getattr(transformers, _HALVES[whole.model_type][half == "vision"])
    width = getattr(whole, "projection_dim", None)  # one tower's may be a default, and not used
    return cls, {} if width is None else {"projection_dim": width}


def check_there(name: str) -> None:
    """Refuse a name that is neither a folder nor cached nor on the hub, at once where that cannot
    be reached: `transformers` itself would ask for one file after the other.

    Raises:
        ConfigError: as said.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    if Path(name).is_dir():
        return
    if Path(name).is_absolute():
        raise ConfigError(f"there is no folder {name!r}; name one that holds a checkpoint")
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # the hub and its transport have kinds of their own
        raise ConfigError(
            f"{name!r} is no folder here, is not cached, and the hub does not give it "
            f"({first_sentence(error)}); give a folder, or download it where there is a network"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither a progress bar nor a report: what a checkpoint lacks is said here."""
    from transformers.utils import logging as messages

    shown, verbosity = messages.is_progress_bar_enabled(), messages.get_verbosity()
    messages.disable_progress_bar()
    messages.set_verbosity_error()
    try:
        yield
    finally:
        messages.set_verbosity(verbosity)
        if shown:
            messages.enable_progress_bar()


def known_fields(config: TransformersTower.Config) -> dict[str, Any]:
    """Fields of the architecture's configuration; unknown ones of `config` are refused."""
    from transformers import AutoConfig

    assert config.model_type is not None  # the settings have exactly one source
    try:
        known: dict[str, Any] = AutoConfig.for_model(config.model_type).to_dict()
    except ValueError as error:
        raise ConfigError(
            f"cannot build {config.title}: {first_sentence(error)}; give model_type a name that "
            f"transformers knows"
        ) from error
    for name in config.config:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{config.title} has no configuration field {name!r}: "
                + (f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(known)}.")
            )
    return known


def first_sentence(error: Exception) -> str:
    """The first sentence of an error, short enough to quote."""
    return str(error).strip().split("\n")[0].split(". ")[0][:160]
