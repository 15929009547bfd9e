"""Reads and writes an output folder: layout, rows, latest view, reconcile, audit, compact. Without Beam."""
