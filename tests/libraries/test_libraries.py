"""Training models of other libraries and styles, against references that know nothing of spanopt.

A reference is a copy of the model whose Q and K get oracle hooks by a way of its own: a hook on
x-transformers' attention core, an attention function registered with transformers, or a subclass
of the layer that computes its attention by plain mathematics.
"""

import copy
import math
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import peft
import pytest
import torch
import transformers as hf
from compare import existing_gradients as gradients
from compare import largest_error
from einops import rearrange
from einops.layers.torch import Rearrange
from families import COMMON, GROUPED, NO_DROPOUT, SCALES, SEQ2SEQ, hooked, pad, ragged, wrap
from models import mha_reference, oracle_hook
from peft.tuners.lora import Linear as LoraLinear
from torch import einsum, nn
from torch.nn import functional as F
from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention
from transformers.models.led.modeling_led import LEDEncoderSelfAttention
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionSdpaAttention
from transformers.models.vitdet.modeling_vitdet import VitDetAttention
from x_transformers import Decoder, Encoder, TransformerWrapper
from x_transformers.attend import Attend

from spanopt import SpanScale, UnscaledLayerError, attach, find_attention

VOCABULARY, BATCH, LENGTH, WIDTH, HEADS, DIM = 40, 3, 12, 32, 4, 8


# Blocks as they are written in the wild, each with a subclass that is its reference.


def attend(q, k, v, *, scale=None, real=None, causal=False, dropout=0.0):
    """Attention by plain mathematics, (B, H, N, d), with oracle hooks on Q and K."""
    q, k = hooked(q, k)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return F.dropout(scores.softmax(-1), dropout) @ v


def split(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def merge(x):
    return x.transpose(1, 2).flatten(-2)


class NanoAttention(nn.Module):
    """nanoGPT's, with both of its branches."""

    def __init__(self, flash, dropout=0.1):
        super().__init__()
        self.flash, self.dropout = flash, dropout
        self.n_head, self.n_embd = HEADS, WIDTH
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(dropout)
        mask = torch.tril(torch.ones(2 * LENGTH, 2 * LENGTH))
        self.register_buffer("bias", mask.view(1, 1, 2 * LENGTH, 2 * LENGTH))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            p = self.dropout if self.training else 0
            y = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=None, dropout_p=p, is_causal=True
            )
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            att = F.softmax(att, dim=-1)
            att = self.attn_dropout(att)
            y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class NanoReference(NanoAttention):
    def forward(self, x):
        q, k, v = map(split, self.c_attn(x).chunk(3, -1))
        y = attend(q, k, v, causal=True, dropout=self.dropout)
        return self.resid_dropout(self.c_proj(merge(y)))


class CrossAttention(nn.Module):
    """lucidrains', as in his Perceiver: for context or for itself, heads apart or merged."""

    def __init__(self, merged=False):
        super().__init__()
        self.merged = merged
        self.scale = DIM**-0.5
        self.heads = HEADS
        self.norm = nn.LayerNorm(WIDTH)
        self.attend = nn.Softmax(dim=-1)
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_kv = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, context=None, mask=None):
        x = self.norm(x)
        context = x if context is None else context
        q, (k, v) = self.to_q(x), self.to_kv(context).chunk(2, dim=-1)
        if self.merged:
            return self.with_merged_heads(q, k, v, mask)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k, v))
        sim = einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        if mask is not None:
            mask = rearrange(mask, "b j -> b 1 1 j")
            sim = sim.masked_fill(~mask, -torch.finfo(sim.dtype).max)
        out = einsum("b h i j, b h j d -> b h i d", self.attend(sim), v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))

    def with_merged_heads(self, q, k, v, mask):
        q, k, v = (rearrange(t, "b n (h d) -> (b h) n d", h=self.heads) for t in (q, k, v))
        sim = einsum("b i d, b j d -> b i j", q, k) * self.scale
        if mask is not None:
            mask = mask[:, None, None].expand(-1, self.heads, -1, -1).flatten(0, 1)
            sim.masked_fill_(~mask, -torch.finfo(sim.dtype).max)
        out = einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
        return self.to_out(rearrange(out, "(b h) n d -> b n (h d)", h=self.heads))


class CrossReference(CrossAttention):
    def forward(self, x, context=None, mask=None):
        x = self.norm(x)
        k, v = self.to_kv(x if context is None else context).chunk(2, -1)
        return self.to_out(merge(attend(*map(split, (self.to_q(x), k, v)))))


class ViTAttention(nn.Module):
    """vit-pytorch's."""

    def __init__(self, dropout=0.1):
        super().__init__()
        self.heads, self.scale = HEADS, DIM**-0.5
        self.norm = nn.LayerNorm(WIDTH)
        self.attend = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout))

    def forward(self, x):
        x = self.norm(x)
        qkv = self.to_qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in qkv)
        dots = torch.matmul(q, k.transpose(-1, -2)) * self.scale
        attn = self.attend(dots)
        attn = self.dropout(attn)
        out = torch.matmul(attn, v)
        out = rearrange(out, "b h n d -> b n (h d)")
        return self.to_out(out)


class ViTReference(ViTAttention):
    def forward(self, x):
        q, k, v = map(split, self.to_qkv(self.norm(x)).chunk(3, -1))
        return self.to_out(merge(attend(q, k, v, dropout=self.dropout.p)))


def attention(query, key, value, mask=None, dropout=None):
    """The function of the Annotated Transformer."""
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -1e9)
    p_attn = scores.softmax(dim=-1)
    if dropout is not None:
        p_attn = dropout(p_attn)
    return torch.matmul(p_attn, value), p_attn


