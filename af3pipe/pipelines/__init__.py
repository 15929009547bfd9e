"""Whole jobs: the configuration, the batch pipeline, and the books of a run."""
