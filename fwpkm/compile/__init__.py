"""Whole models as one graph: compiling, looking at graphs, and taking them out of Python."""

from fwpkm.compile.audit import Audit, audit
from fwpkm.compile.environment import Environment, environment
from fwpkm.compile.export import export
from fwpkm.compile.inference import InferenceStep, load
from fwpkm.compile.model import compile_model, compile_step

__all__ = [
    "Audit",
    "Environment",
    "InferenceStep",
    "audit",
    "compile_model",
    "compile_step",
    "environment",
    "export",
    "load",
]