class AnnotatedAttention(nn.Module):
    """The Annotated Transformer's, its projections without names."""

    def __init__(self, dropout=0.1):
        super().__init__()
        self.h, self.d_k = HEADS, DIM
        linear = nn.Linear(WIDTH, WIDTH)
        self.linears = nn.ModuleList(copy.deepcopy(linear) for _ in range(4))
        self.attn = None
        self.dropout = nn.Dropout(p=dropout)

    def forward(self, query, key, value, mask=None):
        if mask is not None:
            mask = mask.unsqueeze(1)
        batch = query.size(0)
        query, key, value = [
            linear(x).view(batch, -1, self.h, self.d_k).transpose(1, 2)
            for linear, x in zip(self.linears, (query, key, value), strict=False)
        ]
        x, self.attn = attention(query, key, value, mask=mask, dropout=self.dropout)
        x = x.transpose(1, 2).contiguous().view(batch, -1, self.h * self.d_k)
        return self.linears[-1](x)


class AnnotatedReference(AnnotatedAttention):
    def forward(self, query, key, value, mask=None):
        q, k, v, out = self.linears
        q, k, v = map(split, (q(query), k(key), v(value)))
        return out(merge(attend(q, k, v, causal=mask is not None, dropout=self.dropout.p)))


class ScaledDotProductAttention(nn.Module):
    """The core of jadore801120's."""

    def __init__(self, temperature, dropout):
        super().__init__()
        self.temperature = temperature
        self.dropout = nn.Dropout(dropout)

    def forward(self, q, k, v, mask=None):
        attn = torch.matmul(q / self.temperature, k.transpose(2, 3))
        if mask is not None:
            attn = attn.masked_fill(mask == 0, -1e9)
        attn = self.dropout(F.softmax(attn, dim=-1))
        return torch.matmul(attn, v), attn


class TemperedAttention(nn.Module):
    """jadore801120's: the projections, around a core of its own."""

    def __init__(self, dropout=0.1):
        super().__init__()
        self.w_qs, self.w_ks, self.w_vs, self.fc = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.attention = ScaledDotProductAttention(temperature=DIM**0.5, dropout=dropout)
        self.layer_norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, q, k, v, mask=None):
        residual = q
        q = self.w_qs(q).view(len(q), -1, HEADS, DIM).transpose(1, 2)
        k = self.w_ks(k).view(len(k), -1, HEADS, DIM).transpose(1, 2)
        v = self.w_vs(v).view(len(v), -1, HEADS, DIM).transpose(1, 2)
        if mask is not None:
            mask = mask.unsqueeze(1)
        q, attn = self.attention(q, k, v, mask=mask)
        q = self.fc(q.transpose(1, 2).contiguous().view(len(residual), -1, WIDTH))
        q += residual
        return self.layer_norm(q), attn


class TemperedReference(TemperedAttention):
    def forward(self, q, k, v, mask=None):
        residual, dropout = q, self.attention.dropout.p
        q, k, v = map(split, (self.w_qs(q), self.w_ks(k), self.w_vs(v)))
        y = merge(attend(q, k, v, causal=mask is not None, dropout=dropout))
        return self.layer_norm(self.fc(y) + residual), None


