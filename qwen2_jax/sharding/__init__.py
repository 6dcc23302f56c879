"""Meshes, the table of logical axes, and the collectives."""
