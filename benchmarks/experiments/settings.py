"""The comparison of (2, 1) with plain in other settings: subwords, heads, optimizers, tasks."""

from __future__ import annotations

from dataclasses import replace

from harness.experiment import Experiment
from harness.trial import Trial

from experiments.base import HALF, LRS, at_plains_rate, elsewhere, scaled

__all__ = [
    "HEAD_DIMS",
    "LENGTHS",
    "MUON_CONFIRMATION",
    "OPTIMIZERS",
    "PROTOTYPES",
    "SETTINGS",
    "SIZES",
    "SUBWORDS",
    "TASKS",
]

SUBWORDS = elsewhere(
    "subwords",
    "Does it help on subwords (BPE, 1,024 of them)?",
    replace(HALF, task="subwords"),
    LRS,
    seeds=10,
)
# The prototype's own recipe, at the rate that was plain's best there and at half of it.
PROTOTYPE_BASE = Trial(
    model="learned", lr_schedule="constant", layers=3, width=96, heads=3, batch=16
)
PROTOTYPES = [
    Experiment(
        f"learned-positions-{lr:g}",
        "Does it help without a learning-rate schedule, with learned positions and tied weights?",
        arms={
            "plain": PROTOTYPE_BASE,
            "(2, 1)": scaled(2, 1, PROTOTYPE_BASE),
            "uniform (2, 2)": scaled(2, 2, PROTOTYPE_BASE),
        },
        baseline="plain",
        lrs=(lr,),
        seeds=tuple(range(seeds)),
    )
    for lr, seeds in ((4e-3, 5), (2e-3, 3))
]

HEAD_DIMS = [
    elsewhere(
        f"head-dim-{d}",
        f"Does it help with heads of dimension {d}?",
        replace(HALF, width=128, heads=128 // d, batch=4),
        LRS[:3],
        seeds=6,
        control=False,
    )
    for d in (8, 16, 32, 64, 128)
]
LENGTHS = [
    elsewhere(
        f"length-{n}",
        f"Does it help in sequences of {n} tokens, with one head of dimension 64?",
        replace(HALF, length=n, batch=1024 // n, heads=1),
        control=False,
    )
    for n in (32, 64, 128, 256, 512)
]
OPTIMIZER_LRS = {
    "SGD": (0.25, 0.5, 1.0, 2.0),
    "Muon": (1e-2, 2e-2, 4e-2),
    "Lamb": (8e-3, 16e-3, 32e-3),
    "AdaBelief": (8e-3, 16e-3, 32e-3),
    "RAdam": (8e-3, 16e-3, 32e-3),
}
OPTIMIZERS = [
    elsewhere(
        f"optimizer-{name.lower()}",
        f"Does it help {name}?",
        replace(HALF, optimizer=name),
        lrs,
    )
    for name, lrs in OPTIMIZER_LRS.items()
]
# Among these, uniform amplification looked promising with Muon: again, on seeds that took no part,
# with plain's rate tuned on four, and by which way it acts.
MUON = replace(HALF, optimizer="Muon")
MUON_CONFIRMATION = at_plains_rate(
    "muon-confirmation",
    "Does what looked promising with Muon hold on fresh seeds, and by which way does it act?",
    {
        "plain": MUON,
        "(2, 1)": scaled(2, 1, MUON),
        "uniform (2, 2)": scaled(2, 2, MUON),
        "uniform (2, 2) to the weights only": scaled(2, 2, MUON, path="weights"),
        "uniform (2, 2) to the inputs only": scaled(2, 2, MUON, path="inputs"),
    },
    lrs=OPTIMIZER_LRS["Muon"],
    seeds=tuple(range(100, 110)),
)
TASKS = [
    elsewhere(
        "masked",
        "Does it help an encoder that fills masks?",
        replace(HALF, task="masked"),
    ),
    elsewhere(
        "sequence-to-sequence",
        "Does it help nn.Transformer restore vowels?",
        replace(HALF, task="sequence-to-sequence", model="learned", length=64),
        (1e-3, 2e-3, 4e-3),
    ),
    elsewhere(
        "digits",
        "Does it help a vision transformer read digits?",
        replace(HALF, task="digits", model="learned", heads=8, length=17, batch=64),
        (2e-3, 4e-3, 8e-3),
    ),
    elsewhere(
        "fine-tuning",
        "Does it help fine-tuning?",
        replace(HALF, task="fine-tuning"),
        (1e-3, 2e-3, 4e-3),
    ),
]
SIZES = [
    elsewhere(
        f"size-{layers}x{width}",
        f"Does it help a decoder of {layers} layers and width {width}?",
        replace(HALF, layers=layers, width=width, heads=width // 32),
        LRS[:3],
        seeds=6,
        control=False,
    )
    for layers, width in ((3, 96), (4, 128))
]

# The comparisons of (2, 1) with plain in other settings than the first.
SETTINGS = [SUBWORDS, *HEAD_DIMS, *LENGTHS, *OPTIMIZERS, *TASKS, *SIZES]