class CaiTAttention(nn.Module):
    """CaiT's, as vit-pytorch has it: scores and weights of all heads are mixed."""

    def __init__(self):
        super().__init__()
        self.heads, self.scale = HEADS, DIM**-0.5
        self.norm = nn.LayerNorm(WIDTH)
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_kv = nn.Linear(WIDTH, WIDTH * 2, bias=False)
        self.attend = nn.Softmax(dim=-1)
        self.mix_heads_pre_attn = nn.Parameter(torch.randn(HEADS, HEADS))
        self.mix_heads_post_attn = nn.Parameter(torch.randn(HEADS, HEADS))
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.norm(x)
        qkv = (self.to_q(x), *self.to_kv(x).chunk(2, dim=-1))
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in qkv)
        dots = einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        dots = einsum("b h i j, h g -> b g i j", dots, self.mix_heads_pre_attn)
        attn = self.attend(dots)
        attn = einsum("b h i j, h g -> b g i j", attn, self.mix_heads_post_attn)
        out = einsum("b h i j, b h j d -> b h i d", attn, v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class CaiTReference(CaiTAttention):
    def forward(self, x):
        x = self.norm(x)
        q, k, v = map(split, (self.to_q(x), *self.to_kv(x).chunk(2, -1)))
        q, k = hooked(q, k)
        scores = (self.mix_heads_pre_attn.T @ (q @ k.mT).flatten(2)).view(len(q), HEADS, -1)
        weights = (scores.unflatten(-1, (q.shape[2], -1)) * self.scale).softmax(-1)
        mixed = (self.mix_heads_post_attn.T @ weights.flatten(2)).view(weights.shape)
        return self.to_out(merge(mixed @ v))


class XCAttention(nn.Module):
    """XCiT's, as vit-pytorch has it: the channels of a head attend to each other."""

    def __init__(self):
        super().__init__()
        self.heads = HEADS
        self.norm = nn.LayerNorm(WIDTH)
        self.to_qkv = nn.Linear(WIDTH, WIDTH * 3, bias=False)
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.attend = nn.Softmax(dim=-1)
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        qkv = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h d n", h=self.heads) for t in qkv)
        q, k = (F.normalize(t, p=2, dim=-1) for t in (q, k))
        sim = einsum("b h i n, b h j n -> b h i j", q, k) * self.temperature.exp()
        attn = self.attend(sim)
        out = einsum("b h i j, b h j n -> b h i n", attn, v)
        return self.to_out(rearrange(out, "b h d n -> b n (h d)"))


class XCReference(XCAttention):
    def forward(self, x):
        q, k, v = (split(y).mT for y in self.to_qkv(self.norm(x)).chunk(3, -1))
        q, k = hooked(*(y / y.norm(dim=-1, keepdim=True) for y in (q, k)))
        weights = (q @ k.mT * self.temperature.exp()).softmax(-1)
        return self.to_out(merge((weights @ v).mT))


class NystroemReference(NystromformerSelfAttention):
    """Three softmaxes, each with oracle hooks on queries and keys of its own."""

    def forward(self, x, *args, **kwargs):
        q, k, v = (split(project(x)) for project in (self.query, self.key, self.value))
        q, k = (y / DIM**0.25 for y in (q, k))
        q_marks, k_marks = (y.unflatten(2, (self.num_landmarks, -1)).mean(3) for y in (q, k))

        def weights(a, b):
            a, b = hooked(a, b)
            return (a @ b.mT).softmax(-1)

        inverse = self.iterative_inv(weights(q_marks, k_marks))
        y = weights(q, k_marks) @ inverse @ (weights(q_marks, k) @ v)
        return (merge(y + self.conv(v)),)


class RowAttention(nn.Module):
    """The MSA Transformer's: rows of an alignment, (R, C, B, D), attend alike."""

    def __init__(self):
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (
            nn.Linear(WIDTH, WIDTH) for _ in range(4)
        )

    def forward(self, x, padding=None):
        rows, columns, batch, _ = x.size()
        q = self.q_proj(x).view(rows, columns, batch, HEADS, DIM)
        k = self.k_proj(x).view(rows, columns, batch, HEADS, DIM)
        v = self.v_proj(x).view(rows, columns, batch, HEADS, DIM)
        q *= DIM**-0.5 / math.sqrt(rows)
        if padding is not None:
            q *= 1 - padding.permute(1, 2, 0).unsqueeze(3).unsqueeze(4).to(q)
        weights = torch.einsum("rinhd,rjnhd->hnij", q, k)
        if padding is not None:
            closed = padding[:, 0].unsqueeze(0).unsqueeze(2)
            weights = weights.masked_fill(closed, -10000)
        probs = weights.softmax(-1)
        context = torch.einsum("hnij,rjnhd->rinhd", probs, v)
        return self.out_proj(context.contiguous().view(rows, columns, batch, WIDTH))


class RowReference(RowAttention):
    def forward(self, x, padding=None):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).unflatten(-1, (HEADS, DIM)) for project in projections)
        # Of each sequence and head all rows side by side: (B, H, C, R * d).
        q, k = (y.permute(2, 3, 1, 0, 4).flatten(-2) for y in (q, k))
        q, k = hooked(q, k)
        weights = (q @ k.mT * DIM**-0.5 / math.sqrt(len(x))).softmax(-1)
        y = weights.unsqueeze(2) @ v.permute(2, 3, 0, 1, 4)
        return self.out_proj(y.permute(2, 3, 0, 1, 4).flatten(-2))


class Alignments(nn.Module):
    """Text of two rows, (B, 2 C), to logits (B, 2 C, V)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(RowAttention() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, text, padding=None):
        x = rearrange(self.embed(text), "b (r c) d -> r c b d", r=2)
        for layer in self.layers:
            x = x + layer(x, padding)
        return self.head(rearrange(x, "r c b d -> b (r c) d"))


def positions_by_row_and_column(self, q, height, width):
    """The bias of SAM and ViTDet, (B, H, N, N), of queries (B, H, N, d)."""
    q = q.unflatten(2, (height, width))
    rows, columns = (
        table[torch.arange(size)[:, None] - torch.arange(size) + size - 1]
        for table, size in ((self.rel_pos_h, height), (self.rel_pos_w, width))
    )
    of_rows = torch.einsum("bhyxc,ykc->bhyxk", q, rows).unsqueeze(-1)
    of_columns = torch.einsum("bhyxc,xkc->bhyxk", q, columns).unsqueeze(-2)
    return (of_rows + of_columns).flatten(-2).flatten(2, 3)


def image_attention(self, x, softmax=None):
    """SAM's and ViTDet's attention by plain mathematics."""
    height, width = x.shape[1:3]
    q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    bias = positions_by_row_and_column(self, q, height, width)
    q, k = hooked(q, k)
    weights = (q @ k.mT * self.scale + bias).softmax(-1, dtype=softmax).to(x.dtype)
    return self.proj(merge(weights @ v).unflatten(1, (height, width)))


class ViTDetReference(VitDetAttention):
    def forward(self, x, output_attentions=False):
        return (image_attention(self, x),)


class SamReference(SamVisionAttention):
    def forward(self, hidden_states, output_attentions=None):
        return image_attention(self, hidden_states, torch.float32), None


class SamSdpaReference(SamVisionAttention):
    def forward(self, hidden_states, output_attentions=None):
        return image_attention(self, hidden_states), None


class DebertaReference(DisentangledSelfAttention):
    """DeBERTa's, with oracle hooks on Q and K of the content product alone."""

    def forward(self, x, mask, *args, relative_pos=None, rel_embeddings=None, **kwargs):
        d, reach = self.attention_head_size, min(x.shape[1], self.max_relative_positions)
        q, k, v = split(self.in_proj(x)).chunk(3, -1)
        q, v = q + split(self.q_bias[None, None]), v + split(self.v_bias[None, None])
        scale = torch.sqrt(torch.tensor(d, dtype=torch.float) * 3)  # in float32, as in the library
        q = q / scale.to(q.dtype)
        middle = self.max_relative_positions
        embeddings = rel_embeddings[None, middle - reach : middle + reach]
        position = (relative_pos[0] + reach).clamp(0, 2 * reach - 1)
        key_position = split(self.pos_proj(embeddings))[0][:, position]
        query_position = split(self.pos_q_proj(embeddings))[0][:, position] / scale
        content_q, content_k = hooked(q, k)
        scores = (
            content_q @ content_k.mT
            + torch.einsum("bhnd,hnmd->bhnm", q, key_position)
            + torch.einsum("bhmd,hnmd->bhnm", k, query_position)
        )
        if self.talking_head:
            scores = torch.einsum("bhnm,gh->bgnm", scores, self.head_logits_proj.weight)
        weights = scores.masked_fill(~mask.bool(), torch.finfo(scores.dtype).min).softmax(-1)
        if self.talking_head:
            weights = torch.einsum("bhnm,gh->bgnm", weights, self.head_weights_proj.weight)
        return merge(weights @ v), None


