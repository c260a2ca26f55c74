"""Linear attention: transformers' gated delta net, which continues, skips masked tokens and keeps packed rows apart."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from fwpkm.layers.convolution import ContinuedConv1d
from fwpkm.memory.appendable import normal
from fwpkm.ops import gated_delta_rule

# The logarithm of the decay where a sequence begins: exp(-128) is 0 in float32.
FORGET = -128.0


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
            cache_params: transformers' cache, whose states of this layer are continued and replaced, or None.
            attention_mask: ``[B, T]`` bool; a sequence is its unmasked tokens. None if all are.
            starts: ``[B, T]`` bool, true at (unmasked) tokens that begin a sequence within a row, or None.

        Returns:
            ``[B, T, D]``; what it holds at masked tokens means nothing.
        """
        query, key, value, z, b, a = self.fix_query_key_value_ordering(
            self.in_proj_qkvz(hidden_states), self.in_proj_ba(hidden_states)
        )
        past, state = self._past(cache_params)
        x = torch.cat([part.flatten(2) for part in (query, key, value)], dim=-1)
        x, past = self.conv1d(x, past, attention_mask, starts)
        parts = ACT2FN[self.activation](x).split((self.key_dim, self.key_dim, self.value_dim), dim=-1)
        query, key = (part.unflatten(-1, (self.num_k_heads, -1)) for part in parts[:2])
        value = parts[2].unflatten(-1, (self.num_v_heads, -1))

        beta = b.sigmoid()
        # -exp(A_log) softplus(a + dt_bias); the backward of torch's softplus breaks captured graphs by its strides.
        decay = self.A_log.float().exp() * logsigmoid(-a.float() - self.dt_bias)
        if attention_mask is not None:  # neither written nor forgotten
            masked = ~attention_mask.unsqueeze(-1)
            beta, decay = beta.masked_fill(masked, 0), decay.masked_fill(masked, 0)
        if starts is not None:
            decay = decay.masked_fill(starts.unsqueeze(-1), FORGET)
        out, state = gated_delta_rule(query, key, value, decay, beta, state)
        if cache_params is not None:
            # transformers keeps `width` inputs, one more than needed.
            cache_params.update_conv_state(pad(past.mT, (1, 0)), self.layer_idx)
            cache_params.update_recurrent_state(state, self.layer_idx)
        out = self.norm(out.flatten(0, 2), z.flatten(0, 2)).view(z.shape)
        return self.out_proj(out.flatten(2))

    def _past(self, cache: Any) -> tuple[Tensor | None, Tensor | None]:
        """Where the last call stopped: the convolution's last inputs, and the state of the delta rule."""
        if cache is None or not cache.has_previous_state(self.layer_idx):
            return None, None
        layer = cache.layers[self.layer_idx]
        if not torch.compiler.is_compiling():
            for states in (layer.conv_states, layer.recurrent_states):
                states[0] = normal(states[0])
        state = layer.recurrent_states[0]
        # The cache will be overwritten in place, which a backward through this call must not see.
        return layer.conv_states[0][..., 1:].mT, state.clone() if torch.is_grad_enabled() else state
