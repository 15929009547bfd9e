"""Reads inputs (files, manifests, containers, watched folders, messages) into recordings."""
