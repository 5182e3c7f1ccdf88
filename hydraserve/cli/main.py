"""`hydraserve [COMMAND] ...`; without a command, `serve`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from hydraserve.errors import ConfigError, HydraServeError

# Name -> module under hydraserve.cli, imported when it is called for. Each has HELP, add_arguments(parser)
# and run(args) -> exit code.
COMMANDS = ("serve", "models", "adapters", "route", "bench", "plan", "inspect", "convert", "train", "heads", "analyze")

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("--version", "-V"):
        print(f"hydraserve {version('hydraserve')}")
        return 0
    if arguments and arguments[0] in ("--help", "-h"):
        print(overview())
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        if arguments and not arguments[0].startswith("-"):
            print(f"error: unknown command {arguments[0]!r}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
            return USAGE_ERROR
        arguments.insert(0, "serve")
    return run_command(arguments[0], arguments[1:])


def run_command(name: str, arguments: list[str]) -> int:
    """Parse and run one command; our own errors become one message, a traceback only with --debug."""
    debug = "--debug" in arguments
    if debug:
        os.environ["HYDRASERVE_DEBUG"] = "1"
    try:
        command = importlib.import_module(f"hydraserve.cli.{name}")
        parser = argparse.ArgumentParser(
            prog=f"hydraserve {name}",
            description=command.HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument("--debug", action="store_true", help="show tracebacks")
        command.add_arguments(parser)
        args: argparse.Namespace
        if getattr(command, "PASSES_THROUGH", False):
            args, passthrough = parser.parse_known_args(arguments)
            args.passthrough = passthrough
        else:
            args = parser.parse_args(arguments)
        return int(command.run(args))
    except HydraServeError as e:
        if debug:
            raise
        print(f"error: {e}", file=sys.stderr)
        return USAGE_ERROR if isinstance(e, ConfigError) else FAILURE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone (`| head`): nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def overview() -> str:
    """The text of `hydraserve --help`."""
    lines = [f"  {name:<9} {importlib.import_module(f'hydraserve.cli.{name}').HELP}" for name in COMMANDS]
    return "\n".join(
        [
            "usage: hydraserve --model MODEL [--adapter [NAME=]PATH ...] [options]",
            "       hydraserve COMMAND [options]",
            "",
            "Serve many router-mixed LoRA adapters (HydraLoRA) over one base model, on vLLM.",
            "",
            "commands (serve when none is given):",
            *lines,
            "",
            "`hydraserve COMMAND --help` says more; `hydraserve --version` prints the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
