"""Folders of sentence-transformers: a pipeline of modules of which the model is the first."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_contrastive.errors import ConfigError

_POOLS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
}
_ACTIVATIONS = {"Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU}


@dataclass(frozen=True)
class SentenceFolder:
    """What such a folder says beside the weights of the model; nothing, of other folders."""

    pool: Any = None
    """Pooling; None: it does not say."""
    max_tokens: int | None = None
    do_lower_case: bool = False
    steps: tuple[tuple[str, Path], ...] = field(default=())
    """Modules after the pooling: their types, and their folders."""

    @classmethod
    def open(cls, folder: str | None) -> "SentenceFolder":
        """Read one. Raises: ConfigError: a module that is not known here."""
        if folder is None or not (Path(folder) / "modules.json").is_file():
            return cls()
        root = Path(folder)
        modules = [(x["type"].rsplit(".", 1)[-1], root / x["path"]) for x in _json(root, "modules")]
        kinds = [kind for kind, _ in modules]
        unknown = [kind for kind in kinds[2:] if kind not in ("Dense", "Normalize")]
        if kinds[:2] != ["Transformer", "Pooling"] or unknown:
            raise ConfigError(
                f"{folder} is a pipeline of {', '.join(kinds)}, of which Transformer, Pooling, "
                f"Dense and Normalize can be run here; name a folder of these"
            )
        if modules[0][1] != root:
            raise ConfigError(
                f"the weights of {folder} are in {modules[0][1].name}; set pretrained to that "
                f"folder, and pool and max_tokens as wanted"
            )
        settings = _json(root, "sentence_bert_config")
        return cls(
            _pool(folder, _json(modules[1][1], "config")),
            settings.get("max_seq_length"),
            bool(settings.get("do_lower_case")),
            tuple(modules[2:]),
        )

    def layers(self) -> nn.Module:
        """What comes after the pooling: [b, D] to [b, D]."""
        return nn.Sequential(
            *(_dense(at) if kind == "Dense" else Unit() for kind, at in self.steps)
        )


class Unit(nn.Module):
    """Rows of length 1."""

    def forward(self, rows: Tensor) -> Tensor:
        """[b, D] to [b, D]."""
        return F.normalize(rows)


def _pool(folder: str, settings: dict[str, Any]) -> str:
    """The one pooling of a folder."""
    named = settings.get("pooling_mode")
    known = [pool for pool, key in _POOLS.items() if settings.get(key)]
    known = [{"lasttoken": "last"}.get(named, named)] if named else known
    others = [key for key, on in settings.items() if key.startswith("pooling_mode_") and on is True]
    if len(known) != 1 or known[0] not in _POOLS or len(others) > 1:
        raise ConfigError(
            f"{folder} pools by {named or ', '.join(others) or 'nothing'}; here one of cls, mean "
            f"and last can be: set pool"
        )
    if settings.get("include_prompt") is False:
        raise ConfigError(
            f"{folder} leaves the prompt out of its pooling (include_prompt), which is not known "
            f"here; name another folder"
        )
    return str(known[0])


def _dense(folder: Path) -> nn.Module:
    from safetensors.torch import load_file

    settings = _json(folder, "config")
    activation = str(settings.get("activation_function", "")).rsplit(".", 1)[-1]
    if activation not in _ACTIVATIONS:
        raise ConfigError(
            f"the activation {activation!r} of {folder} is none of {', '.join(_ACTIVATIONS)}; name "
            f"another folder"
        )
    if not (file := folder / "model.safetensors").is_file():
        raise ConfigError(f"{folder} has no model.safetensors; save it as such")
    weights = {name.removeprefix("linear."): x.float() for name, x in load_file(file).items()}
    width_out, width_in = weights["weight"].shape
    linear = nn.Linear(width_in, width_out, bias="bias" in weights, dtype=torch.float32)
    linear.load_state_dict(weights)
    return nn.Sequential(linear, _ACTIVATIONS[activation]())


def _json(folder: Path, name: str) -> Any:
    file = folder / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else {}
