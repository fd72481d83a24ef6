"""Ask for every address outside the project that its pages link to: ``make links``.

It needs the network, so it is no part of CI. Links inside the site are checked by ``make docs``.
"""

from __future__ import annotations

import re
import sys
import urllib.error
import urllib.request
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    "*.md",
    "*.cff",
    ".github/**/*.md",
    "docs/**/*.md",
    "docs/notebooks/*.py",
    "pyproject.toml",
)
_ADDRESS = re.compile(r"https?://[^\s\"'`<>)\]]+")


def addresses() -> dict[str, set[str]]:
    """Return the pages that link to each address."""
    found: dict[str, set[str]] = defaultdict(set)
    for pattern in PAGES:
        for page in sorted(ROOT.glob(pattern)):
            for address in _ADDRESS.findall(page.read_text(encoding="utf-8")):
                found[address.rstrip(".,;:")].add(str(page.relative_to(ROOT)))
    return found


def problem(address: str) -> str | None:
    """Return what is wrong with an address, ``None`` if it answers."""
    request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0 (link check)"})
    try:
        with urllib.request.urlopen(request, timeout=20):
            return None
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.reason}"
    except OSError as error:
        return str(error)


def main() -> int:
    """Check all of them, and return 1 if one does not answer."""
    failed = 0
    for address, pages in sorted(addresses().items()):
        wrong = problem(address)
        failed += wrong is not None
        print(f"{'ok ' if wrong is None else 'BAD'} {address}" + (f": {wrong}" if wrong else ""))
        if wrong:
            print(f"    in {', '.join(sorted(pages))}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
