# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Watch the gradients of your model
#
# This notebook shows what the gradients at attention's queries and keys look
# like while a model trains. It changes nothing in the training. Put your own
# model in the place of the small GPT-2 here: the only lines that matter are
# those with `SpanScaledOptimizer` and `SpanMonitor`.
#
# It needs the extra `monitor`, and here also `transformers`.

# %%
from pydoc_data.topics import topics

import spanopt
import torch
from transformers import GPT2Config, GPT2LMHeadModel

# %% [markdown]
# ## A model and some text
#
# The model is a GPT-2 with three layers and random weights. It predicts bytes
# of Python's own help texts, which every Python installation has.

# %%
LENGTH = 64
torch.manual_seed(0)
text = torch.tensor([*"\n".join(topics.values()).encode()])
config = GPT2Config(
    vocab_size=256,
    n_positions=LENGTH,
    n_embd=64,
    n_layer=3,
    n_head=4,
    bos_token_id=None,
    eos_token_id=None,
)
model = GPT2LMHeadModel(config)
model.loss_type = "ForCausalLM"  # transformers would warn that it guesses


def batch(step):
    starts = torch.randint(
        len(text) - LENGTH,
        (8, 1),
        generator=torch.Generator().manual_seed(step),
    )
    return text[starts + torch.arange(LENGTH)]


# %% [markdown]
# ## Which layers are there?
#
# `find_attention` lists the attention layers without running the model. The
# names are the keys that you use in `scales`.

# %%
for site in spanopt.find_attention(model):
    print(site.name, site.class_name)

# %% [markdown]
# ## Watch without changing anything
#
# With the scales (1, 1) every gradient stays as it is, bit for bit. The
# monitor still sees each one. It measures the first step and then every
# fifth.

# %%
optimizer = spanopt.SpanScaledOptimizer(
    torch.optim.AdamW(model.parameters(), lr=2e-3), model, scales=(1.0, 1.0)
)
with spanopt.SpanMonitor(optimizer, every=5) as monitor:
    for step in range(50):
        windows = batch(step)
        loss = model(input_ids=windows, labels=windows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print(f"loss of the last batch: {loss.item():.2f}")
optimizer

# %% [markdown]
# The table shows each layer, the *tap* by which its Q and K are reached, and
# its scales.
#
# ## The picture
#
# The gradient at Q splits into two parts: one inside the span of Q's columns,
# and the *violation* outside it. The picture shows the share of the squared
# norm that lies inside.

# %%
monitor.plot()

# %% [markdown]
# The dotted line is what a gradient of random direction would have: the head
# dimension over the number of tokens, here 16 / 64. A share above the line
# means that the gradient prefers the span.
#
# ## Every other column
#
# `plot` draws any measured column. The effective rank says how many
# directions of Q and K are in use, out of 16.

# %%
monitor.plot("effective_rank")

# %% [markdown]
# ## The numbers
#
# Each row is one layer, side and head in one step. Here is the mean over
# heads at the last step that was measured. `entropy` is that of the attention
# weights, in nats.

# %%
table = monitor.to_pandas()
last = table[table.step == table.step.max()]
columns = [
    "parallel_share",
    "chance_share",
    "effective_rank",
    "condition",
    "entropy",
]
last.groupby(["layer", "side"])[columns].mean().round(2)

# %% [markdown]
# Heads of one layer often differ. This is the parallel share of each head, on
# the query side.

# %%
queries = last[last.side == "query"]
queries.pivot(index="layer", columns="head", values="parallel_share").round(2)

# %% [markdown]
# ## Where to go from here
#
# - Write rows to a file with `path=`, to TensorBoard with `writer=`, or to
#   Weights & Biases with `run=`. The page on monitoring says how.
# - Scale a part, and see what changes: `scales={"transformer.h.0.*": (2.0,
#   1.0)}`.
# - Ask whether that helps in the notebook *Does it help mine?*.
