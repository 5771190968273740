"""Prompts of phrases, as Grounding DINO reads them: "red fish . blue cup ."

The network reads one text for an image. Four ids end a phrase, [CLS], [SEP], "." and "?": a token attends to those of
its own phrase only (sub-sentence masks, section 3.4), so what a phrase means doesn't depend on its neighbours.

Shapes: P phrases, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parallel import Refused

DELIMITERS = {"[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}  # token -> id, which transformers has as constants


class Prompt(NamedTuple):
    phrases: list[str]
    ids: Tensor  # int64 (1, T)
    spans: Tensor  # bool (P, T): the tokens of each phrase


def parse(text: str, flag: str = "--text") -> list[str]:
    """The phrases of "red fish . blue cup .", in lower case.

    Raises:
        Refused: no phrase, no separator, or a phrase twice.
    """
    if not text.strip(" .?"):
        raise Refused(f"{flag} {text!r}: no phrase in it; give phrases that end with a period: 'red fish . blue cup .'")
    if "." not in text:
        raise Refused(f"{flag} {text!r}: no separator; end each phrase with a period: '{text.strip()} .'")
    phrases = [phrase for part in text.split(".") if (phrase := clean(part))]
    if repeated := {phrase for phrase in phrases if phrases.count(phrase) > 1}:
        raise Refused(f"{flag} {text!r}: {sorted(repeated)[0]!r} is in it twice; name each phrase once")
    return phrases


def clean(name: str) -> str:
    """A category's name as a phrase: lower case, single spaces, and none of the characters that end a phrase."""
    return " ".join(name.lower().replace(".", " ").replace("?", " ").split())


def check_tokenizer(tokenizer, model: str) -> None:
    """Raise Refused if the tokenizer's delimiters are not those that the network has as constants."""
    ids = dict(zip(DELIMITERS, tokenizer.convert_tokens_to_ids(list(DELIMITERS)), strict=True))
    if ids != DELIMITERS:
        raise Refused(f"--model {model}: its tokenizer has the ids {ids}, Grounding DINO needs {DELIMITERS}; give a "
                      "model with the tokenizer that it was trained with")


def encode(phrases: Sequence[str], tokenizer, flag: str = "--text") -> Prompt:
    """Tokens of the phrases in this order.

    Raises:
        Refused: a word that the tokenizer doesn't know.
    """
    ids = torch.tensor(tokenizer(" ".join(f"{phrase} ." for phrase in phrases))["input_ids"])
    if (ids == tokenizer.unk_token_id).any():
        unknown = next(p for p in phrases if tokenizer.unk_token_id in tokens(p, tokenizer))
        raise Refused(f"{flag}: {unknown!r} has a word that the model's vocabulary lacks; leave it out or rename it")
    ends = torch.isin(ids, torch.tensor(list(DELIMITERS.values())))
    number = torch.where(ends, 0, ends.cumsum(0))  # [CLS] is the first end, so that phrases count from 1
    spans = number == torch.arange(1, len(phrases) + 1)[:, None]
    if not spans.any(1).all() or number.max() > len(phrases):
        raise Refused(f"{flag}: the model's tokenizer makes other phrases of {' . '.join(phrases)[:200]!r}; use words "
                      "without punctuation")
    return Prompt(list(phrases), ids[None], spans)


def tokens(phrase: str, tokenizer) -> list[int]:
    return tokenizer(phrase, add_special_tokens=False)["input_ids"]


def lengths(phrases: Sequence[str], tokenizer) -> list[int]:
    """Tokens that each phrase takes in a prompt, its period included."""
    return [len(tokens(phrase, tokenizer)) + 1 for phrase in phrases]


def parts(lengths: Sequence[int], limit: int, flag: str = "--text") -> list[list[int]]:
    """Indices of the phrases, in order, in as few prompts as hold them.

    Args:
        lengths: tokens of each phrase, see `lengths`.
        limit: tokens of a prompt, with [CLS] and [SEP].

    Raises:
        Refused: a phrase that no prompt holds.
    """
    if max(lengths) > limit - 2:
        raise Refused(f"{flag}: phrase {lengths.index(max(lengths)) + 1} has {max(lengths)} tokens, the model reads "
                      f"{limit - 2} of a prompt; shorten it")
    groups, used = [[]], 2
    for i, length in enumerate(lengths):
        if used + length > limit:
            groups.append([])
            used = 2
        groups[-1].append(i)
        used += length
    return groups
