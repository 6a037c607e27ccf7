"""Several runs from one command: every combination of `key=a,b` overrides."""

import itertools

_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "'\""


def expand(overrides: list[str]) -> list[tuple[str, list[str]]]:
    """Each run's name (empty where there is only one) and its overrides; of a key that is given
    twice the last one counts.

    >>> [name for name, _ in expand(["optim.lr=0.1,0.2", "seed=1", "train.steps=5,9"])]
    ['lr=0.1,steps=5', 'lr=0.1,steps=9', 'lr=0.2,steps=5', 'lr=0.2,steps=9']
    """
    choices: dict[str, list[tuple[str, str, str]]] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        choices.pop(key, None)
        choices[key] = [(key, f"{key}{equals}{one}", one) for one in _split(value)]
    swept = [key for key, values in choices.items() if len(values) > 1]
    short = {key: _shortest(key, swept) for key in swept}
    runs = []
    for combination in itertools.product(*choices.values()):
        parts = [f"{short[key]}={value}" for key, _, value in combination if key in short]
        name = ",".join(parts).replace("/", "_").replace(" ", "")
        runs.append((name, [override for _, override, _ in combination]))
    return runs


def _split(value: str) -> list[str]:
    """At commas that are in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for char in value:
        if quote:
            quote = "" if char == quote else quote
        elif char in _QUOTES:
            quote = char
        depth += (not quote and char in _OPENING) - (not quote and char in _CLOSING)
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return parts if all(parts) else [value]


def _shortest(key: str, keys: list[str]) -> str:
    """The end of a dotted key that no other one ends with."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if not any(other != key and other.endswith(f".{end}") for other in keys):
            return end
    return key
