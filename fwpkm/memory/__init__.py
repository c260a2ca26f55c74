"""What a memory is: its configuration, a starting point, the write log, and the state of memories at work."""

from fwpkm.memory.config import KEY_UPDATES, LOG_DTYPES, NONLINEARITIES, SCOPES, WRITE_SCALES, MemoryConfig
from fwpkm.memory.fast_weights import FastWeights
from fwpkm.memory.state import COUNTS, MemoryState
from fwpkm.memory.write_log import WriteLog

__all__ = [
    "COUNTS",
    "KEY_UPDATES",
    "LOG_DTYPES",
    "NONLINEARITIES",
    "SCOPES",
    "WRITE_SCALES",
    "FastWeights",
    "MemoryConfig",
    "MemoryState",
    "WriteLog",
]
