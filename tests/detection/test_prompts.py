"""Prompts: what is refused, the tokens of each phrase, and prompts that hold many phrases."""

import importlib
import re

import pytest
import torch

from detection import networks, prompts
from parallel import Refused


@pytest.fixture(scope="module")
def tokenizer():
    words = "red blue fish cup hot-air balloon".split()
    return networks.tiny(words, 32, torch.device("cpu")).processor.tokenizer


def test_phrases_of_a_text():
    assert prompts.parse("Red  fish . blue cup.") == {1: "red fish", 2: "blue cup"}
    assert prompts.clean("St. Bernard?") == "st bernard"


@pytest.mark.parametrize("text, words", [
    ("", ("no phrase",)), (" . ", ("no phrase",)), ("red fish", ("no separator", "'red fish .'")),
    ("red fish . blue cup . red fish .", ("'red fish'", "twice")),
])
def test_bad_texts_are_refused(text, words):
    with pytest.raises(Refused) as error:
        prompts.parse(text)
    assert all(word in str(error.value) for word in ("--text", repr(text), *words))


def test_tokens_of_phrases_are_those_that_the_library_finds(tokenizer):
    phrases = {3: "blue cup", 5: "red fish", 8: "cup"}
    prompt = prompts.encode(phrases, [5, 8, 3], tokenizer)
    spelled = tokenizer.convert_ids_to_tokens(prompt.ids[0])
    assert spelled == "[CLS] red fish . cup . blue cup . [SEP]".split()
    module = importlib.import_module("transformers.models.grounding_dino.modeling_grounding_dino")
    maps = module.build_label_maps(torch.zeros(1, 5, len(spelled)), prompt.ids)[0]
    assert torch.equal(maps.bool(), prompt.spans)
    assert prompt.categories == [5, 8, 3]
    assert prompts.lengths(phrases, tokenizer, 256, "--text") == {3: 3, 5: 3, 8: 2}


@pytest.mark.parametrize("phrase", ["green fish", "fish, cup", "\u200b"])
def test_words_that_the_vocabulary_lacks_are_refused(tokenizer, phrase):
    with pytest.raises(Refused, match=f"--text: {re.escape(repr(phrase))}.*rename"):
        prompts.shared_out({1: "red fish", 2: phrase}, tokenizer, 256)


def test_many_phrases_take_several_prompts(tokenizer):
    phrases = dict.fromkeys(range(10, 110), "red fish")  # [CLS] and [SEP] leave 254 of 256 tokens: 84 phrases of 3
    shared = prompts.shared_out(phrases, tokenizer, 256)
    assert [len(prompt.categories) for prompt in shared] == [84, 16] and shared[1].ids.shape == (1, 50)
    assert sum((prompt.categories for prompt in shared), []) == list(phrases)
    assert [len(prompt.categories) for prompt in prompts.shared_out({1: "red fish", 2: "cup"}, tokenizer, 5)] == [1, 1]
    with pytest.raises(Refused, match="--eval: 'red red.*300 tokens.*reads 253.*shorten"):
        prompts.shared_out({1: "cup", 2: "red " * 300}, tokenizer, 256, "--eval")
