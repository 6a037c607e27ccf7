"""Command lines by typer: their form, their errors, and options that take several values."""

import functools
import gc
import inspect
import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

import dist_contrastive
from dist_contrastive.cli.exit_codes import reporting_errors

_log = logging.getLogger(__name__)
_INTERRUPTED = 130
MOST_RANKS = 1024  # processes of one machine

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings to change: optim.lr=0.1; null takes one away.",
        show_default=False,
    ),
]
MayChange = Annotated[
    bool,
    typer.Option(
        "--change",
        help="Go on with another number of steps, learning rate, schedule, precision or lanes.",
    ),
]


class SeveralValues(TyperCommand):
    """A command whose list options take all values that follow them: ``--classes 1 2 3``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each of its values, as click wants it."""
        lists = {flag for p in self.params if getattr(p, "multiple", False) for flag in p.opts}
        flag, repeated = "", list[str]()
        for arg in args:
            if arg.startswith("--"):
                flag = arg if arg in lists else ""
            elif flag and repeated[-1] != flag:
                repeated.append(flag)
            repeated.append(arg)
        return super().parse_args(ctx, repeated)


class _Group(TyperGroup):
    """Commands whose help is printed without pydantic, which would take as long as all else."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Flags of the group: typer's own are False, since of None it makes a bool by pydantic."""
        flags: list[Any] = super().get_params(ctx)
        for flag in flags:
            if flag.name == "help" or flag.name.endswith("_completion"):
                flag.default = False
        return flags


def new_app(help: str = "", completion: bool = False) -> typer.Typer:
    """An app whose help is plain text: rendering by rich would take longer than all else."""
    return typer.Typer(
        cls=_Group,
        help=help,
        add_completion=completion,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def with_options(
    make: Callable[..., Any], parameter: str = "options"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a command: one of its parameters is what `make` makes of flags, those that are
    `make`'s own parameters; so several commands share them."""
    flags = inspect.signature(make).parameters

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for n, p in inspect.signature(command).parameters.items() if n != parameter]

        @functools.wraps(command)
        def with_flags(**values: Any) -> Any:
            chosen = {name: values.pop(name) for name in flags}
            return command(**values, **{parameter: make(**chosen)})

        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *flags.values())]
        with_flags.__annotations__ = {}  # all of them are in the signature
        with_flags.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return with_flags

    return decorate


@contextmanager
def quick_imports() -> Iterator[None]:
    """No garbage collection while torch is imported: it makes a million objects and no garbage,
    and looking through them is a third of the start of a training. They stay, so that later
    collections leave them out, too."""
    is_first = "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
        gc.enable()


def examples(*lines: str) -> str:
    """Epilog of a command's help: lines that can be typed as they stand."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def _as_setting(error: TyperException) -> str:
    """How a flag that is none is written as a setting, where the command takes settings."""
    flag, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    names = {p.name for p in context.command.params} if context else set()
    if not flag or "overrides" not in names:
        return ""
    from dist_contrastive.config.reference import key_of
    from dist_contrastive.sentences import no_setting

    key = key_of(flag)
    if key is None and "profile" in names:
        return "; other options of sbatch stand in the file of --profile, by sbatch: {NAME: VALUE}"
    return no_setting(flag) or f"; a setting is written {key or 'KEY'}=VALUE, without dashes"


def _text(error: TyperException) -> str:
    """What is wrong with flags, without the words of the validator of their values."""
    details: Any = getattr(error.__cause__, "errors", list)()
    if not details or not hasattr(error, "param"):
        return error.format_message()
    from dist_contrastive.sentences import problem, shown

    return f"{error.param.opts[0]} {shown(details[0]['input'])}: {problem(details[0], None)}"


def run(app: typer.Typer, name: str, argv: list[str] | None) -> int:
    """Run one command of an app; returns the exit code."""
    dist_contrastive.without_current_folder()
    main: Callable[..., Any] = typer.main.get_command(app).main
    for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with reporting_errors() as outcome:
        try:
            outcome.code = main(args=argv, prog_name=name, standalone_mode=False) or 0
        except TyperException as error:  # wrong flags
            context = getattr(error, "ctx", None)
            command = context.command_path if context else name
            message = " ".join(_text(error).split()).rstrip(".") + _as_setting(error)
            _log.error("%s: %s (see %s --help)", command, message, command)
            outcome.code = error.exit_code
        if outcome.code == _INTERRUPTED:
            _log.error("%s: interrupted", name)
    return outcome.code
