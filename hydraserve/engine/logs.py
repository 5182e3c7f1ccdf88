"""vLLM's log, for people: an error is one line unless --debug asks for tracebacks."""

from __future__ import annotations

import logging

from hydraserve.config import debug


class OneLineErrors(logging.Filter):
    """Replaces a record's traceback by the exception's last word."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            record.msg = f"{record.getMessage()} {type(error).__name__}: {first_line(error)}"
            record.args, record.exc_info, record.exc_text = (), None, None
        return True


def shorten_errors() -> None:
    """Put the filter on vLLM's log handlers of this process, once; nothing under --debug."""
    if debug():
        return
    for handler in logging.getLogger("vllm").handlers:
        if not any(isinstance(f, OneLineErrors) for f in handler.filters):
            handler.addFilter(OneLineErrors())


def first_line(error: BaseException) -> str:
    """What an exception says, without the pages that pydantic and torch add."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if type(error).__name__ == "ValidationError" and len(lines) > 1:  # pydantic: a count, then the reasons
        lines = [line for line in lines[1:] if not line.startswith("For further information")]
    return lines[0].partition(" [type=")[0] if lines else type(error).__name__
