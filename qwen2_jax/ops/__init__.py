"""Pure per-device arithmetic. No flax, no parameters of its own."""
