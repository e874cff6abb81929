"""Text of unknown origin made safe to print: terminals obey escape sequences, and a newline forges a line of a log."""

import logging


def printable(text: str) -> str:
    r"""Return `text` on one line without control or invisible characters: each is written as its escape, as \x1b."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class EscapingFormatter(logging.Formatter):
    """Formats a log record so that only the logger breaks lines: messages and tracebacks go through `printable`."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the record's own line."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: object) -> str:
        """Return the traceback, every line indented, so that no line of an error passes for a line of the log."""
        lines = super().formatException(ei).splitlines()  # type: ignore[arg-type]
        return "\n".join(f"    {printable(line)}" for line in lines)
