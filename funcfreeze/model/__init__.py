"""A model as a pure call over its parameters and buffers, and pytrees by paths."""
