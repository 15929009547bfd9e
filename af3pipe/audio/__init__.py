"""Bytes to PCM. Takes file objects, never URIs."""
