"""Grounding DINO and its processor: from a folder, by name from huggingface.co, or a tiny one with random weights."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import parallel
from detection import prompts
from parallel import Refused, import_optional

KINDS = {"grounding-dino": "GroundingDinoForObjectDetection", "mm-grounding-dino": "MMGroundingDinoForObjectDetection"}
TINY = "tiny"
TRAINED = "phrases.json"  # beside the weights
FILES = "config.json, model.safetensors, preprocessor_config.json (or processor_config.json) and the tokenizer's files"


class Detector(NamedTuple):
    network: nn.Module
    processor: Any  # transformers' GroundingDinoProcessor: `image_processor` and `tokenizer`
    device: torch.device
    trained: frozenset[str] = frozenset()  # phrases that detect.py has trained it on, if it has

    @property
    def limit(self) -> int:
        """Tokens of a prompt."""
        return self.network.config.max_text_len


def import_transformers():
    """The library, quiet; MM Grounding DINO and its `threshold` are in 4.55 and later."""
    transformers = import_optional("transformers", "detect.py", "'transformers>=4.55'")
    if tuple(int(n) for n in re.findall(r"\d+", transformers.__version__)[:2]) < (4, 55):
        raise Refused(f"detect.py needs transformers 4.55 or later, not {transformers.__version__}: "
                      "pip install 'transformers>=4.55'")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load(model: str, device: torch.device) -> Detector:
    """The network, in eval mode, and its processor.

    Args:
        model: a folder as `save_pretrained` writes it, or OWNER/NAME on huggingface.co, which is fetched unless the
            library's cache has it.

    Raises:
        Refused: no such folder or name, another kind of model, or files that are missing or don't belong together.
    """
    transformers = import_transformers()
    folder = check_name(model)
    offline = {"local_files_only": True} if folder else {}
    try:
        config = transformers.AutoConfig.from_pretrained(model, **offline)
        if config.model_type not in KINDS:
            raise Refused(f"--model {model}: a {config.model_type} model; give one of {' or '.join(KINDS)}")
        processor = transformers.AutoProcessor.from_pretrained(model, **offline)
        network, report = getattr(transformers, KINDS[config.model_type]).from_pretrained(
            model, output_loading_info=True, dtype=torch.float32, **offline)
    except (OSError, ValueError, RuntimeError) as error:  # also of connections, and of sizes that don't fit
        if isinstance(error, Refused):
            raise
        raise Refused(not_loaded(model, folder, error)) from error
    if absent := sorted(set(report["missing_keys"])):
        raise Refused(f"--model {model}: {len(absent)} of the network's parameters are not in its file of weights, "
                      f"{absent[0]} for one; give the file that belongs to its config.json")
    prompts.check_tokenizer(processor.tokenizer, model)
    return Detector(network.to(device).eval(), processor, device, trained_phrases(model) if folder else frozenset())


def trained_phrases(folder: str) -> frozenset[str]:
    path = Path(folder) / TRAINED
    return frozenset(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else frozenset()


def check_name(model: str) -> bool:
    """Whether `model` is a folder; else it is a name, of which the user is told that it may be fetched."""
    if os.path.isdir(model):
        if not os.path.isfile(os.path.join(model, "config.json")):
            raise Refused(f"--model {model}: no config.json in this folder; it must hold {FILES}")
        return True
    owner, _, name = model.partition("/")
    if os.path.isdir(owner) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        raise Refused(f"--model {model}: no such folder; give a folder with {FILES}, or OWNER/NAME of a model on "
                      "huggingface.co: IDEA-Research/grounding-dino-tiny")
    parallel.say(f"--model {model}: not a folder; from the cache of huggingface.co, or fetched from there")
    return False


def not_loaded(model: str, folder: bool, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if folder:
        return f"--model {model}: can't be loaded ({reason}); the folder must hold {FILES}"
    return (f"--model {model}: not a folder, and it can't be fetched ({reason}); where there is a network run "
            f"`hf download {model} --local-dir FOLDER`, copy FOLDER to this machine and give --model FOLDER")


def save(detector: Detector, folder: str | os.PathLike) -> None:
    """Write a folder for `from_pretrained`, which replaces the one of that name when it is complete."""
    folder = Path(folder)
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        detector.network.save_pretrained(new)
        detector.processor.save_pretrained(new)
        (new / TRAINED).write_text(json.dumps(sorted(detector.trained)), encoding="utf-8")
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        for rest in (new, old):
            shutil.rmtree(rest, ignore_errors=True)


# ---- A tiny network ----


def tiny(words: Sequence[str], pixels: int, device: torch.device, seed: int = 0) -> Detector:
    """A network of a million parameters with random weights and a vocabulary of `words`, to train on a CPU.

    Every part of Grounding DINO is there, as small as it works on images of about 100 pixels.

    Args:
        words: of the phrases, in lower case.
        pixels: shorter side that images are resized to.
    """
    transformers = import_transformers()
    vocabulary = {f"[unused{i}]": i for i in range(1 + max(prompts.DELIMITERS.values()))}
    named = prompts.DELIMITERS | {"[PAD]": 0, "[UNK]": 100, "[MASK]": 103}
    for token, number in named.items():
        del vocabulary[f"[unused{number}]"]
        vocabulary[token] = number
    for word in sorted(set(words) - set(vocabulary)):
        vocabulary[word] = len(vocabulary)
    tokenizer = transformers.BertTokenizer(vocab=vocabulary)  # with vocab_file= every word would be [UNK]
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
    return Detector(network.to(device).eval(), transformers.GroundingDinoProcessor(images, tokenizer), device)
