"""Turns inputs (files, manifests, containers, folders being watched, messages) into recordings."""
