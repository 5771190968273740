"""Write a backbone in the formats of other libraries.

Every function of FORMATS has the signature (model, about, path, **options) -> Run: it writes `path`, reads it back with
the library, and returns that library's features, (B, C, height, width) -> (B, D). `about` describes the network in
plain values (export.describe); the options are the flags of export.py that are for this format. Optional packages are
imported in the function that needs them.

Shapes: B images, C channels, N tokens, D width; sizes are height x width in pixels.
"""

from __future__ import annotations

import copy
import json
import math
import re
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from parallel import Refused, Stopped, import_optional
from protocols import scores
from vision_transformer import XCITS, SwiGLU, VisionTransformer
from weights import backbones
from weights.layouts import to_timm_registers, to_xcit

Run = Callable[[Tensor], Tensor]
# The formats that are files; the others are folders.
SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors", "torch": ".pt2", "published": ".pth"}


class Differs(Stopped):
    """A library reads or computes something else from the written file than this project."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the library computes other features ({reason}); nothing was written")


def need(kind: str, *packages: str) -> list[types.ModuleType]:
    """Import the optional packages of a format. Raises Refused with the pip command."""
    return [import_optional(name, f"--format {kind}", " ".join(packages)) for name in packages]


@contextmanager
def exporting(kind: str) -> Iterator[None]:
    """For the exporter's own call only: there, an error means that it does not support the network.

    Raises:
        Refused: RuntimeError or ValueError in the block.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise Refused(f"--format {kind}: this network can't be exported ({reason}); choose another format") from error


def same(what: str, theirs, expected) -> None:
    """Raises Differs where a library reads another value than the expected one."""
    if theirs != expected:
        raise Differs(f"{what}: {theirs} instead of {expected}")


def save_tensors(state: Mapping[str, Tensor], path: Path, about: Mapping) -> None:
    """A safetensors file with `about` in its metadata, as JSON, which `backbones.load_backbone` reads."""
    from safetensors.torch import save

    metadata = {"format": "pt"} | {k: json.dumps(v) for k, v in about.items()}
    # Not by the library's save_file, which writes files that only their owner can read.
    path.write_bytes(save({k: v.contiguous().clone() for k, v in state.items()}, metadata))


# ---- Graphs: ONNX and torch.export ----


def positions_of_any_size(self: VisionTransformer, x: Tensor, w: int, h: int) -> Tensor:
    """`interpolate_pos_encoding` without a branch on the size, for graphs with dynamic sizes: (1, 1 + patches, D).

    Bicubic interpolation of the grid P is R P C^T, with one matrix for rows and one for columns. At the stored size
    the step between rows is 1, and both matrices are the identity.
    """
    n_stored = self.pos_embed.shape[1] - 1
    side = math.isqrt(n_stored)
    rows, columns = self.patch_embed.grid(w, h)
    as_stored = (torch.scalar_tensor(rows * columns) == n_stored) & (torch.scalar_tensor(w) == torch.scalar_tensor(h))

    def cubic(n: int) -> Tensor:  # (n, side)
        step = torch.where(as_stored, 1.0, side / (torch.scalar_tensor(n) + self.interpolate_offset))
        at = (torch.arange(n) + 0.5) * step - 0.5
        taps = at.floor()[:, None] + torch.arange(-1, 3)  # (n, 4)
        d = (at[:, None] - taps).abs()
        near, far = (1.25 * d - 2.25) * d * d + 1, ((-0.75 * d + 3.75) * d - 6) * d + 3  # Keys 1981, a = -0.75
        weights = torch.where(d <= 1, near, far)
        return (weights[..., None] * (taps.clamp(0, side - 1)[..., None] == torch.arange(side))).sum(1)

    patches = self.pos_embed[0, 1:].reshape(side, side, -1)
    patches = torch.einsum("ri,cj,ijd->rcd", cubic(rows), cubic(columns), patches).flatten(0, 1)
    return torch.cat([self.pos_embed[0, :1], patches])[None]