REFERENCES = {
    CaiTAttention: CaiTReference,
    XCAttention: XCReference,
    NystromformerSelfAttention: NystroemReference,
    RowAttention: RowReference,
    VitDetAttention: ViTDetReference,
    SamVisionAttention: SamReference,
    SamVisionSdpaAttention: SamSdpaReference,
    DisentangledSelfAttention: DebertaReference,
    NanoAttention: NanoReference,
    CrossAttention: CrossReference,
    ViTAttention: ViTReference,
    AnnotatedAttention: AnnotatedReference,
    TemperedAttention: TemperedReference,
}


def feed_forward():
    return nn.Sequential(
        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
    )


class Stack(nn.Module):
    """A language model of such blocks; all of them in a loop, as a universal transformer has it."""

    def __init__(self, *blocks, loops=1):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.zeros(2 * LENGTH, WIDTH))
        self.step = nn.Embedding(loops, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.feed_forwards = nn.ModuleList(feed_forward() for _ in blocks)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, text):
        x = self.embed(text) + self.position[: text.shape[1]]
        for step in self.step.weight:
            x = x + step
            for block, feed_forward in zip(self.blocks, self.feed_forwards, strict=True):
                x = x + block(x)
                x = x + feed_forward(x)
        return self.head(x)


class Perceiver(nn.Module):
    """Latents that look at the text and at themselves, all layers tied, as in the paper."""

    def __init__(self, merged, loops=3):
        super().__init__()
        self.loops = loops
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.zeros(2 * LENGTH, WIDTH))
        self.latents = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.cross = CrossAttention(merged)
        self.latent = CrossAttention(merged)
        self.feed_forward = feed_forward()
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, text, mask=None):
        context = self.embed(text) + self.position[: text.shape[1]]
        x = self.latents.expand(len(text), -1, -1)
        for _ in range(self.loops):
            x = x + self.cross(x, context=context, mask=mask)
            x = x + self.latent(x)
            x = x + self.feed_forward(x)
        return self.head(x)


class ViT(nn.Module):
    def __init__(self, depth=2, patch=2, side=8):
        super().__init__()
        self.to_patch_embedding = nn.Sequential(
            Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=patch, p2=patch),
            nn.Linear(3 * patch**2, WIDTH),
            nn.LayerNorm(WIDTH),
        )
        self.pos_embedding = nn.Parameter(torch.randn(1, (side // patch) ** 2 + 1, WIDTH))
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.layers = nn.ModuleList(
            nn.ModuleList([ViTAttention(), feed_forward()]) for _ in range(depth)
        )
        self.mlp_head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, images):
        x = self.to_patch_embedding(images)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embedding
        for attention, feed_forward in self.layers:
            x = attention(x) + x
            x = feed_forward(x) + x
        return self.mlp_head(x[:, 0])


class Features(nn.Module):
    """An image encoder of transformers, and logits of what it returns."""

    def __init__(self, encoder, channels_first=False):
        super().__init__()
        self.encoder, self.channels_first = encoder, channels_first
        width = encoder.config.output_channels if channels_first else WIDTH
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, images):
        x = self.encoder(images).last_hidden_state
        return self.head(x.flatten(2).mT)


def vitdet():
    config = hf.VitDetConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        mlp_ratio=2,
        image_size=16,
        pretrain_image_size=16,
        patch_size=4,
        use_relative_position_embeddings=True,
        window_block_indices=[0],
        window_size=2,
    )
    config.output_channels = WIDTH
    return Features(hf.VitDetModel(config), channels_first=True)


def sam(attention):
    config = hf.SamVisionConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        mlp_dim=48,
        image_size=16,
        patch_size=4,
        window_size=2,
        global_attn_indexes=[1],
        output_channels=WIDTH,
        num_pos_feats=4,
        attn_implementation=attention,
    )
    return Features(hf.SamVisionModel(config), channels_first=True)


def deberta(talking):
    config = hf.DebertaConfig(
        **{**COMMON, **NO_DROPOUT}, relative_attention=True, pos_att_type=["c2p", "p2c"]
    )
    config.talking_head = talking
    return hf.DebertaForMaskedLM(config)


