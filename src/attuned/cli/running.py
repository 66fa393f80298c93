"""Runs the command: its parser, its failures, its exit status."""

import argparse
import contextlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from attuned_store import StoreError, ValidationError, __version__

from . import files, service, states
from .arguments import Command
from .showing import CommandError, complain, listed, mute, plural
from .tour import TOUR

_COMMANDS = {it.name: it for it in (TOUR, *files.ROWS, *states.COMMANDS, *files.BACKUPS, service.SERVE)}


class _Formatter(argparse.HelpFormatter):
    """Wraps what is described to the width of the terminal, paragraph by paragraph."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled = super()._fill_text
        return "\n\n".join(filled(part, width, indent) for part in text.strip().split("\n\n"))


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)", 2)


def _parse(argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    text = "a directory, or http(s)://host:6333; default: $ATTUNED_STORE, $QDRANT_URL, "
    text += "$ATTUNED_STORE_PATH or ./attuned_state"
    common.add_argument("--store", metavar="TARGET", help=text)
    common.add_argument("--engine", choices=["auto", "edge", "local"], help="of a directory; default: auto")
    common.add_argument("--json", action="store_true", help="JSON, one object a line")
    about = "Keeps the latest state of every user, and a bounded history."
    example = "example: attuned-store --store ./mood import film_mood.csv --scale 0:31"
    options: dict[str, Any] = {"parents": [common], "allow_abbrev": False}
    options["formatter_class"] = _Formatter
    parser = _Parser(prog="attuned-store", description=about, epilog=example, **options)
    parser.add_argument("--version", action="version", version=f"attuned-store {__version__}")
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS.values():
        about = f"{command.help[0].upper()}{command.help[1:]}.{command.notes}"
        example = f"example: attuned-store {command.name} {command.example}"
        options |= {"help": command.help, "description": about, "epilog": example}
        child = parsers.add_parser(command.name, **options)
        for names, settings in command.arguments:
            child.add_argument(*names, **settings)

    words: list[str] = []
    for word in argv:  # '--scale -3:3', which argparse takes for two options
        if words and words[-1] in {"--scale", "--threshold"} and re.match(r"-[\d.]", word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    # Not as defaults of the parser: the one of the command would overrule what stood before it.
    args, rest = parser.parse_known_args(words, argparse.Namespace(store=None, engine=None, json=False))
    command = _COMMANDS[args.command]
    # Pairs and users may stand on both sides of an option, which argparse allows in no subcommand.
    wrong = [word for word in rest if command.more is None or (word.startswith("-") and word != "--")]
    if wrong:
        raise CommandError(f"not understood: {listed(wrong)} (see attuned-store {args.command} --help)", 2)
    if command.more is not None:
        vars(args)[command.more] += [word for word in rest if word != "--"]
    return command, args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    0 done, 1 failed or rows skipped, 2 wrongly used, 130 interrupted. What goes wrong is one line on stderr,
    never a traceback (except with python -X dev); a reader that closes the pipe is no error.
    """
    status = 0
    flush = getattr(sys.stdout, "flush", int)  # stdout may be None
    try:
        command, args = _parse(sys.argv[1:] if argv is None else argv)
        status = command.run(args)
        flush()
    except SystemExit as stop:  # --help and --version
        with contextlib.suppress(BrokenPipeError):
            flush()
            return int(stop.code or 0)
        mute(sys.stdout)
    except BrokenPipeError:
        mute(sys.stdout)
    except (KeyboardInterrupt, Exception) as error:
        if sys.flags.dev_mode:
            raise
        reason, status = str(error), 2 if isinstance(error, ValidationError) else 1
        if isinstance(error, KeyboardInterrupt):
            reason, status = "interrupted", 130
        elif isinstance(error, CommandError):
            status = error.status
        elif isinstance(error, OSError) and error.filename is not None and error.strerror:
            reason = f"{error.filename}: {error.strerror}"  # as other commands say it
        elif not isinstance(error, StoreError | OSError | NotImplementedError):
            reason = f"unexpected {type(error).__name__}: {reason}"
        written: int | None = getattr(error, "written", None)
        complain(reason + (f" ({plural(written, 'snapshot')} were written)" if written else ""))
        try:
            flush()  # what was printed before a failure
        except OSError:
            mute(sys.stdout)
    return status
