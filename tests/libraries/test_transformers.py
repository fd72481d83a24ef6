"""Training models of the transformers library, against references that know nothing of spanopt."""

import copy

import pytest
import torch
from compare import existing_gradients as gradients
from compare import largest_error
from families import FAMILIES, VOCABULARY, pad, ragged, wrap
from torch.nn import functional as F

CASES = [
    pytest.param(family, attention, id=f"{family.name}-{attention}")
    for family in FAMILIES
    for attention in family.attentions
]


# In Mistral and Gemma 2 padding goes the way that it goes in Llama.
ALIKE = {"Mistral", "Gemma 2"}
PADDED = [
    pytest.param(
        family,
        attention,
        side,
        id=f"{family.name}-{attention}-{side}",
        marks=[pytest.mark.long] if family.name in ALIKE else [],
    )
    for family in FAMILIES
    if family.name in {"GPT-2", "Llama", "BERT", "ModernBERT", "DeBERTa-v2", *ALIKE}
    for attention in family.attentions
    for side in ("right", "left")
]


# BART counts positions from the left, padding included, so that padding there changes the model.
PADDED_ENCODER = [
    pytest.param(family, attention, side, id=f"{family.name}-{attention}-{side}")
    for family in FAMILIES
    for side in {"T5": ("right", "left"), "BART": ("right",)}.get(family.name, ())
    for attention in family.attentions
]


def tensors(outputs):
    """Every tensor of a model's output by name, except those of its cache."""
    found = {}
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif name.endswith("_output"):
            found.update({f"{name}.{inner}": x for inner, x in tensors(value).items()})
    return found


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_five_steps_on_the_gradients_of_the_reference(family, attention, record_property):
    model, inputs = family.build(attention), family.inputs()
    bare, reference = copy.deepcopy(model), family.reference(model, attention)
    suffixes = tuple(f".{name}" for name in family.projections)
    projections = [n for n, _ in model.named_parameters() if n.endswith(suffixes)]
    layers = family.layers(model.config)
    assert len(projections) == layers * len(family.projections)
    optimizer = wrap(model)
    error = 0.0
    for _ in range(5):
        for copied in (bare, reference):
            copied.load_state_dict(model.state_dict())
        outputs, unscaled_outputs = model(**inputs), bare(**inputs)
        before, after = tensors(unscaled_outputs), tensors(outputs)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert outputs.loss.isfinite()
        actual = gradients(model, outputs.loss)
        unscaled = gradients(bare, unscaled_outputs.loss)
        expected = gradients(reference, reference(**inputs).loss)
        error = max(error, largest_error(actual, expected))
        for name in projections:
            assert actual[name].abs().max() > 1e-6, name
            assert largest_error({name: unscaled[name]}, {name: actual[name]}) > 0.1, name
        optimizer.step()
    assert error < 1e-9
    sites = [site for site in optimizer.hooks.sites if site.tap is not None]
    assert len(sites) == layers
    record_property("library", "transformers")
    record_property("model", family.name)
    record_property("class", type(model).__name__)
    record_property("attention", attention)
    record_property("taps", ",".join(sorted({site.tap for site in sites})))
    record_property("layers", layers)
    record_property("error", error)


def total_loss(model, targets, real=None, **inputs):
    """Summed over the real tokens."""
    logits = model(**inputs).logits
    real = torch.ones_like(targets) if real is None else real
    return F.cross_entropy(logits[real.bool()], targets[real.bool()], reduction="sum")


@pytest.mark.parametrize(("family", "attention", "side"), PADDED)
def test_sequences_in_a_padded_batch_have_the_gradients_they_have_alone(family, attention, side):
    model, rows, tolerance = family.build(attention), ragged(), 1e-9
    if attention == "eager" and family.rounds:
        # In float64 the rows of padding would be -inf in the float32 softmax, and then NaN.
        model, tolerance = model.float(), 1e-4
    text, mask = pad(rows, side)
    inputs = {"input_ids": text, "attention_mask": mask}
    if side == "left":
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)

    def together():
        return total_loss(model, text, mask, **inputs)

    def alone():
        return sum(total_loss(model, row[None], input_ids=row[None]) for row in rows)

    error = largest_error(gradients(model, together()), gradients(model, alone()))
    assert error < tolerance
    optimizer = wrap(model)
    error = largest_error(gradients(model, together()), gradients(model, alone()))
    assert error < tolerance
    assert not optimizer.hooks.unseen()


@pytest.mark.parametrize(("family", "attention", "side"), PADDED + PADDED_ENCODER)
def test_one_padded_sequence_has_the_gradients_it_has_alone(family, attention, side):
    model, (row, *_), tolerance = family.build(attention), ragged(), 1e-9
    if attention == "eager" and family.rounds:
        model, tolerance = model.float(), 1e-4
    text, mask = pad([row], side, length=15)
    inputs, alone = {"input_ids": text, "attention_mask": mask}, {"input_ids": row[None]}
    if model.config.is_encoder_decoder:
        targets, real = torch.randint(3, VOCABULARY, (1, 13)), None
        inputs["decoder_input_ids"] = alone["decoder_input_ids"] = targets
    else:
        targets, real = text, mask
        if side == "left":
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    own = targets if real is None else row[None]
    optimizer = wrap(model)
    actual = gradients(model, total_loss(model, targets, real, **inputs))
    assert largest_error(actual, gradients(model, total_loss(model, own, **alone))) < tolerance
    assert not optimizer.hooks.unseen()


@pytest.mark.parametrize("length", [pytest.param(10, marks=pytest.mark.long), 12])
@pytest.mark.parametrize(("family", "attention", "side"), PADDED_ENCODER)
def test_padding_of_the_encoder_is_not_taken_for_that_of_the_decoder(
    family, attention, side, length
):
    # At length 12 queries and keys of the cross-attention are equally many.
    model, rows = family.build(attention), ragged()
    text, mask = pad(rows, side)
    targets = torch.randint(3, VOCABULARY, (len(rows), length))

    def together():
        inputs = {"input_ids": text, "attention_mask": mask, "decoder_input_ids": targets}
        return total_loss(model, targets, **inputs)

    def alone():
        return sum(
            total_loss(model, target[None], input_ids=row[None], decoder_input_ids=target[None])
            for row, target in zip(rows, targets, strict=True)
        )

    error = largest_error(gradients(model, together()), gradients(model, alone()))
    assert error < 1e-9
    optimizer = wrap(model)
    error = largest_error(gradients(model, together()), gradients(model, alone()))
    assert error < 1e-9
    assert not optimizer.hooks.unseen()
