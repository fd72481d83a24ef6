"""Train a small GPT-2 on real text with the Trainer of transformers, span-scaled by a callback.

    python examples/hf_trainer.py runs/hf 40

It takes a folder for checkpoints, where it goes on from the last one, and the number of steps.
"""

import os
import sys
from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from spanopt.integrations.transformers import SpanScaledCallback
from spanopt.schedules import linear

LENGTH = 64
HELD_OUT = 64


def main(folder: str = "runs/hf", steps: str = "40") -> None:
    """Train, and print the loss on windows that were not trained on."""
    set_seed(0)
    text = torch.tensor([*"\n".join(topics.values()).encode()])
    windows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    data = [{"input_ids": window, "labels": window} for window in windows]
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4,
                   bos_token_id=0, eos_token_id=0)
    )  # fmt: skip
    # The scales begin at the identity and reach (2, 1) after a tenth of the steps.
    callback = SpanScaledCallback({"*": (2.0, 1.0)}, schedule=lambda total: linear(total // 10))
    arguments = TrainingArguments(
        folder,
        max_steps=int(steps),
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        save_steps=10,
        logging_steps=10,
        report_to=[],
        disable_tqdm=True,
    )
    with callback:  # takes the hooks off the model, whatever happens
        trainer = Trainer(
            model, arguments, train_dataset=data[:-HELD_OUT], eval_dataset=data[-HELD_OUT:],
            callbacks=[callback],
        )  # fmt: skip
        last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        trainer.train(resume_from_checkpoint=last)
    print(f"from {last or 'the start'}: loss {trainer.evaluate()['eval_loss']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
