"""Runs a pipeline on Beam's in-process runner and returns its elements as a list."""

import uuid
from collections import defaultdict

import apache_beam as beam

_FOUND = defaultdict(list)


def _keep(item, name, timestamp=beam.DoFn.TimestampParam):
    _FOUND[name].append((timestamp, item))


class Collected:
    """Elements of any number of collections, once their pipeline has run; in no order."""

    def __init__(self):
        self._own = uuid.uuid4().hex

    def into(self, name):
        """A transform that keeps what it is given under this name."""
        return f"Collect_{name}" >> beam.Map(_keep, (self._own, name))

    def __getitem__(self, name):
        return [item for _, item in self.timed(name)]

    def timed(self, name):
        """(timestamp, element) of each."""
        return list(_FOUND[self._own, name])
