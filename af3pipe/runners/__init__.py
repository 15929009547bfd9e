"""Checks, names and ends jobs on each Beam runner, and declares the options that Beam leaves out."""
