"""Prompts: what is refused, the tokens of each phrase, and prompts that hold many phrases."""

import importlib

import pytest
import torch

from detection import networks, prompts
from parallel import Refused


@pytest.fixture(scope="module")
def tokenizer():
    words = "red blue fish cup hot-air balloon".split()
    return networks.tiny(words, 32, torch.device("cpu")).processor.tokenizer


def test_phrases_of_a_text():
    assert prompts.parse("Red  fish . blue cup.") == ["red fish", "blue cup"]
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
    prompt = prompts.encode(["red fish", "cup", "blue cup"], tokenizer)
    spelled = tokenizer.convert_ids_to_tokens(prompt.ids[0])
    assert spelled == "[CLS] red fish . cup . blue cup . [SEP]".split()
    module = importlib.import_module("transformers.models.grounding_dino.modeling_grounding_dino")
    maps = module.build_label_maps(torch.zeros(1, 5, len(spelled)), prompt.ids)[0]
    assert torch.equal(maps.bool(), prompt.spans)
    assert prompts.lengths(prompt.phrases, tokenizer) == [3, 2, 3]


def test_words_that_the_vocabulary_lacks_are_refused(tokenizer):
    with pytest.raises(Refused, match="--text: 'green fish'.*rename"):
        prompts.encode(["red fish", "green fish"], tokenizer)


def test_a_tokenizer_with_other_delimiters_is_refused():
    class Other:
        def convert_tokens_to_ids(self, tokens):
            return list(range(len(tokens)))

    with pytest.raises(Refused, match="--model x: .*101"):
        prompts.check_tokenizer(Other(), "x")


def test_many_phrases_take_several_prompts():
    lengths = [3] * 100  # [CLS] and [SEP] leave 254 of 256 tokens: 84 phrases of 3
    groups = prompts.parts(lengths, 256)
    assert [len(group) for group in groups] == [84, 16] and sum(groups, []) == list(range(100))
    with pytest.raises(Refused, match="--eval: phrase 2 has 300 tokens.*shorten"):
        prompts.parts([3, 300], 256, "--eval")
