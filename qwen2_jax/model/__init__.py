"""Declarations: parameter names, shapes, logical axes, initializers; scan and remat. The only room that knows flax."""
