"""The README's snippets run, and so does the loop that its diff leads to."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import spanopt

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def after(diff):
    """The file that a diff leads to."""
    return "\n".join(line[2:] for line in diff.splitlines() if not line.startswith("-"))


def before(diff):
    return "\n".join(line[2:] for line in diff.splitlines() if not line.startswith("+"))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_snippets_run_one_after_the_other(capsys):
    snippets = blocks("python")
    assert len(snippets) == 2
    namespace = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "decoder.layers.1.self_attn" in printed
    assert "left alone" in printed


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_the_snippets_of_the_docs_run(page):
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(snippet, page.name, "exec"), {})


def test_the_diff_turns_a_loop_that_runs_into_one_that_runs():
    (diff,) = blocks("diff")
    plain, wrapped = {}, {}
    for source, namespace in ((before(diff), plain), (after(diff), wrapped)):
        torch.manual_seed(0)
        exec(compile(source, "README.md", "exec"), namespace)
    assert type(plain["optimizer"]).__name__ == "AdamW"
    assert type(wrapped["optimizer"]).__name__ == "SpanScaledOptimizer"
    difference = plain["model"].self_attn.in_proj_weight - wrapped["model"].self_attn.in_proj_weight
    assert difference.abs().max() > 0


LOOPS = (ROOT / "docs" / "loops.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("diff", re.findall(r"```diff\n(.*?)```", LOOPS, re.DOTALL))
def test_each_recipe_runs_before_and_after_and_its_after_is_wrapped(diff):
    (setup,) = re.findall(r"```python\n(.*?)```", LOOPS, re.DOTALL)
    ends = []
    for source in (before(diff), after(diff)):
        namespace = {}
        torch.manual_seed(0)
        exec(compile(setup + source, "loops.md", "exec"), namespace)
        ends.append(namespace)
    torch.compiler.reset()
    optimizers = [{type(x).__name__ for x in vars_.values()} for vars_ in ends]
    assert "SpanScaledOptimizer" in optimizers[1] - optimizers[0]


def test_every_file_that_the_docs_link_to_exists():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def public_objects():
    for name in spanopt.__all__:
        value = getattr(spanopt, name)
        yield name, value
        if inspect.isclass(value):
            for attribute, member in vars(value).items():
                member = getattr(member, "__func__", member)
                if inspect.isfunction(member) and not attribute.startswith("_"):
                    yield f"{name}.{attribute}", member


@pytest.mark.parametrize(("name", "value"), list(public_objects()))
def test_every_public_name_has_a_docstring_with_an_example(name, value):
    assert ">>> " in (inspect.getdoc(value) or ""), name


def messages():
    """Every string in the package, with braces in the place of what is filled in."""
    for path in (ROOT / "spanopt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (x.value if isinstance(x, ast.Constant) else "{}" for x in node.values)
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_error_message_that_is_explained_exists():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    known = "\n".join(messages())
    explained = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(explained) > 15
    assert [words for words in explained if words not in known] == []
