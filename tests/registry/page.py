"""The page docs/registry.md, made of the rows that ``run.py`` prints."""

import re
from collections import Counter
from importlib.metadata import version

MEANINGS = {
    "verified": "the gradients of all parameters are the reference's",
    "refused": "an error of spanopt names the layer and says what to do",
    "no attention": "no attention layer is found, and none of PyTorch's functions is called",
    "not compared": "it trains with the scales, and there is no reference of all its layers",
    "not built": "the small model does not run by itself, or not within the time",
    "broken": "an error of another kind: a bug",
    "wrong": "other gradients, without an error: a bug",
    "crashed": "the process ended: a bug",
}


def page(rows, cases):
    """Return the page, as Markdown.

    Args:
        rows: What came out.
        cases: How many there would be of the whole registry.
    """
    tried = "All" if len(rows) == cases else f"Only {len(rows)} of the"
    counts = Counter((row["attention"], row["outcome"]) for row in rows)
    lines = [
        "# The registry of transformers, model by model",
        "",
        "`make registry` generates this page. It builds every model of the registry small and with",
        "random weights, scales all of its attention layers, and compares the gradients of one",
        "backward pass with a reference: a copy of the model that hands Q and K to its attention",
        "function with hooks of a NumPy oracle on them. Of a layer that writes attention out",
        "the hooks are on the first product of activations in its forward pass. In each verified",
        "row the forward values are those of the bare model bit for bit, and the reference's",
        "gradients are not the plain ones. Nothing is picked by hand: what a new release adds is",
        "tried.",
        "",
        f"With torch {version('torch')} and transformers {version('transformers')}. {tried}",
        f"{cases} pairs of a model and an attention implementation were tried.",
        "",
        "| outcome | meaning | sdpa | eager |",
        "| --- | --- | --- | --- |",
    ]
    for outcome, meaning in MEANINGS.items():
        sdpa, eager = (counts[way, outcome] for way in ("sdpa", "eager"))
        if sdpa or eager:
            lines.append(f"| {outcome} | {meaning} | {sdpa} | {eager} |")
    lines += [
        "",
        "A layer that is not scaled, such as linear attention, has the scale `None` in its row;",
        "without that the model is refused, and the error names the layer.",
        "",
        "| model | attention | outcome | taps | error | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: (row["type"], row["attention"] == "eager")):
        error = f"{row['error']:.0e}" if row["outcome"] == "verified" else ""
        cells = (row["type"], row["attention"], row["outcome"], row.get("taps", ""), error)
        lines.append(f"| {' | '.join(cells)} | {remark(row)} |")
    return "\n".join(lines) + "\n"


def remark(row):
    """Return why the outcome is not "verified", or which classes of layers were left alone."""
    if row["outcome"] == "verified":
        refused = row.get("refused", "").split("; scaled:")[0]
        classes = dict.fromkeys(re.findall(r"' \((\w+)\)", refused))
        return f"not scaled: {', '.join(classes)}" if classes else ""
    text = (row.get("refused") or row.get("why") or "")[:120]
    return text.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