class TorchSeq2Seq(nn.Module):
    """``nn.Transformer`` between embeddings."""

    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.zeros(2 * LENGTH, WIDTH))
        self.transformer = nn.Transformer(WIDTH, HEADS, 2, 2, 48, dropout=0.0, **options)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source, target, mask=None):
        causal = nn.Transformer.generate_square_subsequent_mask(
            target.shape[1], dtype=self.position.dtype
        )
        inputs = [self.embed(text) + self.position[: text.shape[1]] for text in (source, target)]
        first = self.transformer.batch_first
        padding = None if mask is None else ~mask
        y = self.transformer(
            *(inputs if first else [x.transpose(0, 1) for x in inputs]),
            tgt_mask=causal,
            tgt_is_causal=True,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        return self.head(y if first else y.transpose(0, 1))


class HandSeq2Seq(nn.Module):
    """An encoder and a decoder of layers that take query, key, value and mask."""

    def __init__(self, layer, **options):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.zeros(2 * LENGTH, WIDTH))
        names = ("encoder", "latter_encoder", "decoder", "cross")
        self.layers = nn.ModuleDict({name: layer(**options) for name in names})
        self.feed_forwards = nn.ModuleDict({name: feed_forward() for name in names})
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def sublayer(self, name, x, context, mask):
        y = self.layers[name](x, context, context, mask=mask)
        x = x + (y[0] if isinstance(y, tuple) else y)
        return x + self.feed_forwards[name](x)

    def forward(self, source, target, mask=None):
        x, y = (self.embed(text) + self.position[: text.shape[1]] for text in (source, target))
        if mask is not None:
            mask = mask.unsqueeze(-2)
        for name in ("encoder", "latter_encoder"):
            x = self.sublayer(name, x, x, mask)
        causal = torch.ones(1, y.shape[1], y.shape[1]).tril()
        y = self.sublayer("decoder", y, y, causal)
        return self.head(self.sublayer("cross", y, x, mask))


class XSeq2Seq(nn.Module):
    """An encoder and a decoder of x-transformers, as its XTransformer joins them."""

    def __init__(self, **options):
        super().__init__()
        self.encoder = x_transformer(Encoder, **options)
        self.decoder = x_transformer(Decoder, cross_attend=True, **options)

    def forward(self, source, target, mask=None):
        context = self.encoder(source, mask=mask, return_embeddings=True)
        return self.decoder(target, context=context, context_mask=mask)


def x_transformer(layers, **options):
    options = {"depth": 2, "heads": HEADS, "attn_dim_head": DIM, "ff_mult": 1, **options}
    return TransformerWrapper(
        num_tokens=VOCABULARY, max_seq_len=2 * LENGTH, attn_layers=layers(dim=WIDTH, **options)
    )


# The ways of the references to Q and K.


def refer(model):
    """Make a model its own reference."""
    if isinstance(model, hf.PreTrainedModel):
        # Llama's eager softmax is in float32 whatever the dtype of the model.
        rounds = (model.config.model_type, model.config._attn_implementation) == ("llama", "eager")
        model.set_attn_implementation("oracle_float32" if rounds else "oracle")
    elif isinstance(model, peft.PeftModel):
        refer(model.get_base_model())
    for module in model.modules():
        if type(module) in REFERENCES:
            module.__class__ = REFERENCES[type(module)]
        elif isinstance(module, nn.MultiheadAttention):
            module.forward = types.MethodType(packed_attention, module)
        elif isinstance(module, Attend):
            module.register_forward_pre_hook(on_q_and_k)
    return model


def on_q_and_k(module, args):
    q, k, v = args
    return *hooked(q, k), v


def packed_attention(self, query, key, value, attn_mask=None, **kwargs):
    inputs = (query, key, value)
    if self.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    y = mha_reference(self, *inputs, bias=attn_mask, scales=SCALES)
    return (y.transpose(0, 1) if self.batch_first else y), None


# The models.


def text(length=LENGTH):
    return torch.randint(3, VOCABULARY, (BATCH, length))


def one_text():
    return (text(),)


def two_texts():
    return text(LENGTH + 2), text()


def images():
    return (torch.randn(BATCH, 3, 8, 8, dtype=torch.float64),)


def xcit():
    return Stack(XCAttention(), XCAttention())


def nystroemformer():
    config = hf.NystromformerConfig(
        **COMMON, **NO_DROPOUT, num_landmarks=LENGTH, segment_means_seq_len=2 * LENGTH
    )
    return hf.NystromformerForMaskedLM(config)


def long_text():
    return (text(2 * LENGTH),)


def large_images():
    return (torch.randn(BATCH, 3, 16, 16, dtype=torch.float64),)


def cait():
    return Stack(CaiTAttention(), CaiTAttention())


def nano(flash, blocks=1, loops=1):
    return Stack(*(NanoAttention(flash) for _ in range(blocks)), loops=loops)


def lucidrains(merged):
    return Stack(CrossAttention(merged), CrossAttention(merged))


def packed_universal():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True)
    return Stack(layer, loops=3)


def albert(attention):
    config = hf.AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=16,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        max_position_embeddings=2 * LENGTH,
        pad_token_id=0,
        attn_implementation=attention,
        **NO_DROPOUT,
    )
    return hf.AlbertForMaskedLM(config)


def llama(attention, adapter):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, attn_implementation=attention)).double()
    return peft.get_peft_model(model, copy.deepcopy(adapter), autocast_adapter_dtype=False)


def lora(*targets, **options):
    return peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(targets), **options)


