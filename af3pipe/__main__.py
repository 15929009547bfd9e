"""The `af3pipe` program, also as `python -m af3pipe`: sets up logging, then hands over to the command line."""

import logging

# What they warn of is how Beam and the stores' clients go about it; what goes wrong for good is told by an error.
_TELL_HOW_THEY_WORK = ("apache_beam.utils.subprocess_server", "apache_beam.transforms.core", "PrismRunner", "gcsfs")


def main() -> None:
    """Runs the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("af3pipe").setLevel(logging.INFO)
    logging.getLogger().addFilter(_is_for_the_user)
    for name in _TELL_HOW_THEY_WORK:
        logging.getLogger(name).setLevel(logging.ERROR)
    from af3pipe.cli import app  # only now: Beam logs while it is imported
    from af3pipe.cli.ends import BY_SIGNAL, leave

    try:
        app()
    except SystemExit as ended:
        if ended.code in BY_SIGNAL:
            leave(ended.code)
        raise


def _is_for_the_user(record: logging.LogRecord) -> bool:
    """Beam warns at import that BigQuery's client is missing; nothing here uses BigQuery."""
    return "apitools not found" not in record.getMessage()


if __name__ == "__main__":
    main()
