"""The model families of transformers, small and with random weights, and a reference for each.

A reference is a copy of the model whose Q and K are taken by a way of its own: transformers hands
them to an attention function registered here, which puts oracle hooks on them and computes the
attention by plain mathematics. DeBERTa-v2, which has no such interface, gets another forward.
"""

import copy
import functools
import os
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from models import oracle_hook
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

from spanopt import SpanScale, SpanScaledOptimizer

os.environ["HF_HUB_OFFLINE"] = "1"


VOCABULARY, BATCH, LENGTH, FRAMES = 40, 3, 12, 14


SCALES = {"query": (2.0, 0.5), "key": (0.6, 1.5)}


@dataclass(frozen=True)
class Family:
    """A model class with a small config, and what to expect of it."""

    name: str
    model: Any
    config: Any
    inputs: Callable[[], dict[str, Any]]
    layers: Callable[[Any], int]
    """The number of attention layers, from the config."""
    projections: tuple[str, ...]
    """The names of the weights that make Q and K in one attention layer."""
    attentions: tuple[str, ...] = ("sdpa", "eager")
    rounds: bool = False
    """Whether the eager softmax is in float32 whatever the dtype of the model."""

    def build(self, attention: str):
        """Return the model, its weights, biases and norms far from where they usually start."""
        config = copy.deepcopy(self.config)
        config._attn_implementation = attention
        model = self.model(config).double()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        return model

    def reference(self, model, attention: str):
        """Return an equal model whose gradients the oracle rescales."""
        model = copy.deepcopy(model)
        if self.model is hf.DebertaV2ForMaskedLM:
            for module in model.modules():
                if isinstance(module, DisentangledSelfAttention):
                    module.forward = types.MethodType(disentangled_attention, module)
        else:
            rounds = self.rounds and attention == "eager"
            model.set_attn_implementation("oracle_float32" if rounds else "oracle")
        return model


def oracle_attention(module, query, key, value, mask, scaling=None, softmax=None, **kwargs):
    """Attention by plain mathematics, grouped queries included, with oracle hooks on Q and K."""
    softcap, position_bias = kwargs.get("softcap"), kwargs.get("position_bias")
    query, key = hooked(query, key)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    for bias in (position_bias, mask):
        if bias is not None:
            scores = scores + bias
    weights = scores.softmax(-1, dtype=softmax).to(value.dtype)
    return (weights @ value).transpose(1, 2), weights


def hooked(query, key):
    return oracle_hook(query * 1.0, *SCALES["query"]), oracle_hook(key * 1.0, *SCALES["key"])


for name, dtype in (("oracle", None), ("oracle_float32", torch.float32)):
    hf.AttentionInterface.register(name, functools.partial(oracle_attention, softmax=dtype))
    AttentionMaskInterface.register(name, eager_mask)


