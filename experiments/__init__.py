"""One Python file a run; each opens with its command, hardware, expected time and expected number."""
