"""Sets a job's storage options in worker processes, and counts their storage retries."""

from af3pipe import storage
from af3pipe.transforms import metrics


def set_storage(options: storage.StorageOptions) -> None:
    """Sets a job's storage options in the current process, if the job has any."""
    if options:
        storage.set_options(options)


def count_retries() -> None:
    """Adds the storage retries of this process since the last call to the counter `storage_retries`."""
    metrics.count("storage_retries", storage.take_retries())
