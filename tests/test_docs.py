"""The README's snippets run, and so does the loop that its diff leads to."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import spanopt
from spanopt.declarations import declared, withdraw

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


PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_snippets_of_the_docs_run(page):
    known = set(declared)
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(snippet, page.name, "exec"), {})
    for name in set(declared) - known:  # what a page has registered is not there for other tests
        withdraw(name)


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


def anchors(page):
    """The anchors of a page's headings, as the site and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h.lower()).strip()) for h in headings}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name
)
def test_every_file_and_anchor_that_a_page_links_to_exists(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text)
    links += [(source, "") for source in re.findall(r"src(?:set)?=\"([^\"]+)\"", text)]
    for target, anchor in links:
        if target.startswith("http") or "reference/" in target:  # pages that the site generates
            continue
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), f"{target}#{anchor}"


WORDS = re.compile(r"[A-Za-z0-9'’/_.,()\-]*[A-Za-z][A-Za-z0-9'’/_.,()\-]*")


def sentences(text):
    """The sentences of a Markdown page, without code, tables and addresses."""
    text = re.sub(
        r"```.*?```|<picture>.*?</picture>|^    .*?$|^\|.*?$", "", text, flags=re.S | re.M
    )
    text = re.sub(r"\]\([^)]*\)|[\[\]*]", "", text)
    text = re.sub(r"`[^`]*`", "code", text)
    for block in re.split(r"\n\s*\n|^#+ .*$|^- ", text, flags=re.MULTILINE):
        yield from re.split(r"(?<=[.?:!])\s+", " ".join(block.split()))


def test_the_readme_is_shorter_than_150_lines():
    assert len(README.splitlines()) < 150


FIRST_READ = [ROOT / "docs" / f"{name}.md" for name in ("index", "concepts", "faq")]


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", *FIRST_READ, *sorted((ROOT / "docs" / "how-to").glob("*.md"))],
    ids=lambda page: page.name,
)
def test_no_sentence_that_a_newcomer_reads_has_more_than_25_words(page):
    found = sentences(page.read_text(encoding="utf-8"))
    assert [s for s in found if len(WORDS.findall(s)) > 25] == []


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
