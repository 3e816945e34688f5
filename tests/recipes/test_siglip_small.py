"""The embedded SigLIP as it lies in the repository: complete, small, stock, and able to tell things apart."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, SiglipModel, pipeline

from neuroflow_hf import NeuroFlowSiglipModel
from neuroflow_hf.loading import EMBEDDED_MODEL, default_model, load_text_model
from neuroflow_hf.video.labels import embed_labels
from neuroflow_hf.video.reader import labelled_clip, read_frames

LABELS = ["a dog", "a bicycle", "a cat", "nothing"]
SHOWN = {4: "nothing", 22: "a dog", 58: "a bicycle", 110: "a cat"}  # frames of the composed clip


@pytest.fixture(scope="module")
def stock():
    return SiglipModel.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def frames():
    return [frame.image for frame in read_frames(labelled_clip())]


def test_it_is_complete_and_small():
    files = {path.name: path.stat().st_size for path in EMBEDDED_MODEL.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "recipe.json", "tokenizer.json"} <= files.keys()
    assert sum(files.values()) <= 60e6
    recipe = json.loads((EMBEDDED_MODEL / "recipe.json").read_text(encoding="utf-8"))
    assert recipe["things"] >= 150
    assert not list(EMBEDDED_MODEL.glob("*.py"))


def test_no_model_names_a_folder_of_the_machine_that_made_it():
    for path in (Path(__file__).parents[2] / "models").rglob("*.json"):
        if path.name != "tokenizer.json":
            text = path.read_text(encoding="utf-8")
            assert '"_name_or_path"' not in text and str(Path.home()) + "/" not in text, path


def test_its_text_tower_is_small_and_its_weights_are_in_half_precision(stock):
    assert sum(item.numel() for item in stock.text_model.parameters()) <= 6e6
    assert SiglipModel.from_pretrained(EMBEDDED_MODEL).dtype == torch.float16


def test_stock_siglip_and_neuroflow_give_the_same(stock, frames):
    ours, loading = NeuroFlowSiglipModel.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(EMBEDDED_MODEL)
    inputs = processor(
        text=LABELS, images=Image.fromarray(frames[22]), padding="max_length", truncation=True, return_tensors="pt"
    )
    assert inputs["input_ids"].shape == (4, 64)
    with torch.inference_mode():
        expected, found = stock(**inputs), ours.eval()(**inputs)
    assert torch.equal(expected.logits_per_image, found.logits_per_image)


def test_the_pipeline_takes_it(frames):
    classify = pipeline("zero-shot-image-classification", model=str(EMBEDDED_MODEL), dtype=torch.float32)
    answer = classify(Image.fromarray(frames[22]), candidate_labels=["dog", "bicycle", "cat"])
    assert answer[0]["label"] == "dog"


def test_on_video_it_names_what_comes_and_goes(frames):
    assert default_model() == EMBEDDED_MODEL
    model, preprocess, tokenizer = load_text_model(EMBEDDED_MODEL)
    labels, stream, found = embed_labels(model, tokenizer, LABELS), model.new_stream(), {}
    with torch.inference_mode():
        for number, image in enumerate(frames):
            output = model.get_image_features(preprocess(image), stream=stream)
            if number in SHOWN:
                found[number] = labels.best(output.pooler_output[0])[0]
    assert found == SHOWN


def test_no_code_lies_beside_any_model():
    assert not list((Path(__file__).parents[2] / "models").rglob("*.py"))
