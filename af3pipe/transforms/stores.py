"""What a worker has to know of stores, and what it tells of them."""

from af3pipe import storage
from af3pipe.transforms import metrics


def set_storage(options: storage.StorageOptions) -> None:
    """Sets a job's storage options in the worker's process, where it has any."""
    if options:
        storage.set_options(options)


def count_retries() -> None:
    """Counts as `storage_retries` how often this process has tried a store again since it was last asked."""
    metrics.count("storage_retries", storage.take_retries())
