"""Reads written tables as the package does: without Arrow's threads (af3pipe/storage/parquet.py)."""

import pyarrow as pa

from af3pipe import storage
from af3pipe.storage.parquet import ParquetFile


def read_table(place, columns=None):
    """All rows of a Parquet file, or of those at any depth of a folder: a path, or a URL."""
    uris = [uri for uri in storage.list_files(str(place)) if uri.endswith(".parquet")] or [str(place)]
    found = []
    for uri in uris:
        with storage.open_input(uri) as file:
            found.append(ParquetFile(file).read(columns))
    return pa.concat_tables(found, promote_options="default")
