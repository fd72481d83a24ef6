"""Training under the Trainers of transformers and Lightning, and in a loop with Accelerate.

Each run is compared in its parameters with a plain loop over the same batches, in which oracle
hooks take the place of spanopt, and one that resumes from a checkpoint with one that never stopped.
"""

import families
import copy
import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import lightning
import pytest
import torch
import transformers as hf
from accelerate import Accelerator, skip_first_batches
from families import FAMILIES
from models import Decoder, ScoreAttention, loss_of
from test_attach import snapshot
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import spanopt.integrations.lightning
import spanopt.integrations.transformers
from spanopt import SpanScale, SpanScaledOptimizer, SpanScheduler, UnscaledLayerError, attach
from spanopt.integrations.attachment import Attachment
from spanopt.scheduler import linear

ROOT = Path(__file__).parent.parent
PAIRS = dict(families.SCALES)
SCALES = {"*": SpanScale(**PAIRS)}
SAMPLES, LENGTH, BATCH, ACCUMULATE, EPOCHS = 12, 9, 2, 2, 2
STEPS = EPOCHS * SAMPLES // (BATCH * ACCUMULATE)
LR, CLIP = 1e-2, 0.5
WARM_UP = 4


def warm_up(steps):
    assert steps == STEPS
    return linear(WARM_UP)


def pairs_at(step, schedule):
    """What the scales are at a step, written out."""
    strength = min(step / WARM_UP, 1.0) if schedule else 1.0
    return {side: tuple(1 + strength * (x - 1) for x in pair) for side, pair in PAIRS.items()}


def decay(step):
    return 1 - step / STEPS


@pytest.fixture(scope="module")
def text():
    return torch.randint(3, 11, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


def loop(model, text, loss, schedule=False):
    """Train with the oracle and return the parameters after each step."""
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    rates = LambdaLR(optimizer, decay)
    batches = [*text.split(BATCH)] * EPOCHS
    history, clipped = [], 0
    for step in range(STEPS):
        optimizer.zero_grad()
        for batch in batches[step * ACCUMULATE : (step + 1) * ACCUMULATE]:
            (loss(model, batch, pairs_at(step, schedule)) / ACCUMULATE).backward()
        clipped += torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP
        optimizer.step()
        rates.step()
        history.append(parameters(model))
    assert clipped  # or clipping is not tested
    return history


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-8, atol=1e-10)


def assert_differ(actual, expected):
    """Fail where plain training would pass for the real thing."""
    assert max((actual[name] - expected[name]).abs().max() for name in actual) > 1e-3


# The Trainer of transformers.

GPT2 = FAMILIES[0]
HFCallback = spanopt.integrations.transformers.SpanScaledCallback


def gpt2(seed=0):
    torch.manual_seed(seed)
    return GPT2.build("sdpa")


def sum_over_items(outputs, labels, num_items_in_batch=None):
    # The model's own loss is computed in float32.
    logits, targets = outputs.logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / (
        ACCUMULATE * BATCH * (LENGTH - 1)
    )


def hf_loss(model, batch, pairs):
    families.SCALES.update(pairs)
    return ACCUMULATE * sum_over_items(model(input_ids=batch), batch)


@pytest.fixture(scope="module")
def gpt2_history(text):
    """Return the parameters after each step with constant scales, with a schedule, and plain."""
    try:
        return {
            name: loop(
                gpt2() if name == "plain" else GPT2.reference(gpt2(), "sdpa"),
                text,
                hf_loss,
                schedule=name == "schedule",
            )
            for name in ("constant", "schedule", "plain")
        }
    finally:
        families.SCALES.update(PAIRS)


def hf_trainer(model, text, folder, callbacks=(), optimizers=(None, None), **options):
    options = {"save_strategy": "no", "max_grad_norm": CLIP, **options}
    arguments = hf.TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATE,
        num_train_epochs=EPOCHS,
        learning_rate=LR,
        weight_decay=0.0,
        lr_scheduler_type="linear",
        train_sampling_strategy="sequential",
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return hf.Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in text],
        compute_loss_func=sum_over_items,
        callbacks=[*callbacks],
        optimizers=optimizers,
    )


class Noting(hf.TrainerCallback):
    """Note the parameters after each step."""

    def __init__(self):
        self.history = []

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        self.history.append(parameters(model))


