# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Tutorial: train, watch, compare
#
# In ten minutes you train a small transformer with scaled gradients, look at
# these gradients, and find out whether the scaling helped. Everything runs on
# a CPU in seconds. The outputs on this page come from running it, each time
# the site is built.
#
# You need `pip install ".[monitor]"` in a clone of the repository.

# %% [markdown]
# ## 1. A model and a task
#
# Nothing here knows of spanopt. A sequence shows 16 keys with a value each,
# and then asks for the value of one key. One answer in five is random, as real
# data are never quite predictable. Without attention the task is impossible.

# %%
import torch
from torch import nn

KEYS, VALUES, WIDTH = 16, 8, 32
NOTHING = VALUES  # the value that is shown beside the key that is asked for


def draw(count, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)
    values = torch.randint(VALUES, (count, KEYS), generator=generator)
    asked = torch.randint(KEYS, (count, 1), generator=generator)
    keys = torch.cat((keys, keys.gather(1, asked)), 1)
    shown = nn.functional.pad(values, (0, 1), value=NOTHING)
    answers = values.gather(1, asked).squeeze(1)
    noise = torch.randint(VALUES, (count,), generator=generator)
    is_noise = torch.rand(count, generator=generator) < 0.2
    return keys, shown, torch.where(is_noise, noise, answers)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.keys = nn.Embedding(KEYS, WIDTH)
        self.values = nn.Embedding(VALUES + 1, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, dim_feedforward=64, dropout=0.0, batch_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, 2, enable_nested_tensor=False
        )
        self.answer = nn.Linear(WIDTH, VALUES)

    def loss(self, keys, shown, answers):
        x = self.layers(self.keys(keys) + self.values(shown))
        return nn.functional.cross_entropy(self.answer(x[:, -1]), answers)


# %% [markdown]
# ## 2. Find the attention layers
#
# spanopt finds layers by what they do. The names are the ones of
# `model.named_modules()`.

# %%
from spanopt import find_attention

torch.manual_seed(0)
model = Model()
for site in find_attention(model):
    print(site)

# %% [markdown]
# ## 3. Wrap the optimizer
#
# This is the only change to a training script. `parallel=2` doubles the part
# of each gradient that lies in the span; `violation=1` leaves the rest as it
# is. Printing the optimizer shows what was decided for each layer.

# %%
from spanopt import SpanScale, SpanScaledOptimizer

optimizer = SpanScaledOptimizer(
    torch.optim.AdamW(model.parameters(), lr=1e-2),
    model,
    scales={"*": SpanScale(parallel=2.0, violation=1.0)},
)
optimizer

# %% [markdown]
# ## 4. Train, and watch
#
# The loop is an ordinary one. The monitor measures the first step and every
# tenth after it.

# %%
from spanopt import SpanMonitor

monitor = SpanMonitor(optimizer, every=10)
for step in range(100):
    loss = model.loss(*draw(64, seed=step))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 25 == 0:
        print(f"step {step:3}  loss {loss.item():.3f}")

# %%
monitor.plot()

# %% [markdown]
# Left: one row for each layer, one column for each measured step. Right: the
# same as lines. The dotted line is the share that a gradient of random
# direction would have: 8 dimensions of 17 tokens.
#
# The cosine says how far scaling turns the gradient. At 1 it would only
# change the length.

# %%
monitor.plot("cosine")

# %% [markdown]
# ## 5. Change the scales while training
#
# `span_groups` has one dict for each layer, as `param_groups` has one for
# each group. An edit acts from the next forward pass on.

# %%
for group in optimizer.span_groups:
    if group["name"] == "layers.layers.1.self_attn":
        group["parallel"] = 1.0
print(optimizer.hooks)

# %% [markdown]
# ## 6. Save and go on
#
# The state dict is the wrapped optimizer's, with the scales added. `detach`
# takes everything off the model again, and the bare optimizer reads the same
# checkpoint.

# %%
monitor.close()
state = optimizer.state_dict()
print(sorted(state))
bare = optimizer.detach()
bare.load_state_dict(state)
print(type(bare).__name__)

# %% [markdown]
# ## 7. Compare
#
# Did it help? One run cannot tell. So train pairs: for each seed once plain
# and once scaled, from the same weights and on the same batches. The seed
# decides both.


# %%
def train(seed, scales):
    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if scales is not None:
        optimizer = SpanScaledOptimizer(optimizer, model, scales)
    for step in range(60):
        loss = model.loss(*draw(64, seed=1000 * seed + step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model.loss(*draw(1024, seed=10**6)).item()  # unseen


changes = []
for seed in range(1, 5):
    plain, scaled = train(seed, None), train(seed, (2.0, 1.0))
    changes.append(100 * (scaled / plain - 1))
    print(
        f"seed {seed}: plain {plain:.4f}, scaled {scaled:.4f}, "
        f"change {changes[-1]:+.2f} %"
    )
changes = torch.tensor(changes)
print(
    f"mean {changes.mean():+.2f} %, "
    f"standard deviation over seeds {changes.std():.2f} %"
)

# %% [markdown]
# Is that a change? With four pairs, a t-test at 5 % asks for a mean of more
# than 1.6 times the standard deviation. Even a clear change may come from
# amplification alone, or from a learning rate that does not suit one of the
# two.
#
# `spanopt.compare` takes care of all that. It tunes the rate for each arm,
# adds controls, and says in words what follows. The notebook *Does it help
# mine?* shows it on this task.
