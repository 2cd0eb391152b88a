"""Draw docs/images/page.png anew: python docs/images/record_page.py FOLDER, made by assay page."""

import argparse
import functools
import http.server
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

from components.smoke_test.engines.child import chromium_options
from components.smoke_test.engines.installed import chromium


def main() -> None:
    """Serve the folder, fill the form with a held-out row, and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=chromium_options())
        page = browser.new_page(
            viewport={"width": 1000, "height": 1130}, color_scheme="light", reduced_motion="reduce"
        )
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_selector("button:enabled")
        page.select_option("#example", "3")
        page.screenshot(path=Path(__file__).with_name("page.png"))
        browser.close()
    server.shutdown()


if __name__ == "__main__":
    main()
