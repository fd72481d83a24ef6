"""Dashboards get the mean over heads, and one that takes nothing ends no step."""

import pytest
from monitored import decoder, train


class Run:
    """Takes what a run of Weights & Biases takes."""

    def __init__(self):
        self.summary, self.metrics = {}, {}

    def define_metric(self, name, step_metric=None):
        self.metrics[name] = step_metric

    def log(self, data):
        self.summary.update(data)


def test_tensorboard_has_the_mean_over_heads(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        _, monitor = train(decoder(), True, writer=writer)
    reader = events.EventAccumulator(str(tmp_path)).Reload()
    row = monitor.rows[0]
    of_layer = [r for r in monitor.rows if (r["layer"], r["side"]) == (row["layer"], "query")]
    for measure in ("parallel_share", "entropy"):
        logged = reader.Scalars(f"span/{row['layer']}/query/{measure}")
        for event in logged:
            values = [r[measure] for r in of_layer if r["step"] == event.step]
            assert event.value == pytest.approx(sum(values) / len(values), rel=1e-6)
        assert [event.step for event in logged] == [0, 2, 4]
    assert f"span/{row['layer']}/key/entropy" not in reader.Tags()["scalars"]


@pytest.mark.parametrize("real", [False, True])
def test_weights_and_biases_has_the_mean_over_heads(real, tmp_path):
    wandb = pytest.importorskip("wandb") if real else None
    run = wandb.init(mode="offline", dir=tmp_path, settings={"silent": True}) if real else Run()
    _, monitor = train(decoder(), True, run=run)
    summary = dict(run.summary)
    if real:
        run.finish()
    else:
        assert run.metrics == {"span/*": "span/step"}
    layer = monitor.rows[0]["layer"]
    last = [r for r in monitor.rows if (r["layer"], r["side"], r["step"]) == (layer, "key", 4)]
    mean = sum(row["condition"] for row in last) / len(last)
    assert summary[f"span/{layer}/key/condition"] == pytest.approx(mean)
    assert summary["span/step"] == 4


def test_a_writer_or_a_run_that_is_closed_is_named_once():
    class Closed:
        def define_metric(self, *_, **__):
            pass

        def add_scalar(self, *_):
            raise ValueError("I/O operation on closed file")

        log = add_scalar

    with pytest.warns(UserWarning, match="closed file") as caught:
        _, monitor = train(decoder(), True, writer=Closed(), run=Closed())
    assert [str(warning.message).partition(":")[2][:10] for warning in caught] == [
        " writer ta",
        " run takes",
    ]
    assert {row["step"] for row in monitor.rows} == {0, 2, 4}
