"""Grounding DINO and its processor: from a folder, by name from huggingface.co, or a tiny one with random weights."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import parallel
from detection.prompts import DELIMITERS
from parallel import Refused, import_optional

KINDS = ("grounding-dino", "mm-grounding-dino")
TINY = "tiny"
FILES = "config.json, model.safetensors, preprocessor_config.json (or processor_config.json) and the tokenizer's files"


class Detector(NamedTuple):
    network: nn.Module  # its config has `max_text_len` and, if detect.py has trained it, `trained_phrases`
    processor: Any  # transformers' GroundingDinoProcessor: `image_processor` and `tokenizer`


def import_transformers():
    transformers = import_optional("transformers", "detect.py", "'transformers>=4.55'")
    if not hasattr(transformers, "MMGroundingDinoConfig"):
        raise Refused(f"detect.py needs transformers 4.55 or later, not {transformers.__version__}: "
                      "pip install 'transformers>=4.55'")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load(model: str, device: torch.device) -> Detector:
    """The network of a folder or of OWNER/NAME on huggingface.co, in eval mode, and its processor.

    Raises Refused: no such folder or name, another kind of model, or files that are missing or don't belong together.
    """
    transformers, folder = import_transformers(), os.path.isdir(model)
    if not folder and (os.path.isdir(model.split("/")[0]) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model)):
        raise Refused(f"--model {model}: no such folder; give a folder with {FILES}, or OWNER/NAME of a model on "
                      "huggingface.co: IDEA-Research/grounding-dino-tiny")
    if not folder:
        parallel.say(f"--model {model}: not a folder; from the cache of huggingface.co, or fetched from there")
    try:
        config = transformers.AutoConfig.from_pretrained(model, local_files_only=folder)
        if config.model_type not in KINDS:
            raise Refused(f"--model {model}: a {config.model_type} model; give one of {' or '.join(KINDS)}")
        processor = transformers.AutoProcessor.from_pretrained(model, local_files_only=folder)
        network, report = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(
            model, output_loading_info=True, local_files_only=folder)
    except Refused:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # also of connections, and of sizes that don't fit
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Refused(f"--model {model}: can't be loaded ({reason}); the folder must hold {FILES}" if folder else
                      f"--model {model}: not a folder, and it can't be fetched ({reason}); where there is a network "
                      f"run `hf download {model} --local-dir FOLDER`, copy FOLDER here and give --model FOLDER"
                      ) from error
    if absent := sorted(report["missing_keys"]):  # the library would leave them random
        raise Refused(f"--model {model}: {len(absent)} of the network's parameters are not in its file of weights, "
                      f"{absent[0]} for one; give the file that belongs to its config.json")
    ids = dict(zip(DELIMITERS, processor.tokenizer.convert_tokens_to_ids(list(DELIMITERS)), strict=True))
    if ids != DELIMITERS:
        raise Refused(f"--model {model}: its tokenizer has the ids {ids}, Grounding DINO needs {DELIMITERS}; give a "
                      "model with the tokenizer that it was trained with")
    return Detector(network.float().to(device).eval(), processor)


def save(detector: Detector, folder: Path) -> None:
    """Write a folder for `from_pretrained`, which takes its name when it is complete."""
    new = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    detector.network.save_pretrained(new)
    detector.processor.save_pretrained(new)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def tiny(words: Sequence[str], pixels: int, device: torch.device, seed: int = 0) -> Detector:
    """A network of a million random parameters and a vocabulary of `words`, for images of `pixels` on the shorter side.

    Every part of Grounding DINO is there, as small as it works on images of about 100 pixels.
    """
    transformers = import_transformers()
    named = {number: token for token, number in (DELIMITERS | {"[PAD]": 0, "[UNK]": 100, "[MASK]": 103}).items()}
    tokens = [named.get(i, f"[unused{i}]") for i in range(1 + max(named))]
    vocabulary = {token: i for i, token in enumerate(tokens + sorted(set(words) - set(tokens)))}
    # Of `tokenizers`: how BertTokenizer takes a vocabulary differs between versions of transformers.
    pieces = import_optional("tokenizers", "detect.py", "tokenizers").BertWordPieceTokenizer(vocabulary)
    tokenizer = transformers.BertTokenizerFast(tokenizer_object=pieces._tokenizer)
    images = transformers.GroundingDinoImageProcessor(size={"shortest_edge": pixels, "longest_edge": 2 * pixels})
    backbone = transformers.ConvNextConfig(num_stages=3, hidden_sizes=[32, 64, 128], depths=[1, 2, 2],
                                           out_indices=[2, 3], drop_path_rate=0.0)
    width, heads = 64, 4
    text = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=width, num_hidden_layers=1, num_attention_heads=heads,
        intermediate_size=2 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = transformers.MMGroundingDinoConfig(
        backbone_config=backbone, text_config=text, d_model=width, num_queries=16, num_feature_levels=2,
        encoder_layers=2, decoder_layers=2, encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width,
        encoder_attention_heads=heads, decoder_attention_heads=heads, dropout=0.0, fusion_droppath=0.0)
    torch.manual_seed(seed)
    network = transformers.MMGroundingDinoForObjectDetection(config)
    return Detector(network.to(device).eval(), transformers.GroundingDinoProcessor(images, tokenizer))
