"""transformers' pipelines give with a NeuroFlow model what they give with the stock one."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    SiglipTextConfig,
    SiglipVisionModel,
    pipeline,
)
from transformers.utils import logging

from neuroflow_hf import (
    NeuroFlowSiglipForImageClassification,
    NeuroFlowSiglipModel,
    NeuroFlowSiglipVisionModel,
)
from tests.conftest import IMAGE_SIZE, TINY_TEXT, TINY_VISION, lively

LABELS = ("red circle", "green square", "dog")
WORDS = ["<pad>", "<unk>", "</s>", "This", "is", "a", "photo", "of", ".", "red", "green", "circle", "square", "dog"]
# The zero-shot pipeline pads texts to 64 tokens for every model type with "siglip" in it, and does not pass on
# another length.
PIPELINE_TEXT = {"max_position_embeddings": 64}


def make_processor() -> SiglipProcessor:
    """A processor for the tiny models: a tokenizer of whole words, images of 24 x 24 pixels."""
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return SiglipProcessor(
        image_processor=SiglipImageProcessor(size=size),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            unk_token="<unk>",
            eos_token="</s>",
            model_max_length=PIPELINE_TEXT["max_position_embeddings"],
        ),
    )


TASKS = {
    "zero-shot-image-classification": (SiglipModel, NeuroFlowSiglipModel, {"candidate_labels": list(LABELS)}),
    "image-feature-extraction": (SiglipVisionModel, NeuroFlowSiglipVisionModel, {}),
    "image-classification": (SiglipForImageClassification, NeuroFlowSiglipForImageClassification, {}),
}


@pytest.fixture(scope="module")
def processor():
    """The tiny models' processor."""
    return make_processor()


@pytest.fixture(scope="module")
def images():
    """Two images of noise."""
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, processor):
    """Per task, folders with the stock and the NeuroFlow model, and processor files in both."""
    root = tmp_path_factory.mktemp("pipelines")
    config = SiglipConfig(
        text_config=SiglipTextConfig(**TINY_TEXT | PIPELINE_TEXT), vision_config=TINY_VISION, num_labels=3
    )
    folders = {}
    for task, (stock_class, our_class, _) in TASKS.items():
        torch.manual_seed(0)
        stock = lively(stock_class(config.vision_config if task == "image-feature-extraction" else config))
        folders[task] = root / task / "stock", root / task / "ours"
        stock.save_pretrained(folders[task][0])
        our_class.from_pretrained(folders[task][0]).save_pretrained(folders[task][1])
        for folder in folders[task]:
            if task == "zero-shot-image-classification":
                processor.save_pretrained(folder)
            else:
                processor.image_processor.save_pretrained(folder)
    return folders


def flat(result):
    """The numbers of a pipeline's result, in the order of its labels if it has any."""
    if isinstance(result, dict):
        return [result["score"]]
    if isinstance(result, list):
        if result and isinstance(result[0], dict):
            result = sorted(result, key=lambda entry: entry["label"])
        return [number for entry in result for number in flat(entry)]
    return [float(result)]


@pytest.mark.parametrize("given", ["model", "folder"])
@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_gives_what_it_gives_with_stock(task, given, folders, processor, images):
    stock_class, our_class, options = TASKS[task]
    results = []
    for model_class, folder in zip((stock_class, our_class), folders[task], strict=True):
        if given == "folder":
            pipe = pipeline(task, model=str(folder))
        else:
            parts = {"image_processor": processor.image_processor}
            if task == "zero-shot-image-classification":
                parts["tokenizer"] = processor.tokenizer
            pipe = pipeline(task, model=model_class.from_pretrained(folder), **parts)
        assert type(pipe.model) is model_class
        results.append(pipe(images, **options))
    stock, ours = results
    assert len(set(flat(stock))) > 2
    assert flat(ours) == flat(stock)
    if task != "image-feature-extraction":
        labels = [[entry["label"] for entry in result] for result in stock]
        assert [[entry["label"] for entry in result] for result in ours] == labels


@pytest.mark.parametrize("saved_as", ["processor", "parts"])
@pytest.mark.parametrize("auto_class", [AutoProcessor, AutoImageProcessor, AutoTokenizer])
def test_processors_load_from_a_saved_folder(auto_class, saved_as, folders, tmp_path):
    prepared = []
    for folder in folders["zero-shot-image-classification"]:
        # `parts`: files that name a class each, and none that names the processor's (saving one as a whole leaves its
        # name in its tokenizer, so that of the fixture will not do)
        if saved_as == "parts":
            config = (folder / "config.json").read_text()
            folder = tmp_path / folder.name
            folder.mkdir()
            (folder / "config.json").write_text(config)
            parts = make_processor()
            parts.tokenizer.save_pretrained(folder)
            parts.image_processor.save_pretrained(folder)
        prepared.append(folder)
    stock, ours = prepared
    try:
        expected = type(auto_class.from_pretrained(stock))
    except ImportError as error:  # in transformers 5.17, AutoImageProcessor wants torchvision
        pytest.skip(f"stock SigLIP cannot do it either: {error}")
    assert type(auto_class.from_pretrained(ours)) is expected


def test_pipelines_know_the_classes(folders, caplog):
    """A class that is in none of a pipeline's tables is met by a logged error, not by an exception."""
    logging.enable_propagation()
    try:
        for task in TASKS:
            pipeline(task, model=str(folders[task][1]))
        pipeline("image-classification", model=str(folders["zero-shot-image-classification"][1]))
    finally:
        logging.disable_propagation()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
