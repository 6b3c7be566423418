import os
import shutil
from pathlib import Path

import pytest

SHIPPED = Path(__file__).parents[2] / ".venv" / "browser" / "chromium"


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium: of KITHARA_RAY_BROWSER, of `make test`, or of the system."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    found = [
        os.environ.get("KITHARA_RAY_BROWSER"),
        str(SHIPPED) if SHIPPED.exists() else None,
        *map(shutil.which, names),
    ]
    path = next((path for path in found if path), None)
    if path is None:
        pytest.skip("needs a Chromium: `make test` takes one from the npm registry; or apt-get install chromium")
    env = dict(os.environ)
    if path == str(SHIPPED):  # with the libraries, and where there are none the fonts, that came with it
        env["LD_LIBRARY_PATH"] = str(SHIPPED.parent / "al2023" / "lib")
        if not Path("/etc/fonts").exists():
            env["FONTCONFIG_PATH"] = str(SHIPPED.parent / "fonts")
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--no-zygote", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=path, args=options, env=env)
        yield browser
        browser.close()
