"""The monitor: it measures the gradients of attention at some steps, and gives the user rows."""

from __future__ import annotations

import importlib
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spanopt.lifetime import end, stop, teller
from spanopt.optimizer import SpanScaledOptimizer
from spanopt.picture import draw
from spanopt.reports import Reports
from spanopt.rows import read_rows
from spanopt.sample import Sample, unmeasured
from spanopt.scores_reading import reading_of

__all__ = ["SpanMonitor"]


class SpanMonitor:
    """Measure the gradients of Q and K at every scaled layer, at some of the optimizer steps.

    The monitor does not change the training, and none of its failures ends a training step. What it
    can't measure or write is noted in a row and in one warning. It costs nothing in steps that are
    not measured. In a measured step it also computes singular values and attention weights, and
    code that ``torch.compile`` has compiled runs eagerly. Keep the monitor in a variable, since it
    stops when it is dropped. Close it after the training.

    A row is about one layer, side and head, in this process's batch. If a step has several backward
    passes, a row has their average. Q and K are the two factors of the scores. Some layers have
    divided Q by sqrt(d) before. Under ``GradScaler``, gradients are multiplied by its scale.

    ``step``
        Number of the optimizer step, from 0.
    ``layer``, ``side``, ``head``
        Name of the layer; ``"query"`` or ``"key"``; number of the head, or ``None`` if heads are
        merged into the batch and can't be told apart.
    ``parallel_energy``, ``violation_energy``
        Squared norms of the parallel part and of the violation of the gradient before scaling,
        summed over the batch. The layer's ``projection`` says what is parallel.
    ``parallel_share``
        The parallel energy divided by the sum of both.
    ``chance_share``
        The parallel share of a gradient with a random direction: the dimension of the span divided
        by the number of tokens, d / N if N > d. ``None`` unless ``projection`` is ``"span"``.
    ``effective_rank``
        exp of the entropy of the singular values of Q (or K), which are first divided by their sum
        (Roy and Vetterli, 2007). It lies between 1 and d. Mean over the batch.
    ``condition``
        Largest singular value of Q (or K) divided by the smallest. Median over the batch.
    ``cosine``
        Cosine between the gradients before and after scaling.
    ``norm_before``, ``norm_after``
        Frobenius norm of the gradient before and after scaling.
    ``entropy``
        Entropy of a query's attention weights, in nats. Mean over queries, on the query side only.
        ``None`` if attention can't be seen (``qk_modules=``).
    ``dispersion`` and eight more
        Measures of the scores, with ``scores=True``, on the query side only. They tell whether
        attention to ``keys`` keys could pay: see :data:`spanopt.scores.SCORE_MEASURES` and
        :meth:`reading`.
    ``problem``
        ``None``, or why a value is missing, such as ``"condition is inf"``. Values are finite
        numbers or ``None``.

    Args:
        optimizer: A wrapped optimizer. The monitor follows its steps until :meth:`close`. Several
            monitors may measure one optimizer.
        every: Measure the first step, and then one in so many: a whole number, 100 by default.
        path: A JSONL file, to which each row is appended as one line of strict JSON. :meth:`read`
            reads it. By default there is none.
        writer: A ``torch.utils.tensorboard.SummaryWriter``, which gets means over heads. By default
            there is none.
        run: A run of Weights & Biases, as ``wandb.init`` returns it, which gets means over heads.
            By default there is none.
        start: Number of the first step, if training is resumed; 0 by default.
        scores: Whether attention scores are measured too; false by default.
        keys: How many keys focus would keep, for these measures: a whole number above 0, 8 by
            default.

    Attributes:
        rows: What was measured, as dicts. ``pandas.DataFrame`` takes them.

    Raises:
        TypeError: ``optimizer`` is not a :class:`~spanopt.SpanScaledOptimizer`.
        ValueError: ``every`` or ``keys`` is not a whole number above 0.
        OSError: ``path`` can't be written to.

    Example:
        >>> import torch
        >>> model = torch.nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = SpanScaledOptimizer(sgd, model, {"*": (2.0, 1.0)})
        >>> with SpanMonitor(optimizer, every=2) as monitor:
        ...     for _ in range(4):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(16, 3, 8)).pow(2).mean().backward()
        ...         optimizer.step()
        >>> [(row["step"], row["side"], row["head"]) for row in monitor.rows][:3]
        [(0, 'query', 0), (0, 'query', 1), (0, 'key', 0)]
        >>> len(monitor.rows)
        8
    """

    def __init__(
        self,
        optimizer: SpanScaledOptimizer,
        every: int = 100,
        *,
        path: str | Path | None = None,
        writer: Any = None,
        run: Any = None,
        start: int = 0,
        scores: bool = False,
        keys: int = 8,
    ) -> None:
        if not isinstance(optimizer, SpanScaledOptimizer):
            raise TypeError(
                "SpanMonitor measures a wrapped optimizer, a SpanScaledOptimizer, got "
                f"{type(optimizer).__name__}"
            )
        for name, number in (("every", every), ("keys", keys)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a whole number above 0, got {number!r}")
        self.rows: list[dict[str, Any]] = []
        self._every = every
        self._keys = keys
        self._scores = scores
        self._reports = Reports(path, writer, run)
        self._step = start
        self._next: float = start
        self._sample: Sample | None = None
        self._of = type(optimizer.optimizer).__name__
        # Neither the hook nor the finalizer keeps the monitor or the optimizer alive.
        self._stops: list[Callable[[], None]] = []
        handle = optimizer.register_step_post_hook(teller(weakref.ref(self)))
        self._end = weakref.finalize(self, end, handle, self._stops, self.rows)
        self._end.atexit = False
        self._arm(optimizer)

    def _arm(self, optimizer: SpanScaledOptimizer) -> None:
        self._sample = Sample(self._keys if self._scores else None)
        self._stops.append(optimizer.hooks.watch(self._sample))

    def _disarm(self) -> None:
        self._sample = None
        while self._stops:
            self._stops.pop()()

    def _after_step(self, optimizer: SpanScaledOptimizer) -> None:
        step, self._step = self._step, self._step + 1
        if self._sample is not None:
            if not optimizer.hooks.groups:
                self.close()  # detached: there is nothing to measure
                return
            rows = self._measured(step, [site.name for site in optimizer.hooks.sites])
            if not rows:
                return  # there was no backward pass yet
            self._disarm()
            self.rows += rows
            self._reports.send(step, rows)
            self._next = step + self._every
        if self._step >= self._next:
            self._arm(optimizer)

    def _measured(self, step: int, layers: list[str]) -> list[dict[str, Any]]:
        """Return the rows of a step, and warn of the first row with an unusual problem."""
        assert self._sample is not None
        try:
            rows = self._sample.rows(step, layers)
        except Exception as error:
            rows = unmeasured(step, layers, error)
        usual = (None, "condition is inf")  # Q or K has less than full rank
        problem = next((row for row in rows if row["problem"] not in usual), None)
        if problem is not None:
            self._reports.warn(
                "measuring",
                f"layer {problem['layer']!r} was not fully measured in step {step}: "
                f"{problem['problem']}. Rows say so under 'problem'",
            )
        return rows

    def to_pandas(self) -> Any:
        """Return :attr:`rows` as a ``pandas.DataFrame``.

        Raises:
            ImportError: pandas is not installed.

        Example:
            >>> import torch
            >>> model = torch.nn.MultiheadAttention(8, num_heads=2)
            >>> sgd = torch.optim.SGD(model.parameters())
            >>> optimizer = SpanScaledOptimizer(sgd, model, {"*": (2.0, 1.0)})
            >>> x = torch.randn(16, 3, 8)
            >>> monitor = SpanMonitor(optimizer)
            >>> model(x, x, x)[0].pow(2).mean().backward()
            >>> optimizer.step()
            >>> table = monitor.to_pandas()
            >>> table.groupby("side").parallel_share.mean().index.to_list()
            ['key', 'query']
            >>> monitor.close()
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError(
                "SpanMonitor.to_pandas() needs pandas: pip install pandas, or install spanopt with "
                "its extra: pip install '.[monitor]' in a clone"
            ) from error
        return pandas.DataFrame(self.rows)

    def plot(self, column: str = "parallel_share", path: str | Path | None = None) -> Any:
        """Draw a column: for each side, a heatmap of layers by steps, and a line for each layer.

        Args:
            column: One of the measured columns, ``"parallel_share"`` by default.
            path: Where to save the picture; the suffix says the format. By default nowhere.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: There is no such column, or nothing has been measured in it yet.

        Example:
            >>> import torch
            >>> model = torch.nn.MultiheadAttention(8, num_heads=2)
            >>> sgd = torch.optim.SGD(model.parameters())
            >>> optimizer = SpanScaledOptimizer(sgd, model, {"*": (2.0, 1.0)})
            >>> x = torch.randn(16, 3, 8)
            >>> monitor = SpanMonitor(optimizer)
            >>> model(x, x, x)[0].pow(2).mean().backward()
            >>> optimizer.step()
            >>> figure = monitor.plot()  # monitor.plot(path="shares.png") saves it too
            >>> figure = monitor.plot("effective_rank")
            >>> monitor.close()
        """
        if not self.rows:
            raise ValueError("nothing has been measured yet: take an optimizer step first")
        figure = draw(self.rows, column)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def reading(self) -> str:
        """Say in which layers attention to fewer keys could pay, from the last measured step.

        For rows from a file, call :func:`spanopt.scores_reading.reading_of`.

        Returns:
            A sentence or two.

        Raises:
            ValueError: No scores have been measured.

        Example:
            >>> import torch
            >>> model = torch.nn.MultiheadAttention(8, num_heads=2, batch_first=True)
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> optimizer = SpanScaledOptimizer(sgd, model, (2.0, 1.0))
            >>> x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
            >>> with SpanMonitor(optimizer, scores=True) as monitor:
            ...     model(x, x, x)[0].pow(2).sum().backward()
            ...     optimizer.step()
            >>> print(monitor.reading())
            step 0: focus on 8 keys ...
        """
        return reading_of(self.rows, self._keys)

    @staticmethod
    def read(path: str | Path) -> list[dict[str, Any]]:
        """Read the rows that a monitor has written to its ``path``.

        Args:
            path: The JSONL file.

        Returns:
            The rows. A line that a crash left unfinished is left out, and a warning names it.

        Raises:
            OSError: The file can't be read.

        Example:
            >>> import pathlib, tempfile
            >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.jsonl"
            >>> _ = path.write_text('{"step": 0, "layer": "attn"}\\n')
            >>> SpanMonitor.read(path)
            [{'step': 0, 'layer': 'attn'}]
        """
        return read_rows(path)

    def close(self) -> None:
        """Stop measuring, and keep the rows. Calling it twice is harmless.

        Example:
            >>> import torch
            >>> model = torch.nn.MultiheadAttention(8, num_heads=2)
            >>> sgd = torch.optim.SGD(model.parameters())
            >>> optimizer = SpanScaledOptimizer(sgd, model, {"*": (2.0, 1.0)})
            >>> x = torch.randn(16, 3, 8)
            >>> monitor = SpanMonitor(optimizer)
            >>> model(x, x, x)[0].pow(2).mean().backward()
            >>> optimizer.step()
            >>> monitor.close()  # on leaving a with block it is closed too
            >>> len(monitor.rows)
            4
        """
        self._next = math.inf
        self._sample = None
        ended = self._end.detach()
        if ended is None:
            return
        _, _, (handle, stops, _), _ = ended
        stop(handle, stops)
        self._reports.close()

    def __enter__(self) -> SpanMonitor:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"from step {self._next}" if self._end.alive else "closed"
        return (
            f"{type(self).__name__}(of {self._of}, every={self._every}, {state}, "
            f"{len(self.rows)} rows)"
        )
