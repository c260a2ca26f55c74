"""The operators of namespace ``fwpkm``: public functions that check their arguments and call one operator each;
and what concerns several of them.
"""

from fwpkm.ops._implementation import implementation
from fwpkm.ops._index import IndexedLog, Level
from fwpkm.ops._log import Log
from fwpkm.ops.checkpointing import keep_addresses
from fwpkm.ops.gated_delta_rule import gated_delta_rule
from fwpkm.ops.key_commit import key_commit
from fwpkm.ops.log_read import PagedLog, log_read
from fwpkm.ops.memory_read import memory_read
from fwpkm.ops.memory_scan import memory_scan
from fwpkm.ops.memory_write import memory_write_
from fwpkm.ops.product_key_address import product_key_address
from fwpkm.ops.product_key_scan import product_key_scan
from fwpkm.ops.product_key_topk import product_key_topk

__all__ = [
    "IndexedLog",
    "Level",
    "Log",
    "PagedLog",
    "gated_delta_rule",
    "implementation",
    "keep_addresses",
    "key_commit",
    "log_read",
    "memory_read",
    "memory_scan",
    "memory_write_",
    "product_key_address",
    "product_key_scan",
    "product_key_topk",
]