@dataclass(frozen=True)
class Case:
    library: str
    model: str
    attention: str
    tap: str
    layers: int
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple] = one_text

    def __str__(self):
        return (
            "-".join((self.library, self.model, self.attention)).replace(",", "").replace(" ", "-")
        )


X_TRANSFORMERS = {
    "Decoder": (partial(x_transformer, Decoder), one_text, 2),
    "Encoder": (partial(x_transformer, Encoder), one_text, 2),
    "encoder-decoder": (XSeq2Seq, two_texts, 6),
}
ROTARY = {"rotary_pos_emb": True, "rotary_emb_dim": DIM}
TALKING_HEADS = {"attn_pre_talking_heads": True, "attn_post_talking_heads": True}
TOP_K = {"attn_sparse_topk": 3}
OF_ALL = {
    "": {},
    ", rotary": ROTARY,
    ", qk-norm": {"attn_qk_norm": True},
    ", one_kv_head": {"attn_one_kv_head": True},
    ", kv_heads": {"attn_kv_heads": 2, **ROTARY},
}
OF_DECODERS = {
    ", mem_kv": {"attn_num_mem_kv": 2},
    ", ALiBi": {"alibi_pos_bias": True},
    ", dropout": {"attn_dropout": 0.1, "ff_dropout": 0.1},
    ", tied": {"depth": 3, "weight_tie_layers": True},
}
OF_MANUAL_DECODERS = {
    ", talking heads": TALKING_HEADS,
    ", learned sink": {"attn_head_learned_sink": True},
    ", residual_attn": {"residual_attn": True},
    ", top-k": TOP_K,
    ", soft clamp": {"attn_softclamp_logits": True, "attn_logit_softclamp_value": 2.0},
    ", cog": {"attn_cog_signed": True},
}
ADAPTERS = {
    "LoRA q k": lora("q_proj", "k_proj"),
    "LoRA q k v": lora("q_proj", "k_proj", "v_proj", lora_dropout=0.1),
    "DoRA q k v": lora("q_proj", "k_proj", "v_proj", use_dora=True),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


def x_transformers_cases(tap, way):
    for model, (build, inputs, layers) in X_TRANSFORMERS.items():
        variants = dict(OF_ALL)
        if model == "Decoder":
            variants |= OF_DECODERS | (OF_MANUAL_DECODERS if way == "manual" else {})
        for name, options in variants.items():
            built = partial(build, attn_flash=way == "flash", **options)
            count = 1 if "weight_tie_layers" in options else layers
            yield Case("x-transformers", model + name, way, tap, count, built, inputs)


def cases():
    for tap, way in (("score", "flash"), ("softmax", "manual")):
        yield from x_transformers_cases(tap, way)
        flash = way == "flash"
        yield Case("nanoGPT", "GPT", way, tap, 2, partial(nano, flash, blocks=2))
        yield Case("nanoGPT", "universal transformer", way, tap, 1, partial(nano, flash, loops=3))
    for merged in (False, True):
        way = "manual, merged heads" if merged else "manual"
        yield Case("lucidrains", "GPT", way, "softmax", 2, partial(lucidrains, merged))
        yield Case("lucidrains", "Perceiver", way, "softmax", 2, partial(Perceiver, merged))
    yield Case("vit-pytorch", "ViT", "manual", "softmax", 2, ViT, images)
    yield Case("vit-pytorch", "CaiT", "manual, heads mixed", "softmax", 2, cait)
    yield Case("vit-pytorch", "XCiT", "manual, cross-covariance", "softmax", 2, xcit)
    yield Case("transformers", "Nyströmformer", "eager", "softmax", 2, nystroemformer, long_text)
    way = "manual, rows tied"
    yield Case("ESM", "MSA Transformer", way, "softmax", 2, Alignments, long_text)
    yield Case("transformers", "ViTDet", "eager", "softmax", 2, vitdet, large_images)
    for tap, way in (("score", "sdpa"), ("softmax", "eager")):
        built = partial(sam, way)
        yield Case("transformers", "SAM, image encoder", way, tap, 2, built, large_images)
    for talking in (False, True):
        name = "DeBERTa, talking heads" if talking else "DeBERTa"
        yield Case("transformers", name, "eager", "softmax", 2, partial(deberta, talking))
    for library, layer in (
        ("Annotated Transformer", AnnotatedAttention),
        ("jadore801120", TemperedAttention),
    ):
        build = partial(HandSeq2Seq, layer)
        yield Case(library, "encoder-decoder", "manual", "softmax", 4, build, two_texts)
    for first in (True, False):
        build = partial(TorchSeq2Seq, batch_first=first)
        name = f"nn.Transformer, batch_first={first}"
        yield Case("torch", name, "packed", "packed", 6, build, two_texts)
    yield Case("torch", "universal transformer", "packed", "packed", 1, packed_universal)
    for tap, way in (("score", "sdpa"), ("softmax", "eager")):
        yield Case("transformers", "ALBERT", way, tap, 1, partial(albert, way))
        for name, adapter in ADAPTERS.items():
            yield Case("peft", f"Llama, {name}", way, tap, 2, partial(llama, way, adapter))


# The parameters that are trained and make Q and K, and the share of their rows that does: where
# they are fused, V comes last.
SHARES = {
    "layers.0.q_proj.weight": 1,
    "layers.0.k_proj.weight": 1,
    "attention.qkv.weight": 2 / 3,
    "attn.qkv.weight": 2 / 3,
    "in_proj.weight": 1 / 6,  # q, k and v of the first head, then those of the second
    "linears.0.weight": 1,
    "linears.1.weight": 1,
    "w_qs.weight": 1,
    "w_ks.weight": 1,
    "to_q.weight": 1,
    "to_k.weight": 1,
    "to_kv.weight": 1 / 2,
    "to_qkv.weight": 2 / 3,
    "c_attn.weight": 2 / 3,
    "in_proj_weight": 2 / 3,
    "attention.query.weight": 1,
    "self.query.weight": 1,
    "self.key.weight": 1,
    "attention.key.weight": 1,
    "q_proj.lora_A.default.weight": 1,
    "q_proj.lora_B.default.weight": 1,
    "k_proj.lora_A.default.weight": 1,
    "k_proj.lora_B.default.weight": 1,
    "prompt_encoder.default.embedding.weight": 1,
}


def differs(name, unscaled, scaled):
    """Whether the gradients of nearly all rows that make Q or K differ by a tenth or more."""
    (share,) = (share for suffix, share in SHARES.items() if name.endswith(suffix))
    rows = slice(round(share * len(scaled)))
    worst, size = ((x[rows]).abs().amax(1) for x in (scaled - unscaled, scaled))
    return (size > 1e-7).all() and (worst > 0.1 * size).double().mean() > 0.8


def shaken(model):
    """Take weights, biases and norms far from where they usually start."""
    model.double()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def output_of(model, inputs, seed=0):
    torch.manual_seed(seed)  # for dropout
    output = model(*inputs)
    return output if isinstance(output, torch.Tensor) else output.logits


def loss_of(output):
    """Against targets that are always the same, for logits of any leading dimensions."""
    targets = torch.arange(output[..., 0].numel()) % VOCABULARY
    return F.cross_entropy(output.flatten(0, -2), targets)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.long] if i % 2 else [])
        for i, case in enumerate(cases())
    ],
    ids=str,
)
def test_five_steps_on_the_gradients_of_the_reference(case, record_property):
    model, inputs, error = shaken(case.build()), case.inputs(), 0.0
    bare, reference = copy.deepcopy(model), refer(copy.deepcopy(model))
    projections = [n for n, _ in model.named_parameters() if n.endswith(tuple(SHARES))]
    assert projections
    optimizer = wrap(model)
    for step in range(5):
        after = output_of(model, inputs, step)
        actual = gradients(model, loss_of(after))
        if step in (0, 4):
            for copied in (bare, reference):
                copied.load_state_dict(model.state_dict())
            before = output_of(bare, inputs, step)
            assert torch.equal(after, before)
            unscaled = gradients(bare, loss_of(before))
            expected = gradients(reference, loss_of(output_of(reference, inputs, step)))
            error = max(error, largest_error(actual, expected))
            for name in projections:
                assert differs(name, unscaled[name], actual[name]), name
        optimizer.step()
    assert error < 1e-9
    sites = optimizer.hooks.sites
    assert {site.tap for site in sites} == {case.tap}
    assert len(sites) == case.layers
    record_property("library", case.library)
    record_property("model", case.model)
    record_property("attention", case.attention)
    record_property("taps", case.tap)
    record_property("layers", case.layers)
    record_property("error", error)


