"""Errors that end a run with an exit code of their own."""

import re
from collections.abc import Callable
from typing import Any, NoReturn

EXIT_RESTART = 75
"""Ended early: another start goes on from the last checkpoint."""
FINAL_EXIT_CODES = (0, 2, 64, 70, 93)
"""Done, wrong flags, config or data, not finite or collapsed, no progress: another start would end
alike."""


# A user and password, which holds no slash where it could be a port, and the query of a URL, which
# may be a signature.
_LOGIN = re.compile(r"(://)(?:[^\s/'\"]+|[^\s/'\":]*:(?!\d+/)[^\s'\"]*)@")
_QUERY = re.compile(r"(://[^\s?'\"<>]*)\?(?=[^\s'\"<>]*=)[^\s'\"<>]*?(?=[;,.:)]*(?:[\s'\"<>]|$))")
_HIDDEN = "***"


def redacted(value: Any) -> Any:
    """A text, or the texts in settings, without the passwords and signatures of URLs."""
    if isinstance(value, dict):
        return {name: redacted(part) for name, part in value.items()}
    if isinstance(value, list):
        return [redacted(part) for part in value]
    if not isinstance(value, str) or "://" not in value:
        return value
    return _QUERY.sub(rf"\1?{_HIDDEN}", _LOGIN.sub(rf"\1{_HIDDEN}@", value))


def is_redacted(location: str) -> bool:
    """Whether a URL has lost its password or signature."""
    return f"://{_HIDDEN}@" in location or location.endswith(f"?{_HIDDEN}")


def _printable(text: str) -> str:
    """Text on one line, without what a terminal would take for a command."""
    if text.isprintable():
        return text
    return "".join(x if x.isprintable() else " " if x.isspace() else repr(x)[1:-1] for x in text)


class UserError(ValueError):
    """Something the user can mend: one sentence with the value, the limit and the fix, in which
    there are no passwords or signatures, whatever it quotes."""

    exit_code = 64

    def __init__(self, message: str = "") -> None:
        super().__init__(_printable(redacted(str(message))))


class ConfigError(UserError):
    """A setting that is unknown, impossible, or impossible together with another one."""


class DataError(UserError):
    """Shards, an index or samples that cannot be used as they are."""


class UnreadableSample(DataError):
    """A sample that is damaged or missing; a stream may replace a bounded number of them."""


class UnreachableError(DataError):
    """A server that did not answer, however often it was asked. Later it may: start again."""

    exit_code = EXIT_RESTART


class LostWorkerError(UserError):
    """A process that reads ahead was killed, most often for memory. Start again."""

    exit_code = EXIT_RESTART


class StorageError(UserError):
    """A checkpoint that had to be written or read could not be; none is lost. Start again."""

    exit_code = EXIT_RESTART


class LostRankError(UserError):
    """Another rank has ended, and tells why by itself. Start again."""

    exit_code = EXIT_RESTART


class StalledError(UserError):
    """A rank has not been heard for too long. Start again."""

    exit_code = EXIT_RESTART


class CollapseError(UserError):
    """Embeddings are the same for all samples, or as good as; `evaluate.on_collapse` is stop."""

    exit_code = 70


class NoProgressError(UserError):
    """Started several times, a run never came to its next checkpoint: do not start it again."""

    exit_code = 93


class MemoryLimitError(UserError):
    """A rank has not the memory for a step; the others do not know."""


class LockedError(UserError):
    """Another run writes into the run directory."""


class ChangedError(UserError):
    """Another run has written into the run directory while this one was opened. Start again."""

    exit_code = EXIT_RESTART


class NonFiniteError(RuntimeError):
    """NaN or infinity in embeddings, loss or gradients; names the step and the ranks."""

    exit_code = 70


def retired(module: str, names: dict[str, str]) -> Callable[[str], NoReturn]:
    """Module-level ``__getattr__`` that fails with the new name of a retired one.

    It fails with an ImportError, since ``from module import name`` replaces the message of an
    AttributeError.
    """

    def missing(name: str) -> NoReturn:
        if name in names:
            raise ImportError(f"{module}.{name} is now {names[name]}; import that")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return missing
