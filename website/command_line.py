"""The reference of the command, from the parser that reads it."""

import argparse
from collections.abc import Iterator

from saga_store.cli import make_parser


def as_markdown() -> str:
    """Return a section for each verb, with a table of what it takes."""
    return "\n".join(_sections(make_parser()))


def _sections(parser: argparse.ArgumentParser) -> Iterator[str]:
    verbs = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]  # noqa: SLF001 - argparse tells nobody else
    if not verbs:
        yield _section(parser)
    for action in verbs:
        for verb in action.choices.values():
            yield from _sections(verb)


def _section(parser: argparse.ArgumentParser) -> str:
    actions = [action for action in parser._actions if action.help is not argparse.SUPPRESS and action.dest != "help"]  # noqa: SLF001 - likewise
    taken = "".join(f" {_name(action, parser)}" for action in actions if not action.option_strings)
    options = " [OPTIONS]" if any(action.option_strings for action in actions) else ""
    lines = [f"## {parser.prog}\n", f"{parser.description}\n", f"```text\n{parser.prog}{taken}{options}\n```\n"]
    lines += ["| Argument | |", "|---|---|"]
    for action in sorted(actions, key=lambda found: bool(found.option_strings)):
        help_text = parser._get_formatter()._expand_help(action) if action.help else ""  # noqa: SLF001 - likewise
        required = " (required)" if action.option_strings and action.required else ""
        lines.append(f"| {_spelled(action, parser)} | {_escaped(help_text)}{required} |")
    return "\n".join([*lines, ""])


def _spelled(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    if not action.option_strings:
        return f"`{_name(action, parser)}`"
    value = "" if action.nargs == 0 else f" {_name(action, parser)}"
    return ", ".join(f"`{option}{value}`" for option in action.option_strings)


def _name(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    formatter = parser._get_formatter()  # noqa: SLF001 - likewise
    default = formatter._get_default_metavar_for_optional(action) if action.option_strings else action.dest  # noqa: SLF001 - likewise
    return str(formatter._format_args(action, default))  # noqa: SLF001 - likewise


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