def hf_run(way, model, text, folder, resume=None, **options):
    """Train a model in one of two ways and return the parameters after each step."""
    noting = Noting()
    if way == "optimizer":
        bare = AdamW(model.parameters(), lr=LR, weight_decay=0.0)
        optimizer = SpanScaledOptimizer(bare, model, SCALES)
        trainer = hf_trainer(model, text, folder, [noting], (optimizer, None), **options)
        trainer.train(resume_from_checkpoint=resume)
        optimizer.detach()
    else:
        callback = HFCallback(SCALES, warm_up if way == "schedule" else None)
        before = snapshot(model)
        trainer = hf_trainer(model, text, folder, [callback, noting], **options)
        trainer.train(resume_from_checkpoint=resume)
        assert callback.hooks is None
        assert [*map(hooks_of, before.values())] == [*map(hooks_of, snapshot(model).values())]
    return noting.history


def hooks_of(module):
    return {name: value for name, value in module.items() if name.startswith("_forward")}


@pytest.mark.parametrize("way", ["optimizer", "constant", "schedule"])
def test_hf_trainer_trains_and_resumes_in_mid_epoch_as_a_loop_on_the_oracle_does(
    way, text, gpt2_history, tmp_path
):
    expected = gpt2_history["constant" if way == "optimizer" else way]
    assert_differ(expected[-1], gpt2_history["plain"][-1])
    history = hf_run(way, gpt2(), text, tmp_path, save_strategy="steps", save_steps=2)
    assert len(history) == STEPS
    for actual, step in zip(history, expected, strict=True):
        assert_same(actual, step)
    history = hf_run(way, gpt2(seed=7), text, tmp_path / "again", tmp_path / "checkpoint-2")
    assert len(history) == STEPS - 2
    for actual, step in zip(history, expected[2:], strict=True):
        assert_same(actual, step)