def traceable(model: nn.Module, about: dict, dynamic_size: bool) -> tuple[nn.Module, tuple[Tensor], tuple[dict]]:
    """The network in a form that torch.export accepts, its arguments to trace with, and their dynamic dimensions."""
    height, width = about["image_size"], about["image_size"]
    shapes = {0: torch.export.Dim("batch", min=1, max=65536)}
    if dynamic_size:
        if isinstance(model, VisionTransformer):
            if model.interpolate_antialias:
                raise Refused("--dynamic_size: not supported with antialiased interpolation of position embeddings "
                              "(DINOv2 with registers); give --image_size")
            model = copy.deepcopy(model)
            model.interpolate_pos_encoding = types.MethodType(positions_of_any_size, model)
        shapes |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
        # Dynamic sides must differ from the network's own size, and from each other.
        height, width = height + 2 * about["patch_size"], height + 3 * about["patch_size"]
    return model, (torch.randn(2, about["in_chans"], height, width),), (shapes,)


def to_onnx(model: nn.Module, about: dict, path: Path, dynamic_size: bool, opset: int) -> Run:
    onnx, onnxruntime = need("onnx", "onnx", "onnxruntime", "onnxscript")[:2]
    model, images, shapes = traceable(model, about, dynamic_size)
    with exporting("onnx"):
        torch.onnx.export(model, images, path, dynamo=True, opset_version=opset, dynamic_shapes=shapes,
                          input_names=["images"], output_names=["features"], external_data=False, verbose=False)
    written = onnx.load(path)
    exported = next(o.version for o in written.opset_import if not o.domain)
    if exported != opset:  # if torch can't convert the operators, it keeps its own version and only warns
        raise Refused(f"--opset {opset}: torch can't export this network with it; give {exported}")
    onnx.helper.set_model_props(written, {k: json.dumps(v) for k, v in about.items()})
    onnx.checker.check_model(written)
    onnx.save(written, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def to_torch(model: nn.Module, about: dict, path: Path, dynamic_size: bool) -> Run:
    model, images, shapes = traceable(model, about, dynamic_size)
    with exporting("torch"):
        program = torch.export.export(model, images, dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={"about.json": json.dumps(about)})
    return torch.export.load(path).module()


# ---- The published backbone's file ----


def to_published(model: nn.Module, about: dict, path: Path) -> Run:
    """A plain state dict under the published names: `model.load_state_dict(torch.load(path), strict=True)`.

    Mean, std and the rest of `about` are in the metadata that torch keeps with a state dict, where
    `layouts.stored_args` finds them.
    """
    state = OrderedDict(to_xcit(model.state_dict()))
    state._metadata = OrderedDict({"": {"version": 1, "args": about}})
    torch.save(state, path)
    theirs = copy.deepcopy(model)
    for tensor in theirs.state_dict().values():
        tensor.zero_()
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return theirs


# ---- safetensors and timm ----


def to_safetensors(model: nn.Module, about: dict, path: Path) -> Run:
    """Tensors under this project's names."""
    save_tensors(model.state_dict(), path, about)
    return backbones.load_backbone(str(path))[0]


def to_timm(model: nn.Module, about: dict, path: Path, license: str) -> Run:
    timm = need("timm", "timm")[0]
    arch, kwargs = XCITS.get(about["arch"], about["arch"]), dict(about.get("timm_args", {}))
    state = dict(model.state_dict())
    if isinstance(model, VisionTransformer):
        arch, kwargs, state = timm_vit(model, about)
    if not timm.is_model(arch):
        raise Refused(f"--format timm: timm has no {arch}; choose safetensors, onnx or torch")
    theirs = timm.create_model(arch, num_classes=0, in_chans=about["in_chans"], **kwargs)
    try:
        theirs.load_state_dict(state)
    except RuntimeError as error:
        raise Refused(f"--format timm: timm's {arch} has other tensors ({str(error).splitlines()[1].strip()}); choose "
                      "safetensors, onnx or torch") from error
    config = {
        "architecture": arch, "num_classes": 0, "num_features": about["embed_dim"],
        "model_args": kwargs | ({"in_chans": about["in_chans"]} if about["in_chans"] != 3 else {}),
        "pretrained_cfg": {
            "input_size": [about["in_chans"], about["image_size"], about["image_size"]], "interpolation": "bicubic",
            "crop_pct": about["image_size"] / about["resize_size"], "crop_mode": "center", "mean": about["mean"],
            "std": about["std"], "num_classes": 0, **({"license": license} if license else {}),
        },
        "about": about,
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tensors(state, path / "model.safetensors", about)
    theirs = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(theirs)
    same("mean and std", (list(config["mean"]), list(config["std"])), (about["mean"], about["std"]))
    return theirs


def timm_vit(model: VisionTransformer, about: dict) -> tuple[str, dict, dict[str, Tensor]]:
    """Name, options and tensors of timm's ViT."""
    kwargs = {
        "img_size": about["image_size"], "patch_size": about["patch_size"], "embed_dim": model.embed_dim,
        "depth": len(model.blocks), "num_heads": model.blocks[0].attn.num_heads, "dynamic_img_size": True,
    }
    state = {k: v for k, v in model.state_dict().items() if k != "mask_token"}
    if not isinstance(model.blocks[0].ls1, nn.Identity):
        kwargs["init_values"] = 1.0
    if model.num_register_tokens:
        kwargs |= {"reg_tokens": model.num_register_tokens, "no_embed_class": True}
        state = to_timm_registers(state)
    if isinstance(model.blocks[0].mlp, SwiGLU):
        kwargs["mlp_ratio"] = model.blocks[0].mlp.w12.out_features / model.embed_dim
        kwargs.setdefault("init_values", 0.0)  # timm's network has LayerScale unless told otherwise; it ignores None
        state = {k.replace(".w12.", ".fc1.").replace(".w3.", ".fc2."): v for k, v in state.items()}
        return "vit_giant_patch14_dinov2", kwargs, state
    size = {192: "tiny", 384: "small", 1024: "large"}.get(model.embed_dim, "base")
    return f"vit_{size}_patch16_224", kwargs, state


# ---- Hugging Face ----


def to_hf(
    model: nn.Module, about: dict, path: Path, license: str, training_data: str, results: Sequence[tuple[str, dict]]
) -> Run:
    if not isinstance(model, VisionTransformer):
        raise Refused(f"--format hf: {about['arch']} is no Vision Transformer; choose timm, safetensors or onnx")
    transformers = need("hf", "transformers")[0]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind, kwargs, names = hf_vit(model)
    kind = getattr(transformers, kind)
    config = kind.config_class(
        hidden_size=model.embed_dim, num_hidden_layers=len(model.blocks), image_size=about["image_size"],
        num_attention_heads=model.blocks[0].attn.num_heads, patch_size=about["patch_size"], qkv_bias=True,
        num_channels=about["in_chans"], layer_norm_eps=model.norm.eps, hidden_act="gelu", **kwargs,
    )
    config.architectures = [kind.__name__]
    config.save_pretrained(path)
    save_tensors(hf_state(model, names), path / "model.safetensors", about)
    transformers.BitImageProcessor(
        size={"shortest_edge": about["resize_size"]}, crop_size=about["image_size"], resample=3,
        image_mean=about["mean"], image_std=about["std"], do_convert_rgb=about["in_chans"] == 3,
    ).save_pretrained(path)
    (path / "README.md").write_text(model_card(about, kind.__name__, license, training_data, results))
    theirs, loaded = kind.from_pretrained(path, output_loading_info=True)
    same("missing tensors", list(loaded["missing_keys"]), [])
    same("unexpected tensors", list(loaded["unexpected_keys"]), [])
    processor = transformers.AutoImageProcessor.from_pretrained(path)
    same("mean and std", (list(processor.image_mean), list(processor.image_std)), (about["mean"], about["std"]))
    theirs.eval()
    return lambda x: theirs(pixel_values=x).last_hidden_state[:, 0]


HF_BLOCK = {"attn.proj": "attention.output.dense"}
HF_VIT = HF_BLOCK | {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense",
                     "mlp.fc2": "output.dense"}  # fmt: skip
HF_DINOV2 = HF_BLOCK | {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
                        "mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out"}  # fmt: skip


def hf_vit(model: VisionTransformer) -> tuple[str, dict, dict]:
    """Name of the library's class, further options of its configuration, and its names for the parts of a block."""
    gated = isinstance(model.blocks[0].mlp, SwiGLU)
    ratio = 4 if gated else model.blocks[0].mlp.fc1.out_features // model.embed_dim
    kwargs = {"mlp_ratio": ratio} | ({"use_swiglu_ffn": True} if gated else {})
    if model.num_register_tokens:
        return "Dinov2WithRegistersModel", kwargs | {"num_register_tokens": model.num_register_tokens}, HF_DINOV2
    if gated or model.mask_token is not None or not isinstance(model.blocks[0].ls1, nn.Identity):
        return "Dinov2Model", kwargs, HF_DINOV2
    return "ViTModel", {"intermediate_size": ratio * model.embed_dim, "pooler_act": "linear"}, HF_VIT


def hf_state(model: VisionTransformer, names: dict[str, str]) -> dict[str, Tensor]:
    """Tensors under the names that the library uses in its files, which all of its versions read."""
    top = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
           "register_tokens": "embeddings.register_tokens", "mask_token": "embeddings.mask_token"}  # fmt: skip
    state = dict(model.state_dict())
    if names is HF_VIT:  # without them the library makes random ones at each load; these hand the class token on
        state |= {"pooler.dense.weight": torch.eye(model.embed_dim), "pooler.dense.bias": torch.zeros(model.embed_dim)}
    if names is HF_DINOV2:
        state.setdefault("mask_token", torch.zeros(1, model.embed_dim))
        for i in range(len(model.blocks)):  # the library's network always has LayerScale: factors of 1 if ours has none
            for j in "12":
                state.setdefault(f"blocks.{i}.ls{j}.gamma", torch.ones(model.embed_dim))
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^norm\.", "layernorm.", top.get(name, name))
        name = name.replace("patch_embed.proj.", "embeddings.patch_embeddings.projection.")
        if match := re.match(r"blocks\.(\d+)\.(.*)", name):
            part = next((re.sub(f"^{re.escape(old)}", new, match[2]) for old, new in names.items()
                         if match[2].startswith(old)), match[2])  # fmt: skip
            name = f"encoder.layer.{match[1]}.{part}"
        if ".attn.qkv." in name:
            for one, tensor in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.attention.{one}")] = tensor
        else:
            renamed[name] = value
    return renamed


METHODS = {"dino": ("DINO", "2104.14294"), "dinov2": ("DINOv2", "2304.07193")}  # name, arXiv number


def model_card(about: dict, kind: str, license: str, training_data: str, results: Sequence[tuple[str, dict]]) -> str:
    """README.md of a Hugging Face folder: origin of the weights, usage, and measured accuracies only.

    Args:
        results: (path, content) of evaluations' results files.
    """
    method, paper = METHODS.get(about.get("method"), ("", ""))  # else nothing is said of it
    what = f"Self-supervised backbone (arXiv {paper})" if method else "Backbone"
    pooler = " (versions of transformers that do not read `pooler_act` apply tanh to it)" if kind == "ViTModel" else ""
    card = f"""---
{f"license: {license}" if license else "# license: not stated"}
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [{f"{method.lower()}, self-supervised, " if method else ""}vision]
---
# {about['arch']}, patch {about['patch_size']}{f", trained with {method}" if method else ""}

{what}. Training data: {' '.join(training_data.split())}.
Weights (SHA-256 over the network's tensors): `{about['weights_sha256']}`

```python
from transformers import AutoImageProcessor, {kind}

processor, model = AutoImageProcessor.from_pretrained("."), {kind}.from_pretrained(".").eval()
features = model(**processor(images=image, return_tensors="pt")).last_hidden_state[:, 0]  # (1, {about['embed_dim']})
```

The feature is the class token of `last_hidden_state`, after the last norm. `pooler_output` is the same \
vector{pooler}; it is not trained separately.
Images: {about['in_chans']} channels, {about['image_size']} x {about['image_size']} pixels, mean {about['mean']}, \
std {about['std']}.

## Evaluation
"""
    for path, report in results:
        rows = [{k: v for k, v in row.items() if k != "per_class"} for row in report["results"]]
        lines = [list(rows[0])] + [["---"] * len(rows[0])] + [[scores.cell_text(v) for v in r.values()] for r in rows]
        card += f"\n`{report.get('command', Path(path).stem)}`, in %, with 95 % interval:\n\n"
        card += "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return card if results else card + "\nNot evaluated.\n"


FORMATS = {"onnx": to_onnx, "safetensors": to_safetensors, "timm": to_timm, "hf": to_hf, "torch": to_torch,
           "published": to_published}


