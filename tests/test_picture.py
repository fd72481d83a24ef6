"""The picture shows each column by layer and step."""

import numpy as np
import pytest
import torch
from monitored import decoder, train

from spanopt import SpanMonitor, SpanScale, SpanScaledOptimizer
from spanopt.measures import MEASURES


def test_the_picture_is_labelled(tmp_path):
    pytest.importorskip("matplotlib")
    _, monitor = train(decoder(), True)
    figure = monitor.plot(path=tmp_path / "shares.png")
    assert (tmp_path / "shares.png").stat().st_size > 10_000
    layers = list(dict.fromkeys(row["layer"] for row in monitor.rows))
    heatmap, lines = figure.axes[:2]
    assert [label.get_text() for label in heatmap.get_yticklabels()] == layers
    assert heatmap.get_images()[0].get_array().shape == (len(layers), 3)
    for i, layer in enumerate(layers):
        rows = [r for r in monitor.rows if (r["layer"], r["side"]) == (layer, "query")]
        shares = [r["parallel_share"] for r in rows if r["step"] == 2]
        assert lines.get_lines()[i].get_ydata()[1] == pytest.approx(np.mean(shares))
    assert lines.get_ylabel() == "parallel share"
    assert lines.get_xlabel() == heatmap.get_xlabel() == "optimizer step"
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows


def test_a_picture_of_nothing_is_an_error():
    model = decoder()
    optimizer = SpanScaledOptimizer(
        torch.optim.AdamW(model.parameters()), model, SpanScale(2.0, 1.0)
    )
    with SpanMonitor(optimizer) as monitor, pytest.raises(ValueError, match="nothing has been"):
        monitor.plot()


def test_every_column_can_be_drawn():
    pytest.importorskip("matplotlib")
    _, monitor = train(decoder(), True)
    measured = [name for name in monitor.rows[0] if name not in ("step", "layer", "side", "head")]
    for column in measured[:-1]:
        figure = monitor.plot(column)
        assert figure.axes[1].get_lines()[0].get_ydata()[0] == pytest.approx(
            np.mean([r[column] for r in monitor.rows[:4]])
        )
    with pytest.raises(ValueError, match=r"no column is named 'shares.png'; .* pass path="):
        monitor.plot("shares.png")


def test_rows_with_problems_can_be_drawn_and_put_in_tables():
    pytest.importorskip("matplotlib")
    pandas = pytest.importorskip("pandas")
    _, monitor = train(decoder(), True)
    for row in monitor.rows[: len(monitor.rows) // 3]:
        row.update(dict.fromkeys(MEASURES), problem="made up")
    assert monitor.plot("condition") is not None
    assert pandas.api.types.is_float_dtype(monitor.to_pandas().condition)
