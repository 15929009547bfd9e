"""Decodes audio from file objects (never URIs) into PCM segments for the model."""
