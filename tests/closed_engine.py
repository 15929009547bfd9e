"""An engine that fails when it is opened: where nothing is left to ask, nobody may try."""


class ClosedEngine:
    """Stands where nothing may be asked."""

    def __init__(self, options):
        raise AssertionError("the engine was opened, but there was nothing to ask")
