"""Provides an engine that fails to open, for runs that must not open one. Registered in `ENGINES` by the test."""


class ClosedEngine:
    """Stands where nothing may be asked."""

    def __init__(self, options):
        raise AssertionError("the engine was opened, but there was nothing to ask")
