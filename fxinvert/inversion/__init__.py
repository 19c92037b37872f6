"""Inversion: run a model forward and its inverse graph backwards, and look at what comes out."""

from fxinvert.inversion.inverse_graph import InverseGraph
from fxinvert.inversion.invert import invert
from fxinvert.inversion.reconstruction import ByName, Reconstruction
from fxinvert.inversion.replay import forward_values, output_given

__all__ = ["ByName", "InverseGraph", "Reconstruction", "forward_values", "invert", "output_given"]
