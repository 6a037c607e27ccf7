"""Where a config names a value inside of a field, as `json.label`; texts drawn from several."""

import hashlib
import re
import reprlib
from typing import Any

from dist_contrastive.errors import UnreadableSample

ABSENT = object()
"""What is inside of a field under a name that it has not."""
_IN_JSON = re.compile(r"((?:.*?\.)?json)\.(.+)")


def place_in_json(path: str) -> tuple[str, str]:
    """Field, and the name inside of it: "meta.json.a.b" is "a.b" in "meta.json"."""
    found = _IN_JSON.fullmatch(path)
    return (found[1], found[2]) if found else (path, "")


def place_of_label(path: str) -> tuple[str, str]:
    """Field, and the name inside of it, which may be one of any kind: "info.label"."""
    name, inner = place_in_json(path)
    if not inner and not name.endswith("json"):
        name, _, inner = path.partition(".")
    return name, inner


def inside(value: Any, inner: str) -> Any:
    """What an object holds under a name, or under one of an object in it: "a.b"; or ABSENT."""
    if isinstance(value, dict):
        if inner in value:
            return value[inner]
        name, dot, rest = inner.partition(".")
        if dot and name in value:
            return inside(value[name], rest)
    return ABSENT


def drawn_text(sample: dict[str, Any], path: str, seed: int) -> str:
    """A text inside of a JSON field; of several one, by (seed, epoch, key of the sample).

    Args:
        path: of several joined by ";" the first that holds a text counts.

    Raises:
        UnreadableSample: there is none.
    """
    for one in path.split(";"):
        name, inner = place_in_json(one)
        value = inside(sample.get(name), inner) if inner else sample.get(name)
        held = value if isinstance(value, list) else [value]
        if texts := [text for text in held if isinstance(text, str) and text.strip()]:
            break
    if not texts:
        what = "nothing" if value is ABSENT else reprlib.repr(value)
        raise UnreadableSample(
            f"sample {sample['__key__']} holds {what} in {path!r}; give it a text or a list of "
            f"texts, leave it out, or name another field as data.pair"
        )
    if len(texts) == 1:
        return texts[0]
    key = f"{seed} {sample['__epoch__']} {sample['__key__']}".encode("utf-8", "surrogateescape")
    draw = hashlib.blake2b(key, digest_size=8).digest()
    return texts[int.from_bytes(draw, "big") % len(texts)]
