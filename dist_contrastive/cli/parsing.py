"""What argparse leaves to do for commands with `key=value` overrides."""

import argparse


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parsed arguments, overrides after options among them: argparse takes positional arguments of
    a subcommand in one place only."""
    args, rest = parser.parse_known_args(argv)
    takes_more = hasattr(args, "overrides") and not any(x.startswith("-") for x in rest)
    if rest and not takes_more:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args
