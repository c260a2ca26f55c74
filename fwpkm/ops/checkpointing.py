"""Which results of operators an activation checkpoint keeps."""

from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

# Scoring a token is work for all sub-keys, and leaves k numbers. A scan of values is little work, and leaves a table of
# up to T * K rows, which is larger than anything else in a block.
KEPT = ("product_key_topk", "product_key_address", "product_key_scan")


def keep_addresses() -> Any:
    """``context_fn`` of :func:`torch.utils.checkpoint.checkpoint` (``use_reentrant=False``), eager and compiled.

    What is in the checkpoint the backward computes once more, but for addresses: what
    :func:`fwpkm.ops.product_key_topk`, :func:`fwpkm.ops.product_key_address` and :func:`fwpkm.ops.product_key_scan`
    return.
    """
    return create_selective_checkpoint_contexts([getattr(torch.ops.fwpkm, name).default for name in KEPT])
