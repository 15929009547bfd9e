"""Runs the command line: `af3pipe`, also as `python -m af3pipe`."""

from af3pipe.cli import app
from af3pipe.cli.ends import BY_SIGNAL, leave
from af3pipe.cli.log import set_up_logging


def main() -> None:
    """Runs the command line, and ends the process with its exit code."""
    set_up_logging()  # before a command imports Beam, which logs at import
    try:
        app()
    except SystemExit as ended:
        if ended.code in BY_SIGNAL:
            leave(ended.code)
        raise


if __name__ == "__main__":
    main()
