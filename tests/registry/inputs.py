"""Inputs for any model of transformers, by the names that its forward takes."""

import inspect

import torch

BATCH, LENGTH = 2, 12


def candidates(model):
    """Yield dicts of inputs to try in turn, those that reach more of the model first."""
    taken = inspect.signature(model.forward).parameters
    config = model.config
    own = [
        name
        for name in ("input_ids", "pixel_values", "pixel_values_videos", *_SOUND, *_GRIDS)
        if name in taken
    ]
    needed = [
        name
        for name, parameter in taken.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    decoder = [name for name in ("decoder_input_ids",) if name in taken]
    sides = [name for name in ("encoder_hidden_states",) if name in taken]
    tried = set()
    for names in (
        own,
        [name for name in own if name not in _GRIDS],
        [name for name in own if name not in ("input_ids", *_SOUND)],
        [name for name in own if name.startswith("pixel")],
        [name for name in own if name in _SOUND],
        [name for name in own if name == "input_ids"],
        [],
    ):
        for more in ([*decoder, *sides], decoder):
            every = tuple(dict.fromkeys([*names, *more, *needed]))
            if not every or every in tried:
                continue
            tried.add(every)
            for form in range(3):
                made = {name: value_of(name, config, form, set(taken)) for name in every}
                if all(value is not None for value in made.values()):
                    yield made
                if not any(name.startswith(("pixel", *_SOUND, "hidden")) for name in every):
                    break


_SOUND = ("input_features", "input_values")
_BINS = ("feature_projection_input_dim", "num_mel_bins", "feature_size", "input_dim")
_GRIDS = ("grid_thw", "image_grid_thw", "grid_thws", "image_grid_hws")
_ROWS = 4  # of patches in an image that comes as a list of its patches


def field(config, *names, default):
    """Return the first of the fields that the config or a config inside it has, as a number."""
    inner = [c for c in vars(config).values() if hasattr(c, "model_type")]
    for name in names:
        for place in (config, *inner):
            value = getattr(place, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if type(value) is int:
                return value
    return default


def value_of(name, config, form, taken=()):
    """Return an input by its name, or None where nothing is known of it."""
    if name in _GRIDS:
        return torch.tensor([[1, _ROWS, _ROWS][-3 if "t" in name else -2 :]] * BATCH)
    if set(_GRIDS) & set(taken) and (name.startswith("pixel") or name == "hidden_states"):
        patch = field(config, "patch_size", default=4)
        channels = field(config, "in_channels", "num_channels", "in_chans", default=3)
        frames = field(config, "temporal_patch_size", default=1)
        shape = (channels * frames * patch**2,) if form == 0 else (channels, patch, patch)
        return torch.randn(BATCH * _ROWS**2, *shape, dtype=torch.float64)
    if name in ("input_ids", "decoder_input_ids"):
        vocabulary = min(field(config, "vocab_size", default=32), 64)
        return torch.randint(3, max(vocabulary // 2, 4), (BATCH, LENGTH))
    if name == "pixel_values":
        # Where keys are of regions, a smaller image has one region, which all queries attend to.
        regions = any(hasattr(config, x) for x in ("sr_ratios", "sequence_reduction_ratios"))
        side = field(config, "image_size", "input_size", "img_size", default=64 if regions else 32)
        side = side if form < 2 else 64
        channels = field(config, "num_channels", "in_channels", "in_chans", default=3)
        frames = [field(config, "num_frames", default=2)] if form == 1 else []
        return torch.randn(BATCH, *frames, channels, side, side, dtype=torch.float64)
    if name == "pixel_values_videos":
        side = field(config, "image_size", "crop_size", default=32)
        return torch.randn(BATCH, 4, 3, side, side, dtype=torch.float64)
    if name == "pixel_mask":
        return torch.ones(BATCH, 32, 32, dtype=torch.long)
    if name == "input_values":
        if form == 0:
            return torch.randn(BATCH, 4000, dtype=torch.float64)
        bins = field(config, "num_mel_bins", default=16)
        length = field(config, "max_length", default=32)
        shape = (BATCH, length, bins) if form == 1 else (BATCH, 1, 4000)
        return torch.randn(*shape, dtype=torch.float64)
    if name == "input_features":
        bins = field(config, *_BINS, default=16)
        frames = 2 * field(config, "max_source_positions", default=32)
        shape = (BATCH, bins, frames) if form == 0 else (BATCH, frames, bins)
        return torch.randn(*shape, dtype=torch.float64)
    if name in ("inputs_embeds", "hidden_states", "encoder_hidden_states", "query_embeds"):
        width = field(config, "hidden_size", "d_model", "dim", default=32)
        return torch.randn(BATCH, LENGTH, width, dtype=torch.float64)
    if name == "bbox":
        return torch.randint(0, 8, (BATCH, LENGTH, 4)).sort(-1).values
    return None