def disentangled_attention(self, hidden, mask, *args, relative_pos, rel_embeddings, **kwargs):
    """DeBERTa-v2's attention by hand, with oracle hooks on Q and K of the content product alone."""
    heads, d, span = self.num_attention_heads, self.attention_head_size, self.pos_ebd_size
    split = lambda x: x.unflatten(-1, (heads, d)).transpose(-3, -2)  # noqa: E731
    projections = (self.query_proj, self.key_proj, self.value_proj)
    query, key, value = (split(project(hidden)) for project in projections)
    position = (relative_pos[0] + span).clamp(0, 2 * span - 1)
    key_position = split(self.pos_key_proj(rel_embeddings))[:, position]
    query_position = split(self.pos_query_proj(rel_embeddings))[:, position]
    q, k = hooked(query, key)
    scores = (
        q @ k.mT
        + torch.einsum("bhnd,hnmd->bhnm", query, key_position)
        + torch.einsum("bhmd,hnmd->bhnm", key, query_position)
    ) / torch.tensor(3.0 * d).sqrt()  # in float32, as in the library
    scores = scores.masked_fill(~mask.bool(), torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(-2), None


def tokens(length=LENGTH):
    return torch.randint(3, VOCABULARY, (BATCH, length))


def labelled_text():
    text = tokens()
    return {"input_ids": text, "labels": text.clone()}


def text_pairs():
    return {"input_ids": tokens(FRAMES), "labels": tokens()}


def labelled_images():
    return {"pixel_values": images(), "labels": torch.arange(BATCH)}


def speech():
    # Two frames are one token of the encoder.
    sound = torch.randn(BATCH, 6, 2 * FRAMES, dtype=torch.float64)
    return {"input_features": sound, "labels": tokens()}


def captioned_images():
    return {"input_ids": tokens(), "pixel_values": images(), "return_loss": True}


def images():
    return torch.randn(BATCH, 3, 8, 8, dtype=torch.float64)


def depth(config):
    return config.num_hidden_layers


def encoder_decoder_depth(config):
    """Self-attention in the encoder, self-attention and cross-attention in the decoder."""
    if isinstance(config, hf.T5Config):
        return config.num_layers + 2 * config.num_decoder_layers
    return config.encoder_layers + 2 * config.decoder_layers


COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


IMAGE = {"image_size": 8, "patch_size": 2}


FAMILIES = [
    Family(
        "GPT-2",
        hf.GPT2LMHeadModel,
        hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=32,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        labelled_text,
        depth,
        ("c_attn.weight",),
    ),
    Family(
        "Llama",
        hf.LlamaForCausalLM,
        hf.LlamaConfig(**GROUPED),
        labelled_text,
        depth,
        ("q_proj.weight", "k_proj.weight"),
        rounds=True,
    ),
    Family(
        "Mistral",
        hf.MistralForCausalLM,
        hf.MistralConfig(**GROUPED, sliding_window=7),
        labelled_text,
        depth,
        ("q_proj.weight", "k_proj.weight"),
        rounds=True,
    ),
    Family(
        "Qwen3",
        hf.Qwen3ForCausalLM,
        hf.Qwen3Config(**GROUPED),
        labelled_text,
        depth,
        ("q_proj.weight", "k_proj.weight"),
        rounds=True,
    ),
    Family(
        "Gemma 2",
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config(
            **GROUPED, query_pre_attn_scalar=8, sliding_window=7, attn_logit_softcapping=2.0
        ),
        labelled_text,
        depth,
        ("q_proj.weight", "k_proj.weight"),
        attentions=("eager",),
        rounds=True,
    ),
    Family(
        "DeepSeek-V3.2",
        hf.DeepseekV32ForCausalLM,
        hf.DeepseekV32Config(
            **COMMON,
            num_key_value_heads=4,
            moe_intermediate_size=16,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=2,
            kv_lora_rank=8,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            index_n_heads=2,
            index_head_dim=16,
            index_topk=32,
        ),
        labelled_text,
        depth,
        ("self_attn.q_b_proj.weight", "kv_b_proj.weight"),
        rounds=True,
    ),
    Family(
        "GPT-NeoX",
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig(**COMMON),
        labelled_text,
        depth,
        ("query_key_value.weight",),
        rounds=True,
    ),
    Family(
        "OPT",
        hf.OPTForCausalLM,
        hf.OPTConfig(**COMMON, ffn_dim=48, dropout=0.0, word_embed_proj_dim=32),
        labelled_text,
        depth,
        ("q_proj.weight", "k_proj.weight"),
        rounds=True,
    ),
    Family(
        "BERT",
        hf.BertForMaskedLM,
        hf.BertConfig(**COMMON, **NO_DROPOUT),
        labelled_text,
        depth,
        ("query.weight", "key.weight"),
    ),
    Family(
        "ModernBERT",
        hf.ModernBertForMaskedLM,
        hf.ModernBertConfig(
            **COMMON,
            local_attention=8,
            layer_types=["full_attention", "sliding_attention"],
            cls_token_id=1,
            sep_token_id=2,
        ),
        labelled_text,
        depth,
        ("Wqkv.weight",),
        rounds=True,
    ),
    Family(
        "DistilBERT",
        hf.DistilBertForMaskedLM,
        hf.DistilBertConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
            n_layers=2,
            n_heads=4,
            dim=32,
            hidden_dim=48,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        labelled_text,
        depth,
        ("q_lin.weight", "k_lin.weight"),
    ),
    Family(
        "DeBERTa-v2",
        hf.DebertaV2ForMaskedLM,
        hf.DebertaV2Config(
            **COMMON,
            **NO_DROPOUT,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=4,
            norm_rel_ebd="layer_norm",
        ),
        labelled_text,
        depth,
        ("query_proj.weight", "key_proj.weight"),
        attentions=("eager",),
    ),
    Family(
        "T5",
        hf.T5ForConditionalGeneration,
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=16,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
        text_pairs,
        encoder_decoder_depth,
        ("q.weight", "k.weight"),
    ),
    Family(
        "BART",
        hf.BartForConditionalGeneration,
        hf.BartConfig(**SEQ2SEQ, max_position_embeddings=32),
        text_pairs,
        encoder_decoder_depth,
        ("q_proj.weight", "k_proj.weight"),
    ),
    Family(
        "ViT",
        hf.ViTForImageClassification,
        hf.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_labels=BATCH,
            **IMAGE,
            **NO_DROPOUT,
        ),
        labelled_images,
        depth,
        ("q_proj.weight", "k_proj.weight"),
        rounds=True,
    ),
    Family(
        "Whisper",
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig(
            **SEQ2SEQ, num_mel_bins=6, max_source_positions=FRAMES, max_target_positions=32
        ),
        speech,
        encoder_decoder_depth,
        ("q_proj.weight", "k_proj.weight"),
    ),
    Family(
        "CLIP",
        hf.CLIPModel,
        hf.CLIPConfig(
            text_config=hf.CLIPTextConfig(**COMMON),
            vision_config=hf.CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                **IMAGE,
            ),
            projection_dim=16,
        ),
        captioned_images,
        lambda config: depth(config.text_config) + depth(config.vision_config),
        ("q_proj.weight", "k_proj.weight"),
        rounds=True,
    ),
]


# The query side takes these two, the key side has its own.
SPAN_SCALE = SpanScale(*SCALES["query"], key=SCALES["key"])


def wrap(model):
    return SpanScaledOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-3), model, {"*": SPAN_SCALE}
    )


def pad(rows, side, length=0):
    """Stack rows of different lengths, with their mask."""
    length = max(length, *map(len, rows))
    padded, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        real = slice(len(row)) if side == "right" else slice(length - len(row), None)
        padded[i, real], mask[i, real] = row, 1
    return padded, mask


def ragged():
    """Token ids of three lengths, all of them larger than the head dimension."""
    return [torch.randint(3, VOCABULARY, (length,)) for length in (12, 9, 10)]
