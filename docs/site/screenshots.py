"""Take pictures of the built site in a headless browser, to be looked at: ``make screenshots``.

Each page is shown in a wide and in a narrow window, light and dark. The pictures go to
``build/screenshots``. It needs chromium, a package of the system, and is no part of CI.
"""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[2]
SITE, OUT = ROOT / "site", ROOT / "build" / "screenshots"
PAGES = (
    "",
    "notebooks/tutorial",
    "concepts",
    "how-to/choosing-layers",
    "loops",
    "method",
    "evidence",
    "reference/SpanScaledOptimizer",
    "notebooks/watch",
    "notebooks/compare",
    "troubleshooting",
)
WIDE, NARROW, HEIGHT = 1280, 390, 1700
# No browser window is as narrow as a telephone's: a frame in a wider one is.
FRAME = (
    "<body style='margin:0'><iframe src='/{page}' style='border:0;width:{width}px;"
    "height:{height}px'></iframe>"
)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serve the site, and ``/framed/<page>`` as a page in a narrow frame."""

    def do_GET(self):
        """Answer a request."""
        if not self.path.startswith("/framed/"):
            super().do_GET()
            return
        page = self.path.removeprefix("/framed/")
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(FRAME.format(page=page, width=NARROW, height=HEIGHT).encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def shoot(browser: str, url: str, width: int, dark: bool, path: Path) -> None:
    """Save a picture of a page."""
    options = ["--headless", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=4000"]
    if os.geteuid() == 0:  # the browser has no sandbox for root
        options.append("--no-sandbox")
    options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    options += [f"--window-size={width},{HEIGHT}", f"--screenshot={path}", url]
    subprocess.run([browser, *options], check=True, capture_output=True, timeout=120)


def main(pages: list[str]) -> None:
    """Take all pictures, or those of some pages."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        sys.exit("no chromium is installed: apt-get install chromium, or what your system has")
    if not (SITE / "index.html").exists():
        sys.exit("there is no site: run `make docs` first")
    OUT.mkdir(parents=True, exist_ok=True)
    handler = functools.partial(Handler, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        for page in pages or PAGES:
            at = f"{page}/" if page else ""
            name = page.replace("/", "-") or "index"
            for dark in (False, True):
                shade = "dark" if dark else "light"
                shoot(browser, f"{base}/{at}", WIDE, dark, OUT / f"{name}-wide-{shade}.png")
                framed = f"{base}/framed/{at}"
                shoot(browser, framed, NARROW + 120, dark, OUT / f"{name}-narrow-{shade}.png")
            print(f"{page or 'index'}: 4 pictures in {OUT}")
        server.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
