"""``torch.nn`` modules: the memory layers, token mixers and the decoder block."""

from fwpkm.layers.block import BlockResult, DecoderBlock
from fwpkm.layers.delta_net import GatedDeltaNet
from fwpkm.layers.fwpkm import FwPKM, LayerResult, LayerState
from fwpkm.layers.pkm import ProductKeyMemory

__all__ = ["BlockResult", "DecoderBlock", "FwPKM", "GatedDeltaNet", "LayerResult", "LayerState", "ProductKeyMemory"]
