"""Training under the Trainers of transformers and Lightning, and in a loop with Accelerate.

Each run is compared in its parameters with a plain loop over the same batches, in which oracle
hooks take the place of spanopt, and one that resumes from a checkpoint with one that never stopped.
"""

import copy
import inspect
import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import compare
import families
import lightning
import pytest
import torch
import transformers as hf
from accelerate import Accelerator, skip_first_batches
from compare import values_of as parameters
from families import FAMILIES
from lightning.pytorch.core.optimizer import LightningOptimizer
from models import Decoder, loss_of
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import spanopt.integrations.lightning
import spanopt.integrations.transformers
from spanopt import SpanScale, SpanScaledOptimizer, SpanScheduler, UnscaledLayerError, attach
from spanopt.integrations.run import Run
from spanopt.scale import resolve_scales
from spanopt.schedules import linear

assert_same = partial(compare.assert_same, rtol=1e-8, atol=1e-10)
assert_differ = partial(compare.assert_differ, by=1e-3)


ROOT = Path(__file__).parents[2]


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
        trainer = hf_trainer(model, text, folder, [callback, noting], **options)
        trainer.train(resume_from_checkpoint=resume)
        assert callback.hooks is None
        assert not spanopt_hooks(model)
    return noting.history


def spanopt_hooks(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if type(hook).__module__.startswith("spanopt")
    ]


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
        assert not spanopt_hooks(model)
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
        assert not spanopt_hooks(model)
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert spanopt_hooks(model)
        # The next run begins anew, with the schedule at its start.
        failing.on, trainer.optimizer = False, None
        model.load_state_dict(start)
        noting.history.clear()
        trainer.train()
        assert_same(noting.history[-1], gpt2_history["schedule"][-1])
        assert not spanopt_hooks(model)


def test_a_dropped_hf_callback_leaves_the_model_clean():
    model, callback = gpt2(), HFCallback(SCALES)
    callback.on_train_begin(None, hf.TrainerState(), hf.TrainerControl(), model=model)
    assert spanopt_hooks(model)
    del callback
    assert not spanopt_hooks(model)


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
            **(automatic if module.automatic_optimization else {}),
            **{"max_epochs": EPOCHS, **options},
        )


def pl_run(way, mode, model, text, folder, resume=None):
    """Train in one of three ways and return the parameters after each step."""
    module = Module(model, wrap=way == "optimizer", manual=mode == "manual")
    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1)
    callbacks = [saving]
    if way != "optimizer":
        callback = PLCallback(SCALES, half_of if way == "schedule" else None)
        callbacks.append(callback)
    trainer = pl_trainer(module, folder, callbacks)
    trainer.fit(module, DataLoader(text, batch_size=BATCH), ckpt_path=resume)
    if way != "optimizer":
        assert callback.hooks is None
        assert not spanopt_hooks(model)
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


def test_an_exception_in_a_lightning_run_leaves_no_hooks(text, tmp_path):
    class Failing(Module):
        def on_train_batch_end(self, outputs, batch, index):
            assert spanopt_hooks(self)
            raise KeyboardInterrupt if self.interrupted else OSError

    for interrupted, error in ((False, OSError), (True, SystemExit)):
        module = Failing(decoder())
        module.interrupted = interrupted
        trainer = pl_trainer(module, tmp_path, [PLCallback(SCALES)])
        with pytest.raises(error):
            trainer.fit(module, DataLoader(text, batch_size=BATCH))
        assert not spanopt_hooks(module)


@pytest.mark.parametrize("mode", ["automatic", "manual"])
@pytest.mark.parametrize("way", ["optimizer", "constant"])
def test_a_layer_that_was_not_seen_stops_a_lightning_run_before_anything_is_updated(
    way, mode, text, tmp_path
):
    class Skipping(Module):
        def on_train_batch_start(self, batch, index):
            if index == 2 * ACCUMULATE:
                self.before = parameters(self.model)
                self.model.blocks[1]["attn"].forward = lambda x: x

    module = Skipping(decoder(), way == "optimizer", mode == "manual")
    callbacks = [] if way == "optimizer" else [PLCallback(SCALES)]
    with pytest.raises(UnscaledLayerError, match=r"'(model\.)?blocks\.1\.attn'"):
        pl_trainer(module, tmp_path, callbacks).fit(module, DataLoader(text, batch_size=BATCH))
    assert_same(parameters(module.model), module.before)


def test_a_lightning_checkpoint_with_a_schedule_is_not_resumed_without(text, tmp_path):
    trainer = pl_trainer(module := Module(decoder()), tmp_path, [PLCallback(SCALES, half_of)])
    trainer.fit(module, loader := DataLoader(text, batch_size=BATCH))
    trainer.save_checkpoint(tmp_path / "end.ckpt")  # knows the state of the run that ended
    trainer = pl_trainer(module, tmp_path, [PLCallback(SCALES)], max_epochs=EPOCHS + 1)
    with pytest.raises(ValueError, match="pass schedule= again"):
        trainer.fit(module, loader, ckpt_path=tmp_path / "end.ckpt")
    assert not spanopt_hooks(module)


