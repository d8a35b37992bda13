"""Memory and speed of a run, estimated before it starts."""
