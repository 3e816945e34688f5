"""The model before training: the tower, a small text tower, a tokenizer."""

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionModel

from recipes.siglip_small.captions import all_words

TEXT_LENGTH = 64  # what transformers' zero-shot pipeline pads to for SigLIP
VOCABULARY = 2000
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
TEXT_TOWER = {
    "hidden_size": 192,
    "intermediate_size": 576,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": TEXT_LENGTH,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the captions' words, in lower case; every other word is spelled out of pieces."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(all_words(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=TEXT_LENGTH,
        model_input_names=["input_ids"],  # SigLIP attends to the padding too
    )


def make_model(tower: SiglipVisionModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> SiglipModel:
    """A SiglipModel with the tower's weights, its head included, and a fresh text tower, in float32."""
    torch.manual_seed(seed)
    text = SiglipTextConfig(
        **TEXT_TOWER,
        vocab_size=len(tokenizer),
        projection_size=tower.config.hidden_size,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    vision = tower.config.to_dict()
    vision.pop("_name_or_path", None)  # the tower's folder on this machine
    model = SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision))
    model.vision_model.load_state_dict(tower.state_dict())
    with torch.no_grad():
        model.logit_scale.fill_(torch.tensor(20.0).log())
        model.logit_bias.fill_(-8.0)
    return model
