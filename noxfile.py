"""Sessions that run the tests on other versions of Python, of torch and of the libraries around it.

``nox -s torch`` and ``nox -s python`` run the tests that need no library but torch, and
``nox -s libraries`` those that train with transformers, accelerate and lightning. Each session
records in docs/compatibility.json what it ran on and what came out, and ``nox -s table`` makes
docs/compatibility.md of that. ``nox -s below`` shows what fails on versions of torch below the
bound. Each session takes up to 5 GB; ``rm -rf .nox`` frees it.
"""

import datetime
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["torch", "python", "libraries", "table"]

ROOT = Path(__file__).parent
RECORD = ROOT / "docs" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"


def bound(package: str) -> str:
    """Return the oldest version of a package that pyproject.toml names."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf'"{package}>=([0-9.]+)"', text)
    assert found, f"pyproject.toml names no oldest {package}"
    return found[1] if found[1].count(".") > 1 else f"{found[1]}.0"


def pinned(package: str) -> str:
    """Return the version of a package in constraints.txt, with which `make test` runs all tests."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    found = re.search(rf"^{package}==(.+)$", text, re.MULTILINE)
    assert found, f"constraints.txt names no {package}"
    return found[1]


OLDEST, PINNED, NEWEST = bound("torch"), pinned("torch"), "2.15.0"
BELOW = ["2.6.0", "2.8.0", "2.10.0", "2.12.1"]  # older than the bound: what fails there
TORCH = list(dict.fromkeys([OLDEST, PINNED, "2.14.1", NEWEST]))
PYTHON = ["3.10", "3.12", "3.13"]  # the sessions of torch run on 3.11
LIBRARIES = ("transformers", "accelerate", "lightning")

NEEDS_LIBRARIES = ["tests/libraries", "tests/integrations", "tests/registry"]
# About the project and its tools, whatever torch there is, and the long runs.
OF_NO_VERSION = ["tests/scripts", "tests/test_docs.py", "tests/test_inspection.py", "tests/soak"]
TEST_GROUP = (
    *("pytest", "pytest-xdist", "hypothesis", "expecttest", "psutil", "numpy", "rich", "scipy"),
    *("torch-optimizer", "pytorch-optimizer", "schedulefree", "scikit-learn", "tokenizers"),
    *("matplotlib", "pandas", "tensorboard"),
)


def install(session: nox.Session, *versions: str, group: tuple[str, ...] = TEST_GROUP) -> None:
    """Install given versions, and of all else those of constraints.txt where they go together.

    What torch itself limits the versions of, by another limit in each release, is left to pip.
    """
    given = {re.split("[=<>]", version)[0].lower() for version in versions}
    free = given | {"setuptools", "sympy", "torch", "triton"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.split("==")[0].lower() not in free]
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join(kept), encoding="utf-8")
    session.install("-c", str(constraints), *versions, *group)
    session.install("--no-deps", "-e", ".")


def run_tests(session: nox.Session, *arguments: str) -> None:
    """Run tests and record what came out, also where some fail."""
    report = Path(session.create_tmp()) / "report.xml"
    report.unlink(missing_ok=True)
    codes = range(2)  # all pass, or some fail
    tests = [f"--junitxml={report}", "-q", "-o", "addopts=", *arguments, *session.posargs]
    session.run("python", "-m", "pytest", *tests, success_codes=codes, env={"OMP_NUM_THREADS": "1"})
    failed = record(session, report) if report.exists() else 0  # --install-only runs no tests
    if failed:
        session.error(f"{failed} tests fail")


def record(session: nox.Session, report: Path) -> int:
    """Write what a session ran on and what came out into the record; return how many failed."""
    script = (
        "import json, platform\n"
        "from importlib.metadata import PackageNotFoundError, version\n"
        "found = {'python': platform.python_version(), 'platform': platform.platform()}\n"
        f"for package in {('torch', *LIBRARIES)}:\n"
        "    try:\n"
        "        found[package] = version(package)\n"
        "    except PackageNotFoundError:\n"
        "        found[package] = None\n"
        "print(json.dumps(found))"
    )
    ran_on = json.loads(session.run("python", "-c", script, silent=True) or "{}")
    suite = ElementTree.parse(report).getroot()[0]
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    outcome = {
        "passed": count["tests"] - failed - count["skipped"],
        "failed": failed,
        "skipped": count["skipped"],
        "date": datetime.date.today().isoformat(),
    }
    entries = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    entries[session.name] = {**ran_on, **outcome}
    RECORD.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return failed


def core() -> list[str]:
    """Return the arguments of pytest for the tests that need no library but torch."""
    left_out = [f"--ignore={path}" for path in (*NEEDS_LIBRARIES, *OF_NO_VERSION)]
    return ["tests", *left_out]


@nox.session(python="3.11")
@nox.parametrize("version", TORCH, ids=TORCH)
def torch(session: nox.Session, version: str) -> None:
    """The tests that need no library but torch, on the oldest, the newest and others between."""
    install(session, f"torch=={version}")
    run_tests(session, *core())


@nox.session(python="3.11", default=False)
@nox.parametrize("version", BELOW, ids=BELOW)
def below(session: nox.Session, version: str) -> None:
    """The same on versions of torch below the bound, to see what fails there."""
    install(session, f"torch=={version}")
    run_tests(session, *core())


@nox.session(python=PYTHON)
def python(session: nox.Session) -> None:
    """The same tests with the pinned torch on each Python."""
    install(session, f"torch=={PINNED}")
    run_tests(session, *core())


@nox.session(python="3.11")
def libraries(session: nox.Session) -> None:
    """The tests that train with other libraries, on the oldest of these."""
    oldest = [f"{package}=={bound(package)}" for package in LIBRARIES]
    group = (*TEST_GROUP, "peft", "x-transformers")
    install(session, f"torch=={PINNED}", *oldest, group=group)
    run_tests(session, *NEEDS_LIBRARIES)


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """The marked part of the tests, minutes long, on the oldest torch: what CI runs of it."""
    if OLDEST == PINNED:
        session.skip("the oldest torch is the pinned one, on which `make test` runs all tests")
    install(session, f"torch=={OLDEST}")
    session.run("python", "-m", "pytest", "-q", "-o", "addopts=", "-m", "oldest", *core())


@nox.session(python=False)
def table(session: nox.Session) -> None:
    """Make docs/compatibility.md of the record."""
    entries = json.loads(RECORD.read_text(encoding="utf-8"))
    columns = ("python", "torch", *LIBRARIES, "passed", "failed", "skipped", "date")
    lines = [
        "# Compatibility",
        "",
        "What the tests were run on, as recorded by the sessions of `noxfile.py`. What is not here",
        "was not tried. All of it ran on a CPU under Linux (x86-64). **Not tried**: MPS, Windows,",
        "ROCm. A session named `below` ran on a torch that is not supported, for what fails there.",
        "The oldest supported torch is the pinned one, on which `make test` runs all tests.",
        "Which older torch would do is not known: nothing between 2.6 and it was tried to the end.",
        "",
        f"| session | {' | '.join(columns)} |",
        f"| --- {'| --- ' * len(columns)}|",
    ]
    for name, entry in entries.items():
        cells = ["-" if entry.get(key) is None else str(entry[key]) for key in columns]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    # A note is written into the record by hand, and goes when the session runs again.
    notes = [f"- `{name}`: {entry['note']}" for name, entry in entries.items() if "note" in entry]
    lines += ["", *notes] if notes else []
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
