"""The page itself: a real server, driven in a headless Chromium."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


class Server:
    """`blipfast serve` in a process of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.errors = folder / "server.txt"
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "blipfast.cli", "serve", "--device", "cpu",
                    "--port", str(_free_port()), *options,
                ],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, self.errors.read_text()
        self.address = found[0]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def server(checkpoints, pictures, tmp_path) -> Iterator[Server]:
    (pictures / "broken.jpg").rename(tmp_path / "broken.jpg")
    options = [word for name, path in checkpoints.items() for word in (f"--{name}", path)]
    limits = ["--max_upload_mb", "0.1", "--max_pixels", "100000"]
    started = Server(tmp_path, *options, "--folder", str(pictures), *limits)
    yield started
    started.stop()


@pytest.fixture
def page(server):
    if BROWSER is None:
        if os.environ.get("BLIPFAST_REQUIRE_BROWSER"):
            pytest.fail(f"no browser is installed; looked for {', '.join(BROWSERS)}")
        pytest.skip(f"install one of {', '.join(BROWSERS)} to run it, as CI does")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(30_000)
        elsewhere: list[str] = []
        page.on("request", lambda request: elsewhere.append(request.url))
        page.goto(server.address)
        page.wait_for_selector("#caption-go")
        yield page
        own = (server.address, "data:", "blob:")
        assert not [url for url in elsewhere if not url.startswith(own)]  # nothing leaves
        browser.close()


def choose(page, where: str, file: Path) -> None:
    """Uploads a picture and waits for it to be there."""
    page.locator(f"#{where} input[type=file]").set_input_files(str(file))
    page.wait_for_selector(f"#{where} img")


def value_of(page, where: str) -> str:
    """What a text box says, once it says something."""
    field = page.locator(f"#{where} textarea, #{where} input").first
    field.wait_for()
    page.wait_for_function("field => field.value", arg=field.element_handle())
    return field.input_value()


@pytest.mark.slow
def test_upload_click_and_see_the_answer(page, pictures, tmp_path) -> None:
    choose(page, "caption-image", pictures / "a.png")
    page.click("#caption-go")
    assert value_of(page, "caption-beam")
    assert len(value_of(page, "caption-sampled").splitlines()) == 3

    page.get_by_role("tab", name="Questions").click()
    choose(page, "question-image", pictures / "b.jpg")
    page.fill("#question-text textarea", "what is it?")
    page.click("#question-go")
    assert value_of(page, "question-answer")

    page.get_by_role("tab", name="Match").click()
    choose(page, "match-image", pictures / "a.png")
    page.fill("#match-texts textarea", "a red apple\na dog and a cat")
    page.click("#match-go")
    page.wait_for_selector("#match-words img")
    table = page.inner_text("#match-table")
    assert "a red apple" in table
    assert "a dog and a cat" in table
    best = next(
        text for text in re.findall(r"a red apple|a dog and a cat", table)
    )  # its words are drawn
    assert page.locator("#match-words img").count() == len(best.split())

    page.get_by_role("tab", name="Search").click()
    page.fill("#search-text textarea, #search-text input", "a dog")
    page.click("#search-go")
    page.wait_for_selector("#search-found img")
    assert page.locator("#search-found img").count() == 5


@pytest.mark.slow
def test_errors_are_shown_in_words(page, pictures, tmp_path, server) -> None:
    def complaint(act) -> str:
        act()
        toast = page.locator(".toast-body").last
        toast.wait_for()
        said = toast.inner_text()
        page.locator(".toast-close").last.click()
        toast.wait_for(state="detached")
        return said

    def go() -> None:
        page.click("#caption-go")

    assert "choose an image first" in complaint(go)
    choose(page, "caption-image", tmp_path / "broken.jpg")
    assert "truncated or damaged" in complaint(go)
    large = tmp_path / "large.png"
    Image.new("RGB", (400, 400)).save(large)
    page.reload()
    page.wait_for_selector("#caption-go")
    choose(page, "caption-image", large)
    assert "more than the limit of 100,000" in complaint(go)
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "heavy.png")  # 0.27 MB
    page.reload()
    page.wait_for_selector("#caption-go")
    said = complaint(
        lambda: page.locator("#caption-image input[type=file]").set_input_files(
            str(tmp_path / "heavy.png")
        )
    )
    assert "size" in said.lower()
    assert "Traceback" not in page.content()
    assert "Traceback" not in server.errors.read_text()


@pytest.mark.slow
def test_only_this_machine_is_listened_to(server) -> None:
    port = int(server.address.rstrip("/").rpartition(":")[2])
    assert urllib.request.urlopen(server.address, timeout=10).status == 200
    with open("/proc/net/tcp") as table:
        listening = [line.split()[1] for line in table if line.split()[3:4] == ["0A"]]
    assert f"0100007F:{port:04X}" in listening
    assert f"00000000:{port:04X}" not in listening
    # Files of the machine are not handed out.
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{server.address}gradio_api/file=/etc/passwd", timeout=10)
    assert caught.value.code in (403, 404)


@pytest.mark.slow
def test_a_taken_port_is_said(checkpoints, tmp_path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [
                sys.executable, "-m", "blipfast.cli", "serve", "--caption", checkpoints["caption"],
                "--port", str(port), "--device", "cpu",
            ],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert f"cannot listen at 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