def test_a_lightning_checkpoint_that_was_validated_leaves_the_next_run_alone(text, tmp_path):
    class Validated(Module):
        def validation_step(self, batch, index):
            assert not spanopt_hooks(self)
            self.log("loss", decoder_loss(self.model, batch))

    module, loader = Validated(decoder()), DataLoader(text, batch_size=BATCH)
    callback = PLCallback({"*": (7.0, 7.0)})
    trainer = pl_trainer(module, tmp_path, [callback])
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    callback = PLCallback(SCALES)
    trainer = pl_trainer(module, tmp_path, [callback], limit_train_batches=2, limit_val_batches=1)
    trainer.validate(module, loader, ckpt_path=tmp_path / "end.ckpt")
    trainer.fit(module, loader)
    assert callback.state_dict()["span_groups"][0]["query"] == [*PAIRS["query"]]


def test_the_lightning_callback_takes_one_optimizer_and_says_what_to_do_with_more(text, tmp_path):
    class Two(Module):
        def configure_optimizers(self):
            return [AdamW(block.parameters()) for block in self.model.blocks]

    module = Two(decoder(), manual=True)
    with pytest.raises(ValueError, match="got 2: wrap each in a SpanScaledOptimizer"):
        pl_trainer(module, tmp_path, [PLCallback(SCALES)]).fit(module, DataLoader(text))


# The callbacks as code.


@pytest.mark.parametrize("cls", [HFCallback, PLCallback, Run])
def test_every_public_name_of_the_integrations_has_a_docstring_with_an_example(cls):
    members = [member for name, member in vars(cls).items() if not name.startswith("_")]
    for value in (cls, *filter(inspect.isfunction, members)):
        assert ">>> " in (inspect.getdoc(value) or ""), value
    assert all(inspect.getdoc(value) for value in members if isinstance(value, property))


@pytest.mark.parametrize("cls", [HFCallback, PLCallback])
def test_a_callback_takes_every_argument_of_attach(cls):
    of_attach = inspect.signature(attach).parameters
    own = inspect.signature(cls).parameters
    assert set(of_attach) - set(own) == {"model"}
    for name in set(of_attach) & set(own):
        assert own[name].default == of_attach[name].default, name


@pytest.mark.parametrize("cls", [HFCallback, PLCallback])
def test_a_callback_refuses_an_argument_that_it_does_not_have(cls):
    with pytest.raises(TypeError, match=r"no argument 'projections'; its name is now qk_modules"):
        cls(SCALES, projections={})


@pytest.mark.parametrize("scales", [(2.0, 1.0), SpanScale(2.0, 1.0), {"*": (2.0, 1.0)}, None])
def test_a_trainers_callback_keeps_scales_in_every_form(scales):
    kept = json.loads(json.dumps(HFCallback(scales).state()))["args"]["scales"]
    assert resolve_scales(kept, ["a"]) == resolve_scales(scales, ["a"])


def test_a_trainers_callback_scales_by_the_setup_that_it_was_given(tmp_path):
    callback = HFCallback(SCALES, projection="radial", preserve_norm=True)
    kept = json.loads(json.dumps(callback.state()))["args"]
    assert (kept["projection"], kept["preserve_norm"]) == ("radial", True)
    again = HFCallback(**kept)
    assert again.state() == callback.state()

    def halved(grad, basis, other, *, ridge=None, mask=None):
        return grad / 2

    lost = HFCallback(
        **json.loads(json.dumps(HFCallback(SCALES, projection=halved).state()))["args"]
    )
    with pytest.raises(ValueError, match=r"no projection is named .*halved"):
        lost._run.begin(decoder(), steps=1)


EXAMPLES = {
    "accelerate_loop": (("4", "6"), "step 5: loss"),
    "hf_trainer": (("10", "12"), "checkpoint-10: loss"),
    "lightning_module": (("1", "2"), "step 40: loss"),
}


# All in one process, which imports the frameworks once.
RUN = """
import runpy, sys
import spanopt, spanopt.integrations
print({"transformers", "lightning", "accelerate"} & set(sys.modules))
for line in sys.argv[1:]:
    sys.argv = line.splitlines()
    print("==", sys.argv[1], flush=True)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """Run each example, and again from its checkpoint; return what came before and what of each."""
    folder = tmp_path_factory.mktemp("examples")
    lines = [
        "\n".join([str(ROOT / "examples" / f"{name}.py"), name, amount])
        for name, (amounts, _) in EXAMPLES.items()
        for amount in amounts
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", RUN, *lines]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300
    )
    assert run.returncode == 0, run.stderr
    first, *parts = run.stdout.split("== ")
    return first, {name: text for name, _, text in (part.partition("\n") for part in parts)}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_goes_on_from_its_checkpoint(name, printed):
    assert EXAMPLES[name][1] in printed[1][name]
    assert len((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 60


def test_importing_spanopt_imports_no_framework(printed):
    assert printed[0] == "set()\n"


def test_what_lightning_puts_before_the_wrapper_saves_loads_and_detaches_as_it():
    model = nn.MultiheadAttention(8, 2)
    optimizer = SpanScaledOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, SpanScale(2.0, 1.0)
    )
    front = LightningOptimizer(optimizer)
    fired = []
    optimizer.register_state_dict_post_hook(lambda optimizer, state: fired.append(optimizer))
    state = front.state_dict()
    assert state == optimizer.state_dict()
    assert [group["name"] for group in state["span_groups"]] == [""]
    assert len(fired) == 2
    front.load_state_dict(state)
    assert str(front) == repr(front) == repr(optimizer)
    assert copy.copy(front).param_groups is front.param_groups
    assert front.detach() is optimizer.optimizer
    assert "detached" in repr(optimizer)
    assert not model._forward_hooks
