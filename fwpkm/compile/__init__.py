"""Whole models as one graph: compiling, looking at graphs, and taking them out of Python."""

from fwpkm.compile.model import compile_model

__all__ = ["compile_model"]
