"""``torch.nn`` modules: the memory layers, token mixers and the decoder block."""

import torch
from einops import rearrange

from fwpkm.layers.block import BlockResult, DecoderBlock
from fwpkm.layers.delta_net import GatedDeltaNet
from fwpkm.layers.fwpkm import FwPKM, LayerResult, LayerState
from fwpkm.layers.pkm import ProductKeyMemory

# einops notes what a tensor is when it first sees one, which a graph with checkpointed activations may not contain.
rearrange(torch.empty(1), "a -> a")

__all__ = ["BlockResult", "DecoderBlock", "FwPKM", "GatedDeltaNet", "LayerResult", "LayerState", "ProductKeyMemory"]
