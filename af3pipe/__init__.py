"""Runs Audio Flamingo 3 and Music Flamingo over audio archives, with Apache Beam transforms and a command line."""

__version__ = "0.1.0"
