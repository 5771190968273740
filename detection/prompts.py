"""Prompts of phrases, as Grounding DINO reads them: "red fish . blue cup ."

Four ids end a phrase, [CLS], [SEP], "." and "?": a token attends to those of its own phrase only (sub-sentence masks,
section 3.4), so what a phrase means doesn't depend on its neighbours. Phrases are {category id: phrase}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parallel import Refused

DELIMITERS = {"[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}  # token -> id, which transformers has as constants


class Prompt(NamedTuple):
    categories: list[int]  # (P,): their ids
    ids: Tensor  # int64 (1, T)
    spans: Tensor  # bool (P, T): the tokens of each phrase


def parse(text: str, flag: str = "--text") -> dict[int, str]:
    """The phrases of "red fish . blue cup .". Raises Refused: no phrase, no separator, or a phrase twice."""
    phrases = [phrase for part in text.split(".") if (phrase := clean(part))]
    if not phrases:
        raise Refused(f"{flag} {text!r}: no phrase in it; give phrases that end with a period: 'red fish . blue cup .'")
    if "." not in text:
        raise Refused(f"{flag} {text!r}: no separator; end each phrase with a period: '{text.strip()} .'")
    if repeated := [phrase for phrase in phrases if phrases.count(phrase) > 1]:
        raise Refused(f"{flag} {text!r}: {repeated[0]!r} is in it twice; name each phrase once")
    return dict(enumerate(phrases, 1))


def clean(name: str) -> str:
    """A category's name as a phrase: lower case, single spaces, and none of the characters that end a phrase."""
    return " ".join(name.lower().replace(".", " ").replace("?", " ").split())


def lengths(phrases: Mapping[int, str], tokenizer, limit: int, flag: str) -> dict[int, int]:
    """Tokens that each phrase takes in a prompt of `limit`, its period included.

    Raises Refused: a phrase that no prompt holds with [CLS] and [SEP], or a word that the tokenizer doesn't know.
    """
    counts = {}
    for category, phrase in phrases.items():
        ids = tokenizer(phrase, add_special_tokens=False)["input_ids"]
        if not ids or {tokenizer.unk_token_id, *DELIMITERS.values()} & set(ids):
            raise Refused(f"{flag}: {phrase!r} has a word that the model's vocabulary lacks; leave it out or rename it")
        if len(ids) + 3 > limit:
            raise Refused(f"{flag}: {phrase[:80]!r} has {len(ids)} tokens, the model reads {limit - 3}; shorten it")
        counts[category] = len(ids) + 1
    return counts


def encode(phrases: Mapping[int, str], categories: Sequence[int], tokenizer) -> Prompt:
    """The prompt of some of the phrases, in this order."""
    ids = torch.tensor(tokenizer(" ".join(f"{phrases[k]} ." for k in categories))["input_ids"])
    ends = torch.isin(ids, torch.tensor(list(DELIMITERS.values())))
    phrase = torch.where(ends, 0, ends.cumsum(0))  # [CLS] is the first end, so that phrases count from 1
    return Prompt(list(categories), ids[None], phrase == torch.arange(1, len(categories) + 1)[:, None])


def shared_out(phrases: Mapping[int, str], tokenizer, limit: int, flag: str = "--text") -> list[Prompt]:
    """Prompts that together hold the phrases, in order. Raises Refused as `lengths` does."""
    groups, left = [], 0
    for category, length in lengths(phrases, tokenizer, limit, flag).items():
        if length > left:
            groups.append([])
            left = limit - 2
        groups[-1].append(category)
        left -= length
    return [encode(phrases, group, tokenizer) for group in groups]
