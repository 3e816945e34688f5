"""The page, used in a headless browser as a person would, and the Space's program, started as the Hub starts it."""

import os
import re
import runpy
import shutil
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from playwright.sync_api import expect, sync_playwright
from transformers import SiglipConfig, SiglipModel, SiglipTextConfig

from neuroflow_hf.app.page import serve
from neuroflow_hf.archive.embed import embed_videos
from neuroflow_hf.loading import load_model
from recipes.space.build import FILES, build_space
from tests.cli.test_run import write_clip
from tests.conftest import TINY_TEXT, TINY_VISION, lively
from tests.phi3_models import save_checkpoint
from tests.processes import start
from tests.vision.test_pipelines import LABELS, PIPELINE_TEXT, make_processor

pytestmark = pytest.mark.alone

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROMPT = "the quick brown fox"


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(address, process):
    for _ in range(1200):
        assert process.is_alive(), "the server ended"
        try:
            return urllib.request.urlopen(address, timeout=5).read().decode()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise TimeoutError(address)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny SigLIP that reads text, a tiny language model, videos and their dataset."""
    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    text = SiglipTextConfig(**TINY_TEXT | PIPELINE_TEXT)
    lively(SiglipModel(SiglipConfig(text_config=text, vision_config=TINY_VISION))).save_pretrained(folder / "siglip")
    make_processor().save_pretrained(folder / "siglip")
    save_checkpoint(folder / "phi3", num_hidden_layers=5)
    (folder / "videos").mkdir()
    for name in ("one", "two"):
        write_clip(folder / "videos" / f"{name}.mp4", 12, "libx264")
    model, preprocess = load_model(folder / "siglip", device="cpu")
    videos = sorted((folder / "videos").iterdir())
    embed_videos(videos, model, preprocess, folder / "dataset", model_name=str(folder / "siglip"))
    (folder / "no-video.mp4").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def address(world):
    port = free_port()
    process, _ = start(serve, world / "siglip", world / "phi3", world / "dataset", "cpu", "127.0.0.1", port)
    address = f"http://127.0.0.1:{port}/"
    wait_for(address, process)
    yield address
    process.terminate()
    process.join(10)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        path = CHROMIUM or driver.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("needs Chromium: apt-get install chromium, or playwright install chromium")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def wrong():
    """What the console complained about, and what was asked from other machines."""
    return []


@pytest.fixture
def page(browser, address, wrong):
    """The page; afterwards, nothing went wrong."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.on("console", lambda line: wrong.append(line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(LOCAL) else None)
    page.set_default_timeout(60_000)
    page.goto(address)
    yield page
    assert wrong == []
    page.close()


LOCAL = ("http://127.0.0.1:", "data:", "blob:")


def begin(page, tab, button):
    """Choose a tab, and press a button in it."""
    page.get_by_role("tab", name=tab).click()
    return page.get_by_role("button", name=button, exact=True)


def choose(page, clip, proposed, labels):
    """Choose a clip, wait for the labels that come with it, and type others."""
    page.get_by_text(clip).click()
    expect(page.get_by_label("Labels")).to_have_value(proposed)
    page.get_by_label("Labels").fill(labels)


def plays(page, selector):
    """Whether a video can be played, once its beginning is there."""
    page.wait_for_function(f"document.querySelector({selector!r})?.readyState >= 2")
    return page.eval_on_selector(selector, "video => video.error === null")


def test_a_clip_is_run(page):
    choose(page, "A dog, a bicycle and a cat on a lawn", "a dog, a bicycle, a cat, nothing", ", ".join(LABELS))
    page.get_by_label("number input for Frames at most").fill("10")
    page.get_by_label("faithful").check()
    begin(page, "Video", "Run").click()
    page.locator(".scrolls table").nth(2).wait_for()
    assert plays(page, "video[src*='overlay.mp4']")
    assert page.eval_on_selector(".scrolls img", "image => image.complete && image.naturalWidth") > 1000
    text = page.inner_text("body")
    assert "110 later frames were left out." in text and "baseline: first frame repeated" in text
    assert "same label" in text and "10 frames" in text
    page.get_by_role("button", name="Files").click()
    page.locator(".file-preview a[href$='summary.json']").wait_for()


def test_an_upload_that_is_no_video_is_said_in_our_words(page, world, wrong):
    page.set_input_files("input[type=file]", world / "no-video.mp4")
    page.locator("video[src*='no-video.mp4']").wait_for(state="attached")
    begin(page, "Video", "Run").click()
    page.get_by_text(re.compile("no-video.mp4 is not a video, or its beginning or index is missing")).wait_for()
    toast = page.get_by_test_id("toast-body").inner_text()
    assert str(world) not in toast and "/tmp" not in toast
    assert set(wrong) <= {"Method not implemented."}  # Gradio's own, of what the browser cannot play
    wrong.clear()


def test_a_job_is_cancelled_and_another_one_runs(page):
    choose(page, "People on a walkway", "a person, nothing", "")
    begin(page, "Video", "Run").click()
    running = page.get_by_text(re.compile("frame [0-9]+ of 100"))
    running.wait_for()
    page.get_by_role("button", name="Cancel", exact=True).click()
    running.wait_for(state="hidden")
    page.get_by_label("number input for Frames at most").fill("10")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("90 later frames were left out.").wait_for()


def test_moments_are_found_and_played(page):
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("What to look for").fill(LABELS[0])
    page.get_by_label("What to look for").press("Enter")
    moments = page.locator(".moments .thumbnail-lg")
    moments.first.wait_for()
    assert "The best moments of 24 frames of 2 videos" in page.inner_text("body") and moments.count() >= 2
    moments.nth(1).click()
    assert plays(page, "video[src*='gradio_api/file=/']")
    source = page.get_attribute("video[src*='videos/']", "src")
    assert source.split("#t=")[1] and source.split("#")[0].endswith(".mp4")


def test_two_texts_stand_side_by_side(page):
    page.get_by_role("tab", name="Text").click()
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("block").check()
    page.get_by_label("number input for Share of steps").fill("1")
    begin(page, "Text", "Generate").click()
    page.get_by_text(re.compile("^Against dense: drift")).wait_for()
    text = page.inner_text("body")
    assert "Bypassed 100.0% of" in text and text.count("a second)") == 2
    assert page.locator(".answer mark").count() >= 1


def test_other_files_are_not_served(page, address, world):
    for path in (world / "siglip" / "config.json", world / "no-video.mp4", Path("/etc/passwd")):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}gradio_api/file={path}")


# --- the Space -----------------------------------------------------------------------------------------------------


def start_space(folder, port):
    """What the Hub does."""
    os.chdir(folder)
    os.environ |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    runpy.run_path("app.py", run_name="__main__")


def test_the_space_starts(world, tmp_path):
    space, port = build_space(world / "siglip", tmp_path / "space"), free_port()
    card = (space / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^sdk_version: \d+\.\d+\.\d+$", card, re.MULTILINE) and "app_file: app.py" in card
    assert {path.name for path in space.iterdir()} == {*FILES, "model"}
    assert (space / "model" / "model.safetensors").exists()
    build_space(world / "siglip", space)  # replaced
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError):
        build_space(world / "siglip", tmp_path / "other")
    process, _ = start(start_space, space, port)
    try:
        assert "gradio" in wait_for(f"http://127.0.0.1:{port}/", process)
        config = wait_for(f"http://127.0.0.1:{port}/config", process)
        assert all(f'"label":"{tab}"' in config for tab in ("Video", "Search", "Text"))
    finally:
        process.terminate()
        process.join(10)
