"""``torch.nn`` modules: the memory layer, token mixers and the decoder block."""

from fwpkm.layers.block import BlockResult, DecoderBlock
from fwpkm.layers.fwpkm import FwPKM, LayerResult, LayerState

__all__ = ["BlockResult", "DecoderBlock", "FwPKM", "LayerResult", "LayerState"]
