"""The checkpoint of a run: written in one go, and read only if nothing in it has changed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from text_demo.errors import UserError, one_line
from text_demo.options import Config
from text_demo.texts import Data

__all__ = ["ARMS", "Record", "Run", "load_checkpoint", "save_checkpoint", "write_atomically"]

ARMS = ("plain", "span")
MAGIC = b"train_text checkpoint 1\n"


def both() -> dict[str, list[float]]:
    """Return an empty list for each arm."""
    return {name: [] for name in ARMS}


@dataclass
class Record:
    """What is kept of one seed: both validation curves, and the seconds of each step."""

    steps: list[int] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=both)
    seconds: dict[str, list[float]] = field(default_factory=both)


@dataclass
class Run:
    """The whole job: one record for every seed begun."""

    config: Config
    data: Data
    out: Path
    records: list[Record] = field(default_factory=list)

    def steps_done(self) -> int:
        """Return how many steps of each arm are behind, over all seeds."""
        return sum(record.steps[-1] for record in self.records)

    def identity(self) -> dict[str, Any]:
        """Return all that has to be the same when a run is resumed."""
        versions = {"torch": str(torch.__version__), "text (sha256)": self.data.digest}
        return asdict(self.config) | versions


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one go: whoever reads it finds the old content or the new, never half.

    Symbolic links are replaced, not followed.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # what a run that was killed has left
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def save_checkpoint(run: Run, states: Mapping[str, Any]) -> None:
    """Write everything that the rest of the run depends on, and a digest of it.

    Args:
        run: The run.
        states: By arm, all that its training depends on.
    """
    records = [asdict(record) for record in run.records]
    buffer = io.BytesIO()
    torch.save({"identity": run.identity(), "records": records, "arms": dict(states)}, buffer)
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest().encode()
    write_atomically(run.out / "checkpoint.pt", MAGIC + digest + b"\n" + content)


def load_checkpoint(run: Run) -> dict[str, Any] | None:
    """Read the checkpoint, fill in the records, and return the states of the arms.

    Returns:
        The states, ``None`` if there is no checkpoint.

    Raises:
        UserError: The checkpoint is damaged or belongs to another run.
    """
    path = run.out / "checkpoint.pt"
    if not os.path.lexists(path):
        return None
    saved = read_checkpoint(path)
    identity, wanted = saved["identity"], run.identity()
    differing = [key for key in wanted | identity if wanted.get(key) != identity.get(key)]
    if differing:
        listed = ", ".join(f"{k}: {identity.get(k)}, now {wanted.get(k)}" for k in differing)
        raise UserError(f"{path} belongs to another run ({listed}); leave out --resume to restart")
    try:
        run.records = [Record(**record) for record in saved["records"]]
        problem = fault(run, saved["arms"])
    except (AttributeError, KeyError, TypeError) as error:
        problem = one_line(error)
    if problem:
        raise UserError(f"{path} is not what a run writes: {problem}")
    states: dict[str, Any] = saved["arms"]
    return states


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint whose digest is right."""
    if path.is_symlink():
        raise UserError(f"cannot read {path}: it is a symbolic link, which is not followed")
    try:
        written = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    head, content = written[: len(MAGIC) + 65], written[len(MAGIC) + 65 :]
    if not head.startswith(MAGIC):
        raise UserError(f"cannot read {path}: it is no checkpoint of this script")
    if head[len(MAGIC) :] != hashlib.sha256(content).hexdigest().encode() + b"\n":
        raise UserError(f"cannot read {path}: it is damaged (its digest is another)")
    try:
        saved: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
        missing = {"identity", "records", "arms"} - set(saved)
    except Exception as error:  # content that was never a checkpoint can fail in many ways
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    if missing:
        raise UserError(f"cannot read {path}: it has no {', '.join(sorted(missing))}")
    return saved


def fault(run: Run, states: Any) -> str | None:
    """Say what is wrong with the records and the states of the arms, ``None`` if nothing is."""
    config = run.config
    if not 0 < len(run.records) <= config.seeds:
        return f"it has {len(run.records)} seeds"
    for seed, record in enumerate(run.records):
        steps = record.steps
        is_whole = seed < len(run.records) - 1
        if steps[:1] != [0] or steps != sorted(set(steps)) or steps[-1] > config.steps:
            return f"seed {seed} was evaluated at the steps {steps}"
        if is_whole and steps[-1] != config.steps:
            return f"seed {seed} ends at step {steps[-1]}"
        if any(len(record.losses.get(name, ())) != len(steps) for name in ARMS):
            return f"seed {seed} has not one loss for each of its {len(steps)} evaluations"
    if set(states) != set(ARMS):
        return f"its arms are {sorted(states)}"
    wrapped = {name: "span_groups" in states[name]["optimizer"] for name in ARMS}
    return None if wrapped == {"plain": False, "span": True} else "its arms are swapped"
