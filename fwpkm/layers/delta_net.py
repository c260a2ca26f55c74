"""Linear attention: transformers' gated delta net, which continues, skips masked tokens and keeps packed rows apart."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import LinearAttentionLayer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from fwpkm.layers.convolution import ContinuedConv1d
from fwpkm.memory.appendable import normal
from fwpkm.memory.packing import following
from fwpkm.memory.trail import Trail, leaves_trail, parts
from fwpkm.ops import gated_delta_rule

# The logarithm of the decay where a sequence begins: exp(-128) is 0 in float32.
FORGET = -128.0


class DeltaState(NamedTuple):
    """Where a gated delta net stopped reading."""

    inputs: Tensor | None  # [B, width - 1, channels], the last ones of the convolution
    recurrent: Tensor | None  # [B, heads, Dk, Dv], the state of the delta rule

    def select(self, index: Tensor) -> DeltaState:
        """The rows ``index``."""
        return DeltaState(*(None if x is None else x[index.to(x.device)] for x in self))


class DeltaLayer(LinearAttentionLayer):
    """What transformers' cache holds of a gated delta net. States are replaced, never written to.

    Attributes:
        trail: what was read lately, for :meth:`crop`.
    """

    is_compileable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.trail: Trail | None = None

    @property
    def past(self) -> DeltaState:
        """Where the last call stopped."""
        return DeltaState(self.conv_states[0], self.recurrent_states[0])

    @past.setter
    def past(self, state: DeltaState) -> None:
        self.conv_states[0], self.recurrent_states[0] = state
        known = state.recurrent is not None
        for flags in (self.is_conv_states_initialized, self.is_recurrent_states_initialized, self.has_previous_state):
            flags[0] = known
        if state.recurrent is not None:
            self.dtype, self.device = state.recurrent.dtype, state.recurrent.device

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def reach(self) -> int:
        """How many tokens can be taken back."""
        return 0 if self.trail is None else self.trail.reach

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens, at most :attr:`reach`."""
        if tokens_to_remove and self.trail is not None:
            self.past, self.trail = self.trail.back(-tokens_to_remove)

    def reset(self) -> None:
        self.past, self.trail = DeltaState(None, None), None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        if self.past.recurrent is not None:
            self.batch_select_indices(torch.arange(self.past.recurrent.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self.past = self.past.select(indices)
        self.trail = self.trail and self.trail.map(lambda x: x.select(indices), lambda x: x[indices.to(x.device)])


class GatedDeltaNet(Qwen3NextGatedDeltaNet):
    """Gated delta net (Yang et al. 2024, "Gated Delta Networks") with the modules of transformers' Qwen3-Next.

    Its forward differs in what a sequence is: it may come in any number of calls of any length, skip masked tokens
    wherever they are, and share a row with others. The delta rule is :func:`fwpkm.ops.gated_delta_rule`, one operator
    for any length.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.conv1d = ContinuedConv1d(self.conv_dim, self.conv_kernel_size)

    def reset_parameters(self) -> None:
        """Draw the parameters of the decay as Qwen3-Next does; the others are drawn by their modules."""
        init.ones_(self.dt_bias)
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(0.01, 16).log_())

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """Read a piece of ``B`` rows.

        Args:
            hidden_states: ``[B, T, D]``.
            cache_params: transformers' cache, whose :class:`DeltaLayer` of this layer goes on from there, or None.
            attention_mask: ``[B, T]`` bool; a sequence is its unmasked tokens. None if all are.
            starts: ``[B, T]`` bool, true at (unmasked) tokens that begin a sequence within a row, or None.

        Returns:
            ``[B, T, D]``; what it holds at masked tokens means nothing.
        """
        query, key, value, z, b, a = self.fix_query_key_value_ordering(
            self.in_proj_qkvz(hidden_states), self.in_proj_ba(hidden_states)
        )
        layer = None if cache_params is None else cache_params.layers[self.layer_idx]
        past = DeltaState(None, None) if layer is None else layer.past
        if not torch.compiler.is_compiling():
            past = DeltaState(*(None if x is None else normal(x) for x in past))
        new = torch.cat([part.flatten(2) for part in (query, key, value)], dim=-1)
        x, inputs = self.conv1d(new, past.inputs, attention_mask, starts)
        qkv = ACT2FN[self.activation](x).split((self.key_dim, self.key_dim, self.value_dim), dim=-1)
        query, key = (part.unflatten(-1, (self.num_k_heads, -1)) for part in qkv[:2])
        value = qkv[2].unflatten(-1, (self.num_v_heads, -1))

        beta = b.sigmoid()
        # -exp(A_log) softplus(a + dt_bias); the backward of torch's softplus breaks captured graphs by its strides.
        decay = self.A_log.float().exp() * logsigmoid(-a.float() - self.dt_bias)
        if attention_mask is not None:  # neither written nor forgotten
            masked = ~attention_mask.unsqueeze(-1)
            beta, decay = beta.masked_fill(masked, 0), decay.masked_fill(masked, 0)
        if starts is not None:
            decay = decay.masked_fill(starts.unsqueeze(-1), FORGET)
        if layer is None or not leaves_trail(self.training):
            out, recurrent = gated_delta_rule(query, key, value, decay, beta, past.recurrent)
            if layer is not None:
                layer.past, layer.trail = DeltaState(inputs, recurrent), None
        else:
            if past.inputs is None:
                past = past._replace(inputs=torch.zeros_like(inputs))
            outs = []
            for part in parts((new, query, key, value, decay, beta, attention_mask, starts)):
                layer.trail = (layer.trail or Trail(_read_again)).extend(past, part)
                out, past = _read(past, part)
                outs.append(out)
            layer.past, out = past, torch.cat(outs, 1)
        out = self.norm(out.flatten(0, 2), z.flatten(0, 2)).view(z.shape)
        return self.out_proj(out.flatten(2))


def _read(past: DeltaState, given: tuple[Tensor | None, ...]) -> tuple[Tensor, DeltaState]:
    """What the delta rule gives, and the state after it: from its inputs, and those of the convolution."""
    new, query, key, value, decay, beta, mask, starts = given
    assert new is not None
    assert past.inputs is not None
    out, recurrent = gated_delta_rule(query, key, value, decay, beta, past.recurrent)  # type: ignore[arg-type]
    return out, DeltaState(following(past.inputs, new, mask, starts), recurrent)


def _read_again(past: DeltaState, given: tuple[Tensor | None, ...]) -> DeltaState:
    """The state after reading what another one has read."""
    known = DeltaState(*(None if x is None else normal(x) for x in past))
    return _read(known, given)[1]
