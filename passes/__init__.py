"""Graph in, graph out: capture, normalize, synthesize the inverse, partition."""

from fxinvert.passes.trace import trace

__all__ = ["trace"]
