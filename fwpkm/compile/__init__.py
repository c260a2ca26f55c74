"""Whole models as one graph: compiling, looking at graphs, and taking them out of Python."""

from fwpkm.compile.audit import Audit, audit
from fwpkm.compile.environment import Environment, environment
from fwpkm.compile.export import export
from fwpkm.compile.exported import Exported, load
from fwpkm.compile.model import compile_model

__all__ = ["Audit", "Environment", "Exported", "audit", "compile_model", "environment", "export", "load"]
