"""Checks that a folder is an output of af3pipe before a command reads or changes it."""

from af3pipe import storage
from af3pipe.cli.console import EXIT_WRONG_JOB, stop
from af3pipe.tables.layout import TABLE_SCHEMAS


def require_output(output: str) -> None:
    """Ends the program with `EXIT_WRONG_JOB` where a folder has no tables and no runs; nothing is created there.

    Raises:
        Rejected, StorageError: The folder cannot be listed.
    """
    if any(uri.endswith(".json") for uri in storage.list_files(storage.join(output, "_runs"))):
        return
    for table in TABLE_SCHEMAS:
        if any(uri.endswith(".parquet") for uri in storage.list_files(storage.join(output, table))):
            return
    stop(f"{output} has no tables and no runs of af3pipe; give the folder that --output named", EXIT_WRONG_JOB)
