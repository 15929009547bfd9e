"""Runs whole jobs: configuration, batch and streaming pipelines, and run reports."""
