"""Making any config of transformers small, by the names of its fields."""

import re

WIDTH, HEADS, DIM, VOCABULARY, POSITIONS, PATCH, SIDE = 32, 4, 8, 96, 64, 4, 16

# In this order: the first pattern that a field's name matches tells its value.
_VALUES = [
    (r"vocab_size$|^num_embeddings$", VOCABULARY),
    (r"codebook_size$", 64),
    (r"(kv|key_value|kv_channels?)_(heads|groups)$|^num_kv_heads$|multi_query_group_num", 2),
    (r"^(.*_)?(num_heads|heads|n_heads?|num_attention_heads)$", HEADS),
    (r"qk_(rope|nope)_head_dim$", DIM // 2),
    (r"(head_dim|d_kv|kv_channels|dim_head|head_size|attention_head_size|qk_head_dim)$", DIM),
    (r"(q|kv)_lora_rank$", DIM),
    (r"intermediate|ffn|d_ff|mlp_dim|mlp_hidden|feedforward|ffw|d_inner|n_inner", 2 * WIDTH),
    (r"(hidden|embed|embedding|projection|proj|model|output|fpn)_(size|dim|dimension)$", WIDTH),
    (r"^(dim|d_model|n_embd|emb_dim|embed_dim|d_embed|width|hidden_dim|out_dim)$", WIDTH),
    (r"(hidden|embed|projection)_(size|dim)(_.*)?$|d_latents|classifier_proj_size", WIDTH),
    (r"^(image_size|input_size|img_size|pretrain_image_size)$", SIDE),
    (r"^patch_size$", PATCH),
    (r"^n?u?m?_?(routed_|local_)?experts$|^n_routed_experts$|^num_experts$", 4),
    (r"^n_groups?$", 2),
    (r"^topk_groups?$", 1),
    (r"^rotary_dim$", DIM // 2),
    (r"experts_per_tok|^top_?k$|moe_k$|moe_topk$", 2),
    (r"max_.*position|n_positions|^seq_length$|max_seq_len|n_ctx|max_length", POSITIONS),
    (r"sliding_window|attention_window|window_size|chunk_size|^local_attention$", 8),
    (r"num_queries|num_query|num_latents", 10),
    (r"num_mel_bins|feature_size$", 16),
]
_DEPTH = re.compile(r"^(.*_)?(n|num)_?(.*_)?(layers?|blocks)$|^depth$|^(en|de)coder_layers$")
_IDS = re.compile(r"_token_(id|index)$|^token_(id|index)$|_id$")


def shrink(config, widths=True):
    """Shrink a config and those inside it in place.

    Args:
        config: Of any model of transformers.
        widths: Whether sizes shrink too, not the number of layers, the vocabulary and the images
            alone.
    """
    shrink_depth(config)
    # The grouped products of experts take no float64.
    config._experts_implementation = "eager"
    per_stage = any(
        isinstance(getattr(config, name, None), (list, tuple))
        for name in ("num_heads", "num_attention_heads", "hidden_sizes", "embed_dims", "embed_dim")
    )
    own_heads = vars(config).get("num_attention_heads")
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrink(value, widths)
        elif isinstance(value, dict) and "rope" in name:
            # Half of a head's size in all; some models have a default of their own for it.
            value["mrope_section"] = [2, 1, 1]
        elif name in ("image_size", "input_size", "img_size", "patch_size"):
            small = SIDE if "patch" not in name else PATCH
            if isinstance(value, int) and value > small and not per_stage:
                put(config, name, small)
            elif isinstance(value, (list, tuple)) and not per_stage:
                put(config, name, type(value)([small] * len(value)))
        elif type(value) is int and value > 1:
            for pattern, small in _VALUES:
                if re.search(pattern, name):
                    if name.endswith(("kv_heads", "key_value_heads")):
                        small = HEADS if value == own_heads else min(small, value)
                    if (widths and not per_stage) or small in (VOCABULARY, POSITIONS):
                        put(config, name, min(value, small) if small != HEADS else small)
                    break
    heads, grouped = (
        vars(config).get(name) for name in ("num_attention_heads", "num_key_value_heads")
    )
    if type(heads) is int and type(grouped) is int and heads % grouped:
        put(config, "num_key_value_heads", heads)
    if type(vars(config).get("qk_rope_head_dim")) is int and widths:
        # Of multi-head latent attention, whose rotary part alone has the size "head_dim".
        put(config, "head_dim", DIM // 2)
    small_ids(config)


def shrink_depth(config):
    """Leave a layer of each kind that the config has, and two or more where all are alike."""
    kinds = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and value and re.search("layer.*type|block.*type", name)
    }
    depth = 2
    for name, value in kinds.items():
        kept = list(dict.fromkeys(map(str, value)))
        firsts = [value[[str(x) for x in value].index(kind)] for kind in kept]
        kinds[name] = (firsts * 2)[: max(2, len(firsts))]
        depth = max(depth, len(kinds[name]))
    for name, value in kinds.items():
        put(config, name, (value * depth)[:depth])
    for name, value in list(vars(config).items()):
        if type(value) is int and value > depth and _DEPTH.search(name):
            put(config, name, depth)
        if name in ("depths", "num_blocks", "layer_depths") and isinstance(value, (list, tuple)):
            put(config, name, type(value)([1] * len(value)))


def small_ids(config):
    """Give ids beyond the vocabulary, as those of image tokens are, ids of their own within it."""
    vocabulary = getattr(config, "vocab_size", None)
    if type(vocabulary) is not int:
        text = getattr(config, "text_config", None)
        vocabulary = getattr(text, "vocab_size", VOCABULARY)
    free = vocabulary - 1
    for name, value in list(vars(config).items()):
        if type(value) is int and _IDS.search(name) and value >= vocabulary:
            put(config, name, free)
            free -= 1
        elif isinstance(value, list) and name.endswith("_token_id"):
            put(config, name, [min(x, vocabulary - 1) for x in value if isinstance(x, int)])


def put(config, name, value):
    """Set a field, unless the config forbids it."""
    try:
        setattr(config, name, value)
    except Exception:  # each config validates in its own way
        return
