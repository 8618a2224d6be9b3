"""What diffusers' flux blocks compute, in fewer passes over memory: the same modules and weights, nothing approximated.

Rotary embeddings are complex products (one pass instead of five, the same bits), their tables are made once per shape of
a video, and attention is called without the checks around it. On a CPU without gradients a block's elementwise work is
joined to what is next to it; last bits differ there. docs/log.md has what each of it brought.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn
from torch.nn import functional as F

Rotary = tuple[Tensor, ...]
"""cos, sin (N, d) as diffusers has them, and behind them exp(i angle) (1, N, 1, d/2) complex, where ``_Places`` made it."""


def quicken(network: nn.Module) -> None:
    """Let a ``FluxTransformer2DModel`` compute so. Its weights, their names and its configuration stay as they are."""
    for module in network.modules():
        kind = _QUICK.get(type(module))
        if kind is not None:
            module.__class__ = kind
        if isinstance(module, (FluxSingleTransformerBlock, FluxTransformerBlock)):
            attention: Any = module.attn
            if type(attention.processor) is FluxAttnProcessor:
                attention.processor = Attention()  # type: ignore[no-untyped-call]


def turn(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of x (B, N, H, d): neighbours (2 i, 2 i + 1) turned by the angle of place and i, in float32."""
    if len(rotary) < 3 or torch.compiler.is_compiling():  # inductor has no complex numbers to fuse
        from diffusers.models.embeddings import apply_rotary_emb

        both: Any = rotary[:2]
        turned: Any = apply_rotary_emb(x, both, sequence_dim=1)
        return cast(Tensor, turned)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotary[2]).flatten(3).to(x.dtype)


class Attention(FluxAttnProcessor):
    """diffusers' processor with rotary embeddings by ``turn``."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Any:
        """As diffusers' processor: (B, N, D), and behind it the text's (B, L, D) where there is text."""
        if attn.fused_projections or self._attention_backend is not None or self._parallel_config is not None:
            theirs: Any = super().__call__
            plain = None if image_rotary_emb is None else image_rotary_emb[:2]
            return theirs(attn, hidden_states, encoder_hidden_states, attention_mask, plain)
        split = (-1, attn.head_dim)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, split))
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(-1, split))
        value = attn.to_v(hidden_states).unflatten(-1, split)
        text = encoder_hidden_states is not None
        if text:
            own = attn.norm_added_q(attn.add_q_proj(encoder_hidden_states).unflatten(-1, split))
            query = torch.cat([own, query], dim=1)
            own = attn.norm_added_k(attn.add_k_proj(encoder_hidden_states).unflatten(-1, split))
            key = torch.cat([own, key], dim=1)
            value = torch.cat([attn.add_v_proj(encoder_hidden_states).unflatten(-1, split), value], dim=1)
        if image_rotary_emb is not None:
            query, key = turn(query, image_rotary_emb), turn(key, image_rotary_emb)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask).transpose(1, 2).flatten(2)
        mixed = mixed.to(query.dtype)
        if not text:
            return mixed
        assert encoder_hidden_states is not None
        of_text, of_video = mixed.tensor_split([encoder_hidden_states.shape[1]], dim=1)
        of_video = attn.to_out[1](attn.to_out[0](of_video.contiguous()))
        return of_video, attn.to_add_out(of_text.contiguous())


class _Places(FluxPosEmbed):
    """diffusers' tables, kept while the same places are asked for."""

    def forward(self, ids: Tensor) -> Rotary:  # type: ignore[override]
        # Comparing would make the host wait for a device, and fake tensors (planning) have nothing to compare; tensors of
        # inference mode cannot be trained with later.
        if ids.device.type != "cpu" or type(ids) is not Tensor or torch.is_inference_mode_enabled():
            return self._tables(ids)
        known: tuple[Tensor, Rotary] | None = self.__dict__.get("known")
        if known is None or known[0].shape != ids.shape or not torch.equal(known[0], ids):
            known = (ids, self._tables(ids))
            self.__dict__["known"] = known
        return known[1]

    def _tables(self, ids: Tensor) -> Rotary:
        cos, sin = super().forward(ids)
        return cos, sin, torch.complex(cos[:, ::2], sin[:, ::2])[None, :, None]


_onednn: Any = torch.backends.mkldnn.is_available


def _plain(layer: nn.Module) -> bool:
    """Whether ``_linear_gelu`` may stand for a layer and the gelu behind it: a linear one without adapters, on a CPU with
    oneDNN, in float32, where no gradient is wanted."""
    if torch.is_grad_enabled() or type(layer) is not nn.Linear or torch.is_autocast_enabled("cpu"):
        return False
    on_cpu = layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
    return on_cpu and bool(_onednn()) and not torch.compiler.is_compiling()


def _linear_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """gelu(x W + b) by tanh, in oneDNN's one kernel."""
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], "tanh")
    return made


class _SingleBlock(FluxSingleTransformerBlock):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.training or not _plain(self.proj_mlp):
            theirs: Any = super().forward
            done = theirs(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
            return cast(tuple[Tensor, Tensor], done)
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        shift, scale, gate = self.norm.linear(self.norm.silu(temb))[:, None].chunk(3, dim=2)
        entered = torch.addcmul(shift, self.norm.norm(x), 1 + scale)
        attention: Any = self.attn
        mixed = attention.processor(
            attention, entered, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
        )
        left = self.proj_out(torch.cat([mixed, _linear_gelu(entered, self.proj_mlp)], dim=2))
        x = torch.addcmul(x, gate, left)
        L = encoder_hidden_states.shape[1]
        return x[:, :L], x[:, L:]


class _DoubleBlock(FluxTransformerBlock):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        attention, of_video, of_text = cast(Any, self.attn), cast(Any, self.ff).net, cast(Any, self.ff_context).net
        if self.training or not (
            isinstance(attention.processor, Attention) and _plain(of_video[0].proj) and _plain(of_text[0].proj)
        ):
            theirs: Any = super().forward
            done = theirs(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
            return cast(tuple[Tensor, Tensor], done)
        x, c = hidden_states, encoder_hidden_states
        m = self.norm1.linear(self.norm1.silu(temb))[:, None].chunk(
            6, dim=2
        )  # shift, scale, gate; the same behind attention
        n = self.norm1_context.linear(self.norm1_context.silu(temb))[:, None].chunk(6, dim=2)
        mixed_x, mixed_c = attention.processor(
            attention,
            torch.addcmul(m[0], self.norm1.norm(x), 1 + m[1]),
            torch.addcmul(n[0], self.norm1_context.norm(c), 1 + n[1]),
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        x, c = torch.addcmul(x, m[2], mixed_x), torch.addcmul(c, n[2], mixed_c)
        wide = _linear_gelu(torch.addcmul(m[3], self.norm2(x), 1 + m[4]), of_video[0].proj)
        x = torch.addcmul(x, m[5], of_video[2](wide))
        wide = _linear_gelu(torch.addcmul(n[3], self.norm2_context(c), 1 + n[4]), of_text[0].proj)
        return torch.addcmul(c, n[5], of_text[2](wide)), x


_QUICK: dict[type, type] = {
    FluxPosEmbed: _Places,
    FluxSingleTransformerBlock: _SingleBlock,
    FluxTransformerBlock: _DoubleBlock,
}
