"""Reads and writes an output folder without Beam: layout, rows, latest view, reconciliation, audit, compaction."""
