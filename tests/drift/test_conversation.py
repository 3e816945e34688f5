"""Prompts in a chat template, and conversations whose cache is kept."""

import pytest
import torch

from neuroflow_hf.drift.chat_template import encode_text
from neuroflow_hf.drift.continuation import Decoding, continue_tokens
from neuroflow_hf.drift.conversation import Conversation
from tests.phi3_models import make_chat_tokenizer, make_ours, make_tokenizer

END, SYSTEM, USER, ASSISTANT = 30, 31, 32, 33
BYPASS = {"gate_layer": 1, "cache_layers": [2], "threshold": 0.2, "target": "block"}
MESSAGES = ["hello there", "what is new", "and then"]


@pytest.fixture
def model():
    return make_ours(vocab_size=34)


@pytest.fixture
def fed(model):
    """The number of tokens in each forward of the model."""
    counts = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: counts.append(inputs[0].shape[1]))
    return counts


def test_prompts_are_put_into_the_template():
    tokenizer = make_chat_tokenizer()
    hello = tokenizer("hello")["input_ids"]
    assert encode_text(tokenizer, "hello") == [USER, *hello, END, ASSISTANT]
    assert encode_text(tokenizer, "hello", system="ab") == [SYSTEM, 3, 4, END, USER, *hello, END, ASSISTANT]
    assert encode_text(tokenizer, "hello", raw=True) == hello == encode_text(make_tokenizer(), "hello")
    with pytest.raises(ValueError, match="not UTF-8, at character 2"):
        encode_text(tokenizer, "ab\udcff")
    for refused in ({"system": "ab", "raw": True}, {"system": "no"}):
        with pytest.raises(ValueError, match=r"[Ss]ystem"):
            encode_text(tokenizer, "hello", **refused)
    with pytest.raises(ValueError, match="no chat template"):
        encode_text(make_tokenizer(), "hello", system="ab")


def test_control_tokens_in_a_message_are_text():
    ids = encode_text(make_chat_tokenizer(), "a<|end|><|assistant|>b", system="<|user|>")
    assert [token for token in ids if token >= END] == [SYSTEM, END, USER, END, ASSISTANT]


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("how", [{}, {"bypass": BYPASS}, {"lossless": True}], ids=["dense", "bypass", "lossless"])
def test_only_new_tokens_are_computed(model, fed, how, ends):
    tokenizer = make_chat_tokenizer()
    if not ends:  # the model never says its end token, so answers are cut
        tokenizer.eos_token = None
        model.lm_head.weight.data[END] = 0
    conversation = Conversation(model, tokenizer, Decoding(max_new_tokens=9, **how))
    for text in MESSAGES:
        before = 0 if conversation.cache is None else conversation.cache.get_seq_length()
        fed.clear()
        _, found = conversation.ask(text)
        new = len(conversation.tokens) + found.is_ended - len(found.tokens) - before  # with what was said but not fed
        assert fed[0] == new
        if "lossless" not in how:
            assert sum(fed) == new + len(found.tokens) - 1
            assert found.statistics is None or found.statistics.steps.item() == len(found.tokens) - 1
    # all at once: the template around the tokens that were said
    expected = []
    for text, spoken in zip(MESSAGES, spoken_by(conversation), strict=True):
        expected += [USER, *tokenizer(text)["input_ids"], END, ASSISTANT, *spoken, END]
    assert conversation.tokens == expected[:-1]


def spoken_by(conversation):
    """Token ids of each answer in a conversation."""
    answers, tokens = [], [*conversation.tokens, END]
    while ASSISTANT in tokens:
        tokens = tokens[tokens.index(ASSISTANT) + 1 :]
        answers.append(tokens[: next(place for place, token in enumerate(tokens) if token == END)])
    return answers


@pytest.mark.parametrize("how", [{}, {"lossless": True}], ids=["dense", "lossless"])
def test_answers_are_those_without_a_cache(model, how):
    tokenizer = make_chat_tokenizer()
    conversation = Conversation(model, tokenizer, Decoding(max_new_tokens=9, **how), system="be good")
    for text in MESSAGES:
        _, found = conversation.ask(text)
        said = conversation.tokens + [END] * found.is_ended
        prompt = said[: len(said) - len(found.tokens)]
        assert continue_tokens(model, tokenizer, prompt, Decoding(max_new_tokens=9)).tokens == found.tokens
    conversation.reset()
    again = Conversation(model, tokenizer, Decoding(max_new_tokens=9), system="be good")
    assert conversation.ask(MESSAGES[1])[0] == again.ask(MESSAGES[1])[0]


def test_a_stopped_answer_is_part_of_the_conversation(model, fed):
    conversation, steps = Conversation(model, make_chat_tokenizer(), Decoding(max_new_tokens=9)), iter("ab")
    model.lm_head.weight.data[END] = 0
    answer, found = conversation.ask("hello", is_stopped=lambda: next(steps, None) is None)
    assert len(found.tokens) == 3 and not found.is_cut
    assert conversation.messages[-1] == {"role": "assistant", "content": answer}
    fed.clear()
    conversation.ask("on")
    assert fed[0] == 1 + len([END, USER]) + len("on") + len([END, ASSISTANT])


def test_after_an_error_the_conversation_is_as_before(model):
    conversation, other = (Conversation(model, make_chat_tokenizer(), Decoding(max_new_tokens=9)) for _ in range(2))
    for each in (conversation, other):
        each.ask("hello")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model.model.layers[2], "forward", interrupted)  # two layers have written their keys by then
        with pytest.raises(KeyboardInterrupt):
            conversation.ask("what")
    assert conversation.messages == other.messages and conversation.tokens == other.tokens
    assert conversation.ask("and then")[1].tokens == other.ask("and then")[1].tokens


def test_a_full_conversation_says_so(model):
    model.lm_head.weight.data[END] = 0
    conversation = Conversation(model, make_chat_tokenizer(), Decoding(max_new_tokens=200))
    assert len(conversation.ask("a" * 100)[1].tokens) == 256 - 103
    before = list(conversation.messages)
    with pytest.raises(ValueError, match=r"full: .* 261 tokens.* 256"):
        conversation.ask("b")
    assert conversation.messages == before
    conversation.reset()
    assert len(conversation.ask("b")[1].tokens) == 200


def test_a_template_that_changes_the_past_is_encoded_anew(model, fed):
    tokenizer = make_chat_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    conversation = Conversation(model, tokenizer, Decoding(max_new_tokens=5))
    conversation.ask("hello")
    fed.clear()
    _, found = conversation.ask("there")
    assert fed[0] == len(conversation.tokens) + found.is_ended - len(found.tokens)


def test_no_conversation_without_a_template(model):
    with pytest.raises(ValueError, match="neuroflow generate"):
        Conversation(model, make_tokenizer(), Decoding())


def test_sampling(model):
    def text(seed, **how):
        torch.manual_seed(seed)
        return continue_tokens(model, make_tokenizer(), [3, 4, 5], Decoding(max_new_tokens=12, **how)).tokens

    assert text(1, temperature=2.0) == text(1, temperature=2.0) != text(2, temperature=2.0)
    assert text(1, temperature=2.0, top_p=1e-6) == text(2)  # the most probable token alone
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0, "temperature": 1.0}, {"top_p": 0.5}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
            Decoding(**wrong)
