"""The Chromium that browser tests drive: the system's own, else the one that playwright keeps.

`python -m tests.browser` makes sure that there is one, and says what to do where there is none.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = ("--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")  # root in a container has no sandbox


def find_chromium() -> Path | None:
    """An installed Chromium: `FLUXSAE_CHROMIUM`, the search path, playwright's own; None where there is none."""
    named = os.environ.get("FLUXSAE_CHROMIUM")
    found = next((path for path in map(shutil.which, [named] if named else NAMES) if path), None)
    return Path(found) if found else _playwright_chromium()


def _playwright_chromium() -> Path | None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = Path(playwright.chromium.executable_path)
    return path if path.exists() else None


def main() -> int:
    """Installs playwright's Chromium where no other is found; 1 and a remedy where that fails too."""
    if found := find_chromium():
        print(f"Browser tests use {found}")
        return 0
    print("No Chromium on this machine: fetching playwright's own")
    subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=False)
    if found := find_chromium():
        return 0
    print(
        "Browser tests need Chromium, and it could not be fetched. Install it from the system's packages "
        "(Debian, Ubuntu: apt-get install chromium), or set FLUXSAE_CHROMIUM to an installed one.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
