# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Does it help mine?
#
# A single run with scaled gradients and a single run without say almost
# nothing: two runs with different seeds differ by more. This notebook trains
# a model many times, with and without, and reads the answer from the pairs.
# Put your own training in the place of `train`.
#
# It needs the extra `compare`. The model here is tiny, so that the whole
# notebook takes seconds.

# %%
import torch
from spanopt.compare import compare

# %% [markdown]
# ## One function that trains once
#
# `train` gets a seed and `wrap`. Everything random has to come from the seed:
# the weights and the batches. `wrap` goes around the optimizer, and puts the
# scales of the current arm on it, or none. What `train` returns is compared.
#
# The task: a sequence shows 16 keys with a value each, and then asks for the
# value of one key. One answer in five is random, as real data are never quite
# predictable. Without attention the task is impossible.

# %%
KEYS, VALUES, WIDTH = 16, 8, 32
NOTHING = VALUES  # the value that is shown beside the key that is asked for


def batch(generator):
    keys = torch.rand(64, KEYS, generator=generator).argsort(1)
    values = torch.randint(VALUES, (64, KEYS), generator=generator)
    asked = torch.randint(KEYS, (64, 1), generator=generator)
    keys = torch.cat((keys, keys.gather(1, asked)), 1)
    shown = torch.nn.functional.pad(values, (0, 1), value=NOTHING)
    answers = values.gather(1, asked).squeeze(1)
    noise = torch.randint(VALUES, (64,), generator=generator)
    return (
        keys,
        shown,
        torch.where(torch.rand(64, generator=generator) < 0.2, noise, answers),
    )


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.keys = torch.nn.Embedding(KEYS, WIDTH)
        self.values = torch.nn.Embedding(VALUES + 1, WIDTH)
        self.attention = torch.nn.MultiheadAttention(
            WIDTH, num_heads=4, batch_first=True
        )
        self.answer = torch.nn.Linear(WIDTH, VALUES)

    def loss(self, keys, shown, answers):
        x = self.keys(keys) + self.values(shown)
        x = x + self.attention(x, x, x)[0]
        return torch.nn.functional.cross_entropy(self.answer(x[:, -1]), answers)


def train(seed, wrap, lr=1.6e-2):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Model()
    adamw = torch.optim.AdamW(model.parameters(), lr=lr)
    optimizer = wrap(adamw, model)  # the only new line
    for _ in range(50):
        optimizer.zero_grad()
        model.loss(*batch(generator)).backward()
        optimizer.step()
    unseen = torch.Generator().manual_seed(10**6)  # the same for every arm
    with torch.no_grad():
        losses = [model.loss(*batch(unseen)).item() for _ in range(16)]
    return sum(losses) / len(losses)


# %% [markdown]
# ## Ask
#
# One arm is asked for: the parallel part twice as large. The controls come
# without asking, among them *uniform*, which doubles everything. `tune`
# chooses the learning rate for each arm by itself, on seeds that take no part
# in the comparison.

# %%
result = compare(
    train,
    arms={"(2, 1)": (2, 1)},
    seeds=6,
    tune={"lr": [8e-3, 1.6e-2, 3.2e-2]},
    margin=2.0,  # a change of less than 2 % is of no interest here
    progress=False,
)
print(result.table())

# %% [markdown]
# ## Read it
#
# `print(result)` shows the table and then these sentences.

# %%
import textwrap

for sentence in result.readings:
    print(textwrap.fill(sentence, 72), end="\n\n")

# %% [markdown]
# - *plain* is what everything is compared with. A change below 0 is a lower
#   loss.
# - *near-null* changes nothing worth mentioning. What it shows is chance.
# - *frozen Q and K* says whether attention matters at all. If it does not,
#   nothing can be learned here.
# - If *uniform* does as much as your arm, amplification is what helped, and
#   not the split.
#
# An interval that contains 0 is no evidence for either side. The sentences say
# what may be concluded, and how many more seeds would be needed.

# %%
result.plot()

# %% [markdown]
# ## With your own model
#
# - Use ten seeds or more, and as many steps as you train in earnest, if you
#   can afford them.
# - `out="runs/mine"` keeps every finished run. The same call goes on where it
#   was interrupted.
# - `until=0.3` adds seeds until every interval is narrower than 0.3 %, with
#   intervals that stay valid.
# - `workers=4` trains in four processes. Then `train` has to be in a module
#   of its own.
#
# The page *Does it help my model?* has the rest, with recipes for the
# `Trainer` of transformers, Lightning and Accelerate.
