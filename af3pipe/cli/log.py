"""Sets up the program's log: one line for each message, tracebacks only with `--verbose`."""

import logging

_TRACEBACK = "Traceback (most recent call last):"
# These warn of how Beam and the stores' clients go about their work; a failure is reported by an error.
_ERRORS_ONLY = ("apache_beam.utils.subprocess_server", "apache_beam.transforms.core", "PrismRunner", "gcsfs")


class _OneLine(logging.Formatter):
    """Omits the tracebacks of messages, which Beam logs for every failure of a worker."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        head, found, rest = text.partition(_TRACEBACK)
        if not found or logging.getLogger("af3pipe").isEnabledFor(logging.DEBUG):
            return text
        head = head.rstrip()
        cause = next((line for line in reversed(rest.splitlines()) if line and not line.startswith(" ")), "")
        said = cause.partition(": ")[2] or cause
        return head if said in head else f"{head} {cause}"


def set_up_logging() -> None:
    """Logs warnings of all modules, and what af3pipe itself does, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(
        lambda record: "apitools not found" not in record.getMessage()
    )  # of BigQuery's client: not used
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("af3pipe").setLevel(logging.INFO)
    for name in _ERRORS_ONLY:
        logging.getLogger(name).setLevel(logging.ERROR)


def be_verbose() -> None:
    """Logs tracebacks, and what af3pipe does in detail."""
    logging.getLogger("af3pipe").setLevel(logging.DEBUG)