@pytest.mark.parametrize("targets", [("q_proj", "k_proj"), ("q_proj", "k_proj", "v_proj")])
def test_lora_has_the_gradients_that_follow_from_the_rescaled_ones_of_the_dense_weights(targets):
    model, inputs = shaken(llama("sdpa", lora(*targets))), one_text()
    dense = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    of_dense = gradients(dense, loss_of(output_of(refer(dense), inputs)))
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            a, b = (side["default"].weight.detach() for side in (module.lora_A, module.lora_B))
            of_weight = of_dense[name.removeprefix("base_model.model.") + ".weight"]
            expected[f"{name}.lora_A.default.weight"] = 2 * b.mT @ of_weight
            expected[f"{name}.lora_B.default.weight"] = 2 * of_weight @ a.mT
    assert len(expected) == 4 * len(targets)
    wrapped = wrap(model)
    actual = gradients(model, loss_of(output_of(model, inputs)))
    # Norms are in float32, and the merged weights round otherwise.
    assert largest_error(actual, expected) < 1e-6
    wrapped.detach()
    assert largest_error(gradients(model, loss_of(output_of(model, inputs))), expected) > 0.1


PADDED = {
    "nn.Transformer": partial(TorchSeq2Seq, batch_first=True),
    "Annotated Transformer": partial(HandSeq2Seq, AnnotatedAttention, dropout=0.0),
    "jadore801120": partial(HandSeq2Seq, TemperedAttention, dropout=0.0),
    "Perceiver": partial(Perceiver, merged=False),
    "Perceiver merged heads": partial(Perceiver, merged=True),
    **{
        f"{model.__name__} {name} {way}": partial(x_transformer, model, attn_flash=flash, **options)
        for model in (Encoder, Decoder)
        for way, flash in (("flash", True), ("manual", False))
        for name, options in {"plain": {}, "rotary": ROTARY}.items()
    },
    **{
        f"{model.__name__} {name} manual": partial(x_transformer, model, **options)
        for model in (Encoder, Decoder)
        for name, options in {"talking heads": TALKING_HEADS, "top-k": TOP_K}.items()
    },
    "encoder-decoder flash": partial(XSeq2Seq, attn_flash=True),
    "encoder-decoder manual": partial(XSeq2Seq, attn_flash=False),
}