def test_hf_checkpoints_hold_scales_that_were_edited_in_the_run(text, tmp_path):
    class Editing(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                callback.hooks.groups[0].update(parallel=[1.0, 2.0, 3.0, 4.0], query=None)

    callback, seen = HFCallback(SCALES), []
    options = {"save_strategy": "steps", "save_steps": 2}
    hf_trainer(gpt2(), text, tmp_path, [callback, Editing()], **options).train()

    class Seeing(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(callback.hooks.groups[0]["parallel"])

    callback = HFCallback(SCALES)
    trainer = hf_trainer(gpt2(), text, tmp_path, [callback, Seeing()])
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert seen == [(1.0, 2.0, 3.0, 4.0)] * (STEPS - 4)
    seen.clear()
    trainer.train()  # and a run from the start has the scales that were asked for
    assert seen == [SCALES["*"].parallel] * STEPS


def test_an_hf_run_without_the_callback_resumes_with_it_and_saves_it(text, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    hf_trainer(gpt2(), text, tmp_path, **options).train()
    callback = HFCallback(SCALES, warm_up)
    trainer = hf_trainer(gpt2(), text, tmp_path, [callback], **options)
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    state = hf.TrainerState.load_from_json(tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json")
    saved = state.stateful_callbacks["SpanScaledCallback"]["attributes"]["saved"]
    assert saved["scheduler"]["step"] == STEPS - 2
    assert len(saved["span_groups"]) == 2


@pytest.mark.parametrize("way", ["constant", "schedule"])
def test_hf_callbacks_that_are_made_anew_keep_their_scales_but_need_their_schedule(
    way, text, gpt2_history, tmp_path
):
    schedule = warm_up if way == "schedule" else None
    options = {"save_strategy": "steps", "save_steps": 2}
    hf_trainer(gpt2(), text, tmp_path, [HFCallback(SCALES, schedule)], **options).train()
    noting, model = Noting(), gpt2()
    trainer = hf_trainer(
        model,
        text,
        tmp_path,
        [HFCallback(SCALES, schedule), noting],
        restore_callback_states_from_checkpoint=True,
    )
    if schedule is not None:
        with pytest.raises(ValueError, match="pass schedule= again"):
            trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
        with attach(model):  # no hooks were left
            return
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert_same(noting.history[-1], gpt2_history["constant"][-1])


def test_a_second_hf_callback_is_an_error(text, tmp_path):
    trainer = hf_trainer(gpt2(), text, tmp_path, [HFCallback(SCALES), HFCallback(SCALES)])
    with pytest.raises(ValueError, match="takes one SpanScaledCallback"):
        trainer.train()


@pytest.mark.parametrize("managed", [True, False], ids=["with", "without"])
def test_an_exception_in_an_hf_run_leaves_no_hooks_for_good(managed, text, gpt2_history, tmp_path):
    class Failing(hf.TrainerCallback):
        on = True

        def on_step_end(self, args, state, control, **kwargs):
            if self.on and state.global_step == 2:
                raise KeyboardInterrupt

    model, failing, noting = gpt2(), Failing(), Noting()
    start = copy.deepcopy(model.state_dict())
    callback = HFCallback(SCALES, warm_up)
    trainer = hf_trainer(model, text, tmp_path, [callback, failing, noting])
    if managed:
        with pytest.raises(KeyboardInterrupt), callback:
            trainer.train()
        attach(model).remove()
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        with pytest.raises(ValueError, match="scaled already"):
            attach(model)
        # The next run begins anew, with the schedule at its start.
        failing.on, trainer.optimizer = False, None
        model.load_state_dict(start)
        noting.history.clear()
        trainer.train()
        assert_same(noting.history[-1], gpt2_history["schedule"][-1])
        attach(model).remove()


def test_a_dropped_hf_callback_leaves_the_model_clean():
    model, callback = gpt2(), HFCallback(SCALES)
    callback.on_train_begin(None, hf.TrainerState(), hf.TrainerControl(), model=model)
    del callback
    attach(model).remove()


@pytest.mark.parametrize("way", ["optimizer", "constant"])
def test_a_layer_that_was_not_seen_stops_an_hf_run_before_anything_is_updated(way, text, tmp_path):
    class Skipping(hf.TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                self.before = parameters(model)
                model.transformer.h[1].attn.forward = lambda hidden, *args, **kwargs: (hidden, None)

    model, skipping = gpt2(), Skipping()
    if way == "optimizer":
        optimizer = SpanScaledOptimizer(AdamW(model.parameters(), lr=LR), model, SCALES)
        trainer = hf_trainer(model, text, tmp_path, [skipping], (optimizer, None))
    else:
        trainer = hf_trainer(model, text, tmp_path, [skipping, HFCallback(SCALES)])
    with pytest.raises(UnscaledLayerError, match=r"'transformer\.h\.1\.attn'"):
        trainer.train()
    assert_same(parameters(model), skipping.before)


def test_hf_gradient_checkpointing_changes_nothing(text, gpt2_history, tmp_path):
    history = hf_run("constant", gpt2(), text, tmp_path, gradient_checkpointing=True)
    assert_same(history[-1], gpt2_history["constant"][-1])


def test_hf_schedules_must_be_functions():
    with pytest.raises(TypeError, match="function of the number of optimizer steps"):
        HFCallback(schedule=linear(10)(0))


# Decoders of our own, in a loop with Accelerate and under Lightning's Trainer.


def decoder(seed=0):
    torch.manual_seed(seed)
    return Decoder().double()


def decoder_loss(model, batch, pairs=None):
    arguments = {} if pairs is None else {"reference": {f"blocks.{i}.attn": pairs for i in (0, 1)}}
    return loss_of(model(batch[:, :-1], **arguments), batch[:, 1:])


@pytest.fixture(scope="module")
def decoder_history(text):
    return {
        "constant": loop(decoder(), text, decoder_loss),
        "schedule": loop(decoder(), text, decoder_loss, schedule=True),
        "plain": loop(decoder(), text, lambda model, batch, pairs: decoder_loss(model, batch)),
    }


def accelerate_run(model, text, folder=None, save_at=None, resume_at=0, schedule=False):
    """Train in the loop of Accelerate's documentation; return the parameters after each step."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    optimizer = SpanScaledOptimizer(
        AdamW(model.parameters(), lr=LR, weight_decay=0.0), model, SCALES
    )
    scheduler = SpanScheduler(optimizer, warm_up(STEPS)) if schedule else None
    model, optimizer, loader, rates = accelerator.prepare(
        model, optimizer, DataLoader(text, batch_size=BATCH), LambdaLR(optimizer, decay)
    )
    if schedule:
        accelerator.register_for_checkpointing(scheduler)
    if resume_at:
        accelerator.load_state(folder)
    per_epoch = len(loader) // ACCUMULATE
    history = []
    for epoch in range(resume_at // per_epoch, EPOCHS):
        skipped = (resume_at - epoch * per_epoch) * ACCUMULATE
        batches = skip_first_batches(loader, skipped) if skipped > 0 else loader
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(decoder_loss(model, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            if schedule:
                scheduler.step()
            history.append(parameters(accelerator.unwrap_model(model)))
            if resume_at + len(history) == save_at:
                accelerator.save_state(folder)
    return history


@pytest.mark.parametrize("way", ["constant", "schedule"])
def test_accelerate_trains_and_resumes_in_mid_epoch_as_a_loop_on_the_oracle_does(
    way, text, decoder_history, tmp_path
):
    expected, schedule = decoder_history[way], way == "schedule"
    assert_differ(expected[-1], decoder_history["plain"][-1])
    history = accelerate_run(decoder(), text, tmp_path, save_at=2, schedule=schedule)
    again = accelerate_run(decoder(7), text, tmp_path, resume_at=2, schedule=schedule)
    assert (len(history), len(again)) == (STEPS, STEPS - 2)
    for actual, step in zip(history + again, expected + expected[2:], strict=True):
        assert_same(actual, step)


PLCallback = spanopt.integrations.lightning.SpanScaledCallback


class Module(lightning.LightningModule):
    """Train a decoder: ``wrap`` tells whether its optimizer is ours."""

    def __init__(self, model, wrap=False, manual=False):
        super().__init__()
        self.model, self.wrap = model, wrap
        self.automatic_optimization = not manual
        self.history = []

    def configure_optimizers(self):
        optimizer = AdamW(self.model.parameters(), lr=LR, weight_decay=0.0)
        if self.wrap:
            optimizer = SpanScaledOptimizer(optimizer, self.model, SCALES)
        rates = LambdaLR(optimizer, decay)
        return [optimizer], [{"scheduler": rates, "interval": "step"}]

    def training_step(self, batch, index):
        loss = decoder_loss(self.model, batch)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss / ACCUMULATE)
        if (index + 1) % ACCUMULATE == 0:
            self.clip_gradients(optimizer, CLIP, "norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()
        return None

    def on_train_batch_end(self, outputs, batch, index):
        if (index + 1) % ACCUMULATE == 0:
            self.history.append(parameters(self.model))


def pl_trainer(module, folder, callbacks=(), **options):
    automatic = {"accumulate_grad_batches": ACCUMULATE, "gradient_clip_val": CLIP}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lightning.Trainer(
            accelerator="cpu",
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=bool(callbacks),
            callbacks=[*callbacks],
            **{"max_epochs": EPOCHS, **(automatic if module.automatic_optimization else {})},
            **options,
        )


def pl_run(way, mode, model, text, folder, resume=None):
    """Train in one of three ways and return the parameters after each step."""
    module = Module(model, wrap=way == "optimizer", manual=mode == "manual")
    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1)
    callbacks = [saving]
    if way != "optimizer":
        callback = PLCallback(SCALES, half_of if way == "schedule" else None)
        callbacks.append(callback)
    before = snapshot(model)
    trainer = pl_trainer(module, folder, callbacks)
    trainer.fit(module, DataLoader(text, batch_size=BATCH), ckpt_path=resume)
    if way != "optimizer":
        assert callback.hooks is None
        assert [*map(hooks_of, before.values())] == [*map(hooks_of, snapshot(model).values())]
    return module.history


def half_of(steps):
    # Lightning counts batches where the module itself accumulates them.
    assert steps in (STEPS, STEPS * ACCUMULATE)
    return linear(WARM_UP)


@pytest.mark.parametrize("mode", ["automatic", "manual"])
@pytest.mark.parametrize("way", ["optimizer", "constant", "schedule"])
def test_lightning_trains_and_resumes_as_a_loop_on_the_oracle_does(
    way, mode, text, decoder_history, tmp_path
):
    expected = decoder_history["constant" if way == "optimizer" else way]
    assert_differ(expected[-1], decoder_history["plain"][-1])
    history = pl_run(way, mode, decoder(), text, tmp_path)
    (first, _) = sorted(tmp_path.glob("*.ckpt"))
    half = STEPS // EPOCHS
    again = pl_run(way, mode, decoder(7), text, tmp_path / "again", first)
    assert (len(history), len(again)) == (STEPS, STEPS - half)
    for actual, step in zip(history + again, expected + expected[half:], strict=True):
        assert_same(actual, step)