@pytest.mark.parametrize("name", PADDED)
def test_sequences_in_a_padded_batch_have_the_gradients_they_have_alone(name):
    model, rows = shaken(PADDED[name]()), ragged()
    padded, real = pad(rows, "right")
    real = real.bool()
    targets = torch.randint(3, VOCABULARY, (len(rows), padded.shape[1]))
    seq2seq = isinstance(model, (TorchSeq2Seq, HandSeq2Seq, XSeq2Seq))
    # Where the logits are those of another sequence, that one has no padding.
    own = not seq2seq and not isinstance(model, Perceiver)
    counted = real if own else torch.ones_like(real)

    def total(text, target, counted, mask=None):
        logits = model(*((text, target) if seq2seq else (text,)), mask=mask)
        return F.cross_entropy(logits[counted], target[counted], reduction="sum")

    def together():
        return total(padded, targets, counted, real)

    def alone():
        parts = zip(rows, targets, counted, strict=True)
        if own:
            parts = ((row, y[: len(row)], c[: len(row)]) for row, y, c in parts)
        return sum(total(row[None], y[None], c[None]) for row, y, c in parts)

    error = largest_error(gradients(model, together()), gradients(model, alone()))
    assert error < 1e-9
    optimizer = wrap(model)
    error = largest_error(gradients(model, together()), gradients(model, alone()))
    assert error < 1e-9
    assert not optimizer.hooks.unseen()


def test_sequences_of_a_padded_alignment_have_the_gradients_they_have_alone():
    # More columns than the features of all rows of a head, so that the span is not everything.
    model, columns = shaken(Alignments()), (24, 19, 21)
    rows = [torch.randint(3, VOCABULARY, (2, length)) for length in columns]
    padded = torch.stack([F.pad(row, (0, 24 - row.shape[1])) for row in rows])
    padding = torch.stack([torch.arange(24) >= length for length in columns])
    padding = padding[:, None].expand(-1, 2, -1)

    def together():
        logits = model(padded.flatten(1), padding).unflatten(1, (2, -1))
        return logits[~padding].pow(3).sum()

    def alone():
        return sum(model(row.reshape(1, -1)).pow(3).sum() for row in rows)

    assert largest_error(gradients(model, together()), gradients(model, alone())) < 1e-9
    plain = gradients(model, alone())
    optimizer = wrap(model)
    actual = gradients(model, together())
    assert largest_error(actual, gradients(model, alone())) < 1e-9
    assert largest_error(actual, plain) > 0.1
    (site, _) = optimizer.hooks.sites
    assert (site.heads, site.head_dim, site.query_length) == (HEADS, 2 * DIM, 21)


# Banded attention: no product of all queries with all keys is ever there.

BANDED = {
    "query": "query",
    "key": "key",
    "num_heads": HEADS,
    "batch_first": False,
    "in_place": True,
}


def longformer():
    config = hf.LongformerConfig(**COMMON, **NO_DROPOUT, attention_window=[4, 4], sep_token_id=2)
    return hf.LongformerForMaskedLM(config)


def led():
    config = hf.LEDConfig(
        **SEQ2SEQ,
        attention_window=4,
        max_encoder_position_embeddings=32,
        max_decoder_position_embeddings=32,
    )
    return hf.LEDForConditionalGeneration(config)


def tokens_first(module, args, y):
    """Put oracle hooks on a projection (N, B, H * d); the layer may change what comes out."""
    side = "query" if module.is_query else "key"
    heads = oracle_hook(y.unflatten(-1, (HEADS, -1)).permute(1, 2, 0, 3) * 1.0, *SCALES[side])
    return heads.permute(2, 0, 1, 3).flatten(-2).clone()


@pytest.mark.parametrize("build", [longformer, led])
def test_banded_attention_by_the_modules_that_project_its_queries_and_keys(build):
    kinds = LongformerSelfAttention, LEDEncoderSelfAttention
    model, inputs = shaken(build()), {"input_ids": text(), "decoder_input_ids": text()}
    if build is longformer:
        del inputs["decoder_input_ids"]
    reference = copy.deepcopy(model)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    for name in names:
        for projection in ("query", "key"):
            module = reference.get_submodule(f"{name}.{projection}")
            module.is_query = projection == "query"
            module.register_forward_hook(tokens_first)
    before = model(**inputs).logits
    plain = gradients(model, loss_of(before))
    expected = gradients(reference, loss_of(reference(**inputs).logits))
    scale = SpanScale(*SCALES["query"], key=SCALES["key"])
    maps = dict.fromkeys(names, BANDED)
    with attach(model, dict.fromkeys(names, scale), qk_modules=maps) as hooks:
        after = model(**inputs).logits
        actual = gradients(model, loss_of(after))
        hooks.check()
    assert torch.equal(after, before)
    assert largest_error(actual, expected) < 1e-9
    for name in names:
        for projection in ("query", "key"):
            of_one = [{"": g[f"{name}.{projection}.weight"]} for g in (actual, plain)]
            assert largest_error(*of_one) > 0.1


@pytest.mark.parametrize("build", [longformer, led])
def test_banded_attention_that_is_not_mapped_is_an_error_that_says_where_it_was_lost(build):
    model, inputs = build(), {"input_ids": text()}
    kinds = "LongformerSelfAttention|LEDEncoderSelfAttention"
    message = f"Each ({kinds}) multiplied .* their product was lost on its way to a softmax: at pad"
    with attach(model, {"*": (2.0, 1.0)}), pytest.raises(UnscaledLayerError, match=message):
        model(**inputs)


def test_finding_the_layers_of_a_model_that_uses_einops_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(find_attention(ViT())) == 2
