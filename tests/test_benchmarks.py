"""The benchmarks run on tiny sizes, without a word about time; what they count and compare is right."""

import importlib
import json
import shlex
from pathlib import Path

import bench
import kinds
import model
import naive
import numpy as np
import ours
import pytest
import torch
from traffic import Traffic

import utils
from imagesets.sources import open_images
from method import fused, targets
from pretraining.session import Ends
from pretraining.state import Run
from vision_transformer import accepts

TINY = {"arch": "vit_nano", "size": 32, "k": 64, "drop_path": 0.1}
SCRIPTS = ["train_step", "loss", "memory", "prototypes", "data_pipeline", "end_to_end", "startup", "model",
           "attention", "knn", "linear", "listing", "convolutions", "neighbours", "duplicates", "less_work",
           "variants", "patches"]

RECORDED = {"end_to_end": 3, "less_work": 2, "variants": 3}  # lines, each written as soon as it is measured


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs_and_leaves_a_line_of_json(name, tmp_path, capsys):
    script = importlib.import_module(f"benchmarks.{name}")  # some have the names of modules
    args = script.get_args_parser().parse_args(["--quick", "--json", str(tmp_path / "out.jsonl")])
    assert script.main(args) == 0
    assert "|" in capsys.readouterr().out
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert len(lines) == RECORDED.get(name, 1)
    for line in lines:
        seen = json.loads(line)
        assert seen["benchmark"] == name and seen["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize("device, compiled", [("cpu", ""), ("cuda", "default")])
def test_timed_steps_are_compiled_as_a_long_run_is(device, compiled, monkeypatch):
    """`auto` is a word of the training script's, and no mode of torch.compile."""
    import less_work

    class Made(Exception):
        pass

    def trainer(*args, compiled, **options):
        raise Made(compiled)

    monkeypatch.setattr(less_work, "pick_device", lambda name: torch.device(name))
    monkeypatch.setattr(less_work.networks, "half_precision", lambda *args: None)
    args = less_work.get_args_parser().parse_args(["--quick", "--step_only", "--device", device])
    monkeypatch.setattr(bench, "header", lambda *args: None)
    if device == "cpu":
        assert less_work.main(args) == 0
    monkeypatch.setattr(ours, "Trainer", trainer)
    with pytest.raises(Made, match=f"^{compiled}$"):
        less_work.main(args)


def test_flags_of_all_variants_are_checked_before_the_first_run(monkeypatch):
    import less_work

    monkeypatch.setattr(less_work, "run", lambda *args: pytest.fail("a run has begun"))
    argv = ["--script", "main_dinov2.py", "--preset", "dinov2_shapes"]
    for wrong, words in (["--drop", "0.5"], "patches dropped.*--token_drop 0.5 0.*--mask_ratio"), (
                         ["--flags", "--epochs 2"], "plain.*--warmup_teacher_temp_epochs"):
        with pytest.raises(SystemExit, match=words):
            less_work.main(less_work.get_args_parser().parse_args([*argv, *wrong]))
    assert less_work.main(less_work.get_args_parser().parse_args([*argv, "--count"])) == 0
    large = ["--count", "--preset", "imagenet_vits16_100ep", "--low", "112", "48", "--fewer", "60"]  # names no images
    assert less_work.main(less_work.get_args_parser().parse_args(large)) == 0


def test_runs_that_were_recorded_are_not_made_again(tmp_path, monkeypatch, capsys):
    import less_work

    def run(script, flags, device, evaluated):
        made.append(flags[flags.index("--seed") + 1])
        if len(made) == 2:
            raise KeyboardInterrupt
        return {"seconds": 1.0, "top1": 50.0, "steps": 8, "flop": 2.0}

    made = []
    monkeypatch.setattr(less_work, "run", run)
    argv = ["--only", "plain", "--seeds", "0", "1", "--json", str(tmp_path / "runs.jsonl")]
    with pytest.raises(KeyboardInterrupt):
        less_work.main(less_work.get_args_parser().parse_args(argv))
    assert less_work.main(less_work.get_args_parser().parse_args(argv)) == 0
    assert made == ["0", "1", "1"] and "50.0, 50.0" in capsys.readouterr().out
    less_work.main(less_work.get_args_parser().parse_args([*argv, "--flags", "--epochs 6"]))
    assert made == ["0", "1", "1", "0", "1"]


def test_parity_compares_the_ways_and_ends_at_the_first_that_is_off(tmp_path, monkeypatch, capsys):
    import parity

    args = parity.get_args_parser().parse_args(["--quick", "--json", str(tmp_path / "out.jsonl")])
    assert parity.main(args) == 0
    assert "| bf16, layers checkpointed" in capsys.readouterr().out
    lines = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {x["benchmark"] for x in lines} == {"parity"} and len(lines) == 6
    monkeypatch.setitem(parity.WAYS, "fp32", ({}, 1e-12))
    with pytest.raises(SystemExit, match="fp32: the gradient is off by"):
        parity.main(args)


def test_flags_of_the_gpus_sections_exist():
    import on_gpu

    for section in on_gpu.SECTIONS:
        importlib.import_module(section.script).get_args_parser().parse_args(shlex.split(section.flags))
    assert sum(section.seconds for section in on_gpu.SECTIONS[:4]) <= 300


def test_sections_for_a_gpu_end_in_their_boxes(tmp_path, monkeypatch, capsys):
    """One that hangs is stopped with its children, the next still runs, and the minutes end the call."""
    import on_gpu

    (tmp_path / "on_gpu.py").touch()
    monkeypatch.setattr(on_gpu, "__file__", str(tmp_path / "on_gpu.py"))
    (tmp_path / "hangs.py").write_text(f"""import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(60)""")
    (tmp_path / "prints.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.setattr(on_gpu, "SHORTEST", 1)
    monkeypatch.setattr(on_gpu, "SECTIONS", [on_gpu.Section("hangs", "", 2), on_gpu.Section("prints", "", 60)])
    args = on_gpu.get_args_parser().parse_args(["--device", "cpu", "--minutes", "1"])
    assert on_gpu.main(args) == 0
    assert (tmp_path / "ran").exists() and "stopped after 2 s" in capsys.readouterr().out
    child = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    args.minutes = 0.001
    assert on_gpu.main(args) == 0 and "not run: hangs, prints" in capsys.readouterr().out


def test_a_failed_comparison_ends_the_call(tmp_path, monkeypatch):
    import on_gpu

    monkeypatch.setattr(on_gpu, "__file__", str(tmp_path / "on_gpu.py"))
    (tmp_path / "parity.py").write_text("raise SystemExit('off')")
    (tmp_path / "prints.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.setattr(on_gpu, "SECTIONS", [on_gpu.Section("parity", "", 60), on_gpu.Section("prints", "", 60)])
    assert on_gpu.main(on_gpu.get_args_parser().parse_args(["--device", "cpu"])) == 1
    assert not (tmp_path / "ran").exists()


def test_what_is_not_compiled_is_recorded_before_anything_is(tmp_path, monkeypatch):
    import train_step

    argv = ["--quick", "--compile", "--json", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr(ours.networks, "compile_networks", lambda *args: pytest.fail("compiles"))
    with pytest.raises(pytest.fail.Exception):
        train_step.main(train_step.get_args_parser().parse_args(argv))
    (line,) = (json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines())
    assert line["batch"] == 2 and {"naive, a pass a resolution", "ours", "ours, all tokens"} < set(line["variants"])


@pytest.mark.parametrize("flag", ["--all_tokens", "--grad_checkpointing", "--profile"])
def test_a_resnet_has_no_layers_of_a_vit(flag):
    import train_step

    args = train_step.get_args_parser().parse_args(["--arch", "resnet18", "--sizes", "32", "16", flag])
    with pytest.raises(SystemExit, match=f"{flag} --arch resnet18.*choose a ViT"):
        train_step.main(args)


def test_peak_memory_is_that_of_one_trainer(monkeypatch):
    """Another trainer holds 1000 bytes. This one holds 100, needs 50 more, and keeps 20 of them."""
    import train_step

    memory = {"now": 1100, "peak": 5000}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: memory["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: memory.update(peak=memory["now"]))
    assert train_step.peak_of(lambda: memory.update(now=1120, peak=1150), 100) == (150, 120)
    assert train_step.peak_of(lambda: memory.update(peak=1170), 120) == (170, 120)


def test_attention_by_other_kernels_has_a_graph_of_its_own():
    """torch.compile has no guard on the choice of kernels that a surrounding context makes."""
    import variants
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, x = CompileCounterWithBackend("eager"), torch.randn(2, 3, 32, 32)
    for number, name in enumerate(("ours", "attention by torch's flash kernels"), 1):
        backbone = variants.trainer_of(name, **TINY, local=2).teacher.backbone
        backbone.compile(backend=counter, dynamic=False)
        expected = backbone.forward(x)
        torch.testing.assert_close(backbone(x), expected)
        assert counter.frame_count == number
    assert "sdp" in str(counter.graphs[1].code) and counter.graphs[1].code != counter.graphs[0].code
    assert accepts(backbone.blocks[0].attn, "class_token_only")  # or a block would ask it for the weights


def test_variants_that_can_not_run_are_left_out_with_a_line(capsys):
    import variants

    flash = "attention by torch's flash kernels"
    args = variants.get_args_parser().parse_args(["--device", "cuda", "--only", "ours", flash])
    assert variants.runnable(args) == ["ours"]
    assert flash in (said := capsys.readouterr().out) and "--precision bf16" in said
    args.precision = "bf16"
    assert variants.runnable(args) == ["ours", flash]
    args = variants.get_args_parser().parse_args(["--count", "--only", "residual stream in half precision"])
    with pytest.raises(SystemExit, match="nothing to do"):
        variants.runnable(args)


def test_stages_of_the_device_are_timed_there(monkeypatch, tmp_path):
    import data_pipeline
    import photos

    calls = []

    def in_turns(functions, rounds, device="cpu", clock=None):
        calls.append((set(functions), device, clock))
        return {name: [1.0] for name in functions}

    names = (*data_pipeline.COLOURS, "naive: worker, all of it")
    monkeypatch.setattr(data_pipeline, "stages", lambda paths, args: dict.fromkeys(names))
    monkeypatch.setattr(bench, "in_turns", in_turns)
    paths = photos.write(tmp_path, 1, 64, 48)
    args = data_pipeline.get_args_parser().parse_args(["--device", "cuda"])
    assert set(data_pipeline.by_stage(paths, args)) == set(names)
    assert calls == [({names[2]}, "cpu", bench.cpu_seconds), ({*names[:2]}, "cuda", None)]
    args.device = "cpu"
    data_pipeline.by_stage(paths, args)
    assert calls[2] == (set(names), "cpu", bench.cpu_seconds)


def test_linear_classification_is_timed_on_the_device(monkeypatch):
    linear, devices = importlib.import_module("benchmarks.linear"), set()

    def epoch(model, batches, settings) -> None:
        devices.update(x.device.type for x in (*model.parameters(), *batches[0]))

    monkeypatch.setattr(linear, "ours", epoch)
    monkeypatch.setattr(linear, "plain", epoch)
    args = linear.get_args_parser().parse_args(["--quick", "--device", "meta"])
    assert linear.main(args) == 0 and devices == {"meta"}


def test_many_files_are_drawn_once_and_copied(tmp_path):
    import photos

    files = [path.read_bytes() for path in photos.write(tmp_path, photos.DRAWN + 2, 32, 24)]
    assert len(files) == photos.DRAWN + 2 and len(set(files)) == photos.DRAWN
    assert files[photos.DRAWN :] == files[:2]


def test_bytes_communicated_are_those_of_gradients_and_centre(tmp_path):
    """Two real processes."""
    import scaling

    args = scaling.get_args_parser().parse_args(["--quick", "--json", str(tmp_path / "out.jsonl")])
    assert scaling.main(args) == 0
    (run,) = json.loads((tmp_path / "out.jsonl").read_text())["runs"]
    assert run["gradients"] == 4 * model.Shape.of("vit_nano", 16, (32, 16), 2, 64).parameters()
    assert run["centre"] == 4 * 64


def test_profile_by_kind_adds_up_to_the_step(tmp_path, capsys):
    import train_step

    argv = ["--quick", "--profile", str(tmp_path / "trace.json"), "--json", str(tmp_path / "out.jsonl")]
    assert train_step.main(train_step.get_args_parser().parse_args(argv)) == 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    step = sum(e["dur"] for e in events if e.get("ph") == "X" and e["name"] == kinds.STEP) / 1000
    (line,) = (json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines())
    times = {kind: row["ms"] for kind, row in line["kinds"].items()}
    assert sum(times.values()) == pytest.approx(step, rel=1e-6)
    assert set(times) == {*kinds.KINDS, kinds.REST} and all(ms > 0 for ms in times.values())
    assert 10 <= len(line["largest"]) <= 50
    assert not {name for name, *_ in line["largest"]} & {kinds.STEP, kinds.UPDATE}


# What one H100 was seen to run, with the kernels' full names where they are known.
KERNELS = {
    "nvjet_tst_192x192_64x3_1x2_h_bz_coopB_bias_TNN": kinds.MATMUL, "nvjet 192x192 1x2 NNN": kinds.MATMUL,
    "nvjet 128x192 splitK NTN": kinds.MATMUL, "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": kinds.MATMUL,
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7": kinds.ATTENTION,
    "cuDNN sdpa flash fprop": kinds.ATTENTION,
    "void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*": kinds.ATTENTION,
    "void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*": kinds.ATTENTION,
    "void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, ": kinds.PATCHES,
    "void implicit_convolve_sgemm<__nv_bfloat16, __nv_bfloat16, 1024, 5, 5, 3>": kinds.PATCHES,
    "triton_poi_fused_gelu_3": kinds.ACTIVATION, "triton_poi_fused_gelu_gelu_backward_7": kinds.ACTIVATION,
    "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl": kinds.ACTIVATION,
    "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float>": kinds.NORMS,
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>": kinds.NORMS,
    "triton_per_fused_add_native_layer_norm_5": kinds.NORMS,
    "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<c10::BFloat16, sum_functor": kinds.RESIDUAL,
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>": kinds.RESIDUAL,
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<MulFunctor": kinds.RESIDUAL,
    "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda": kinds.COPIES,
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float>": kinds.COPIES, "aten::cat": kinds.COPIES,
    "Memcpy DtoD (Device -> Device)": kinds.COPIES,
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor": kinds.OPTIMIZER,
    "void (anonymous namespace)::softmax_warp_forward<float>": kinds.LOSS,
    "void at::native::(anonymous namespace)::weight_norm_bwd_first_dim_kernel<float>": kinds.LOSS,
}


@pytest.mark.parametrize("name", KERNELS)
def test_kinds_of_kernels(name):
    assert kinds.kind_of(kinds.Operation(name, 1.0)) == KERNELS[name]


def test_kinds_of_kernels_follow_from_what_launched_them():
    """A trace of a GPU: what the update and the loss launch is theirs, and a product with K prototypes is the head's.
    """
    def cpu(name, ts, dur, number=None, dims=(), cat="cpu_op"):
        args = {"External id": number, "Input Dims": list(dims)} if number else {}
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}

    def kernel(name, ts, dur, number):
        return cpu(name, ts, dur, number, cat="kernel") | {"tid": 7}

    trace = {"traceEvents": [
        cpu("aten::mm", 0, 10, 1, [[8, 384], [384, 384]]), cpu("aten::mm", 10, 10, 2, [[8, 256], [256, 65536]]),
        cpu("PairsOfViewsBackward", 20, 20, 3), cpu("aten::mul_", 25, 5, 4),
        cpu("update", 50, 40, cat="user_annotation"), cpu("aten::mul", 55, 10, 5),
        kernel("gemm", 1000, 2000, 1), kernel("gemm", 3000, 3000, 2), kernel("MulFunctor", 6000, 500, 4),
        kernel("MulFunctor", 6500, 700, 5), kernel("MulFunctor", 8000, 1000, 99)]}
    assert {k: ms for k, ms in kinds.by_kind(trace, 65536).items() if ms} == {
        kinds.MATMUL: 2.0, kinds.LOSS: 3.5, kinds.OPTIMIZER: 0.7, kinds.RESIDUAL: 1.0,
        kinds.REST: pytest.approx(0.8)}


def test_floors_of_the_kinds_share_the_models_totals():
    shape = model.Shape.of("vit_small", 16, (224, 96), 8, 65536)
    assert sum(shape.flop_by_kind().values()) == pytest.approx(shape.flop_per_image(all_tokens=False))
    for precision in ("bf16", "bf16, fused", "fp32"):
        floors = shape.floors(128, 767e12, 3e12, precision)
        causes = model.step_seconds(shape, 128, 1, model.Hardware(767e12, 3e12), precision)
        patches = floors.pop(kinds.PATCHES)
        assert max(causes["arithmetic"], causes["memory"]) < sum(floors.values()) + patches
        assert sum(floors.values()) < causes["arithmetic"] + causes["memory"]


def views(batch=3, local=2, sizes=(32, 16)):
    crops = [torch.randn(batch, 3, s, s) for s in [sizes[0]] * 2 + [sizes[1]] * local]
    return crops, [torch.cat(crops[:2]), torch.cat(crops[2:])]


@pytest.mark.parametrize("grouped", [False, True])
def test_naive_and_ours_train_alike(grouped):
    """From the same weights, two steps in float32 give the same losses and weights: the baseline does all the work."""
    torch.manual_seed(0)
    mine = ours.Trainer(**TINY | {"drop_path": 0.0}, local=2)
    theirs = naive.Trainer(**TINY | {"drop_path": 0.0}, grouped=grouped)
    assert theirs.student.load_state_dict(mine.student.state_dict())
    theirs.teacher.load_state_dict(mine.teacher.state_dict())
    for _ in range(2):
        separate, joined = views()
        torch.testing.assert_close(torch.tensor(theirs.step(separate)), mine.step(joined), rtol=1e-5, atol=1e-5)
    for part in ("student", "teacher"):
        expected = getattr(theirs, part).state_dict()
        for name, value in getattr(mine, part).state_dict().items():
            # AdamW's first steps are +-lr a value: where a gradient is rounding noise, its sign is too
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=3e-4, msg=name)
    torch.testing.assert_close(mine.dino_loss.center, theirs.center, rtol=1e-4, atol=1e-6)


def test_arithmetic_of_the_model_is_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    trainer, crops = ours.Trainer(**TINY, local=2), views()[1]
    with FlopCounterMode(display=False) as counted:
        trainer.losses(crops)[0].backward()
    predicted = 3 * model.Shape.of("vit_nano", 16, (32, 16), 2, 64).flop_per_image(all_tokens=False)
    assert predicted == pytest.approx(counted.get_total_flops(), rel=0.03)  # no gradient of the pictures is needed


def test_parameters_and_kept_bytes_of_the_model_are_those_of_the_network():
    trainer, crops = ours.Trainer(arch="vit_tiny", size=64, k=512, local=2), views(8)[1]
    shape = model.Shape.of("vit_tiny", 16, (64, 32), 2, 512)
    parameters = sum(p.numel() for p in trainer.student.parameters() if p.requires_grad)
    assert shape.parameters() == parameters
    crops = [torch.randn(16, 3, 64, 64), torch.randn(16, 3, 32, 32)]
    for checkpointing in ("", "layers", "blocks"):
        if checkpointing:
            trainer.student.backbone.set_grad_checkpointing(layers=checkpointing == "layers")
        kept = bench.kept_bytes(lambda: trainer.student.features(crops))
        assert 8 * shape.kept_bytes("fp32", checkpointing) == pytest.approx(kept, rel=0.1)


def test_traffic_of_the_model_is_near_what_operations_read_and_write():
    """Of ours on a CPU in float32, where a batch of one moves weights more than activations and one of 16 the reverse.
    """
    shape = model.Shape.of("vit_tiny", 16, (64, 32), 2, 4096)
    for batch in (1, 16):
        trainer = ours.Trainer("vit_tiny", 16, 64, 4096, local=2)
        with Traffic() as counted:
            trainer.step(views(batch, 2, (64, 32))[1])
        image, step = shape.traffic("fp32")
        assert batch * image + step == pytest.approx(counted.bytes, rel=0.15)


def test_traffic_of_colours_in_the_model_is_what_their_operations_and_kernels_move(monkeypatch):
    """As for a whole batch on a GPU; a kernel reads its arguments and writes its results, each once."""
    counted, rng = Traffic(), np.random.default_rng(0)

    def kernel(function):
        def run(*args):
            before = counted.bytes
            result = function(*args)
            counted.bytes = before + sum(counted.size(x) for x in (*args, result))
            return result
        return run

    monkeypatch.setattr(fused, "compiled", kernel)
    for kind, compiled in (("eager", False), ("fused", True)):
        augmentation = utils.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 8, compiled=compiled)
        params = [augmentation.draw_photometric(view, rng) for view in range(10) for _ in range(32)]
        crops = [torch.empty(n, 3, s, s, dtype=torch.uint8, device="meta") for n, s in ((64, 224), (256, 96))]
        counted.bytes = 0
        with counted:
            augmentation.finish(crops, torch.from_numpy(np.stack(params)))
        values = sum(c.numel() for c in crops)
        assert counted.bytes / values == pytest.approx(model.COLOURS_TRAFFIC[kind], rel=0.1)


def test_traffic_counts_results_and_changes_in_place_and_no_views():
    x, y = torch.ones(100), torch.ones(100)
    for function, values in ((lambda: x + y, 300), (lambda: x.add_(y), 300), (lambda: x.view(10, 10).t(), 0),
                             (lambda: torch._foreach_mul_([x, y], 2.0), 400), (lambda: torch.add(x, y, out=x), 300)):
        with Traffic() as counted:
            function()
        assert counted.bytes == 4 * values


def test_published_figures_of_the_arithmetic():
    """ViT-S/16, 2 x 224 + 8 x 96, K 65,536: 9.2 and 1.6 GFLOP a crop, 114 an image."""
    shape = model.Shape.of("vit_small", 16, (224, 96), 8, 65536)
    assert shape.backbone_flop(224) / 1e9 == pytest.approx(9.2, abs=0.05)
    assert shape.backbone_flop(96) / 1e9 == pytest.approx(1.62, abs=0.01)
    assert shape.flop_per_image() / 1e9 == pytest.approx(113.8, abs=0.1)


def test_kept_bytes_counts_storages_once_and_no_weights():
    w = torch.nn.Parameter(torch.ones(10, 10))
    x = torch.ones(5, 10)
    assert bench.kept_bytes(lambda: (x @ w).exp()) == 5 * 10 * 4 + 5 * 10 * 4  # x, and exp's result
    assert bench.kept_bytes(lambda: (x @ w, x @ w)) == 5 * 10 * 4


def test_ratios_are_taken_round_by_round():
    found = bench.summary({"naive": [2.0, 4.0, 6.0], "ours": [1.0, 4.0, 2.0]}, "naive", per=2)
    assert found["ours"] == {"ms": 1000.0, "low": 500.0, "high": 2000.0, "ratio": 2.0, "ratio_low": 1.0,
                             "ratio_high": 3.0}  # fmt: skip


def test_predictions_fall_with_slower_links_and_never_wait_alone():
    shape = model.Shape(*model.ARCHS["ViT-S/16"], 8, 65536)
    fast, slow = (model.Hardware(788e12, 4.8e12, between=link) for link in (50e9, 1e9))
    assert model.predict(shape, 64, 1, fast)["waiting"] == 0
    assert model.predict(shape, 64, 64, slow)["images_per_s"] < 0.9 * model.predict(shape, 64, 64, fast)["images_per_s"]


# ---- The loss in parts ----


def pairs_loss(student, teacher, center, ncrops):
    """Equation 3, pair by pair, in the type of its arguments."""
    s, t = student.chunk(ncrops), teacher.chunk(2)
    pairs = [-(((t[i] - center) / 0.04).softmax(1) * (s[v] / 0.1).log_softmax(1)).sum(1).mean()
             for i in range(2) for v in range(ncrops) if v != i]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("ncrops", [2, 3, 5])
@pytest.mark.parametrize("part", [1, 5 * 7 * 2, 2**20], ids=["an image", "two images", "all"])
def test_loss_in_parts_and_its_gradient(monkeypatch, ncrops, part):
    """Five images of seven prototypes, in parts that do and do not divide them."""
    monkeypatch.setitem(targets.PART, "cpu", part)
    torch.manual_seed(0)
    student = torch.randn(5 * ncrops, 7, dtype=torch.float64, requires_grad=True)
    teacher, center = torch.randn(10, 7, dtype=torch.float64), torch.randn(1, 7, dtype=torch.float64)
    loss = utils.DINOLoss(7, ncrops, 0.04, 0.04, 0, 1)
    loss.center = center
    for scale in (1.0, 1000.0):
        found = scale * loss(student, teacher, 0, update_center=False)
        expected = scale * pairs_loss(student, teacher, center, ncrops)
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(x, student)[0] for x in (found, expected)]
        torch.testing.assert_close(*grads)


def test_small_gradients_survive_half_precision_when_the_loss_is_scaled():
    """A gradient of 1e-8 is zero in float16, and must not be so before the scaler's factor is applied."""
    torch.manual_seed(0)
    student, teacher = torch.randn(4 * 64, 4096).half().requires_grad_(), torch.randn(2 * 64, 4096).half()
    loss = utils.DINOLoss(4096, 4, 0.04, 0.04, 0, 1)
    (65536 * loss(student, teacher, 0)).backward()
    expected = student.detach().float().requires_grad_()
    (65536 * pairs_loss(expected, teacher.float(), 0, 4)).backward()
    assert (expected.grad / 65536).abs().median() < 6e-8  # the smallest float16 is 6e-8
    torch.testing.assert_close(student.grad.float(), expected.grad, rtol=2e-3, atol=1e-6)


# ---- The loop never waits for the device ----


class EndOfTest(Exception):
    pass


class LikeFused(torch.optim.AdamW):
    """Stands for the fused optimizer, which there is not on this device: it takes found_inf, and reads nothing."""

    def __init__(self, params):
        super().__init__(params)
        self.defaults["fused"] = True

    def step(self, closure=None):
        self.__dict__.pop("found_inf", None)
        return super().step(closure)


@pytest.fixture(params=["adamw", "sgd", "lars"])
def device_that_cannot_be_read(request, monkeypatch, tmp_path):
    """A run on torch's meta device, whose tensors have no values: item(), cpu(), bool() and the like all raise."""
    import main_dino

    if request.param == "adamw":
        monkeypatch.setattr(utils, "build_optimizer", lambda name, model: LikeFused(model.parameters()))
    monkeypatch.setattr(Run, "autocast", lambda run: torch.autocast("cpu", enabled=False))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: pytest.fail("a step waits for the device"))
    argv = ("--arch vit_nano --data_path shapes:16x32 --global_crops_size 32 --local_crops_size 16 --out_dim 64 "
            "--local_crops_number 2 --batch_size_per_gpu 4 --num_workers 0 --epochs 4 --warmup_epochs 0 "
            "--freeze_last_layer 0 --log_every 100 --saveckp_freq 0 --precision fp32").split()  # fmt: skip
    args = main_dino.get_args_parser().parse_args([*argv, "--optimizer", request.param, "--output_dir", str(tmp_path)])
    ends = Ends(open_images(args.data_path), None, 0, 0, 0, 32, args.mean, args.std)
    plan = main_dino.make_plan(args, 16)
    run = main_dino.make_run(args, plan, 16, torch.device("meta"))
    run.step = 1  # step 0 is a logged one
    return main_dino, run, lambda: main_dino.train(args, run, plan, ends, log=None)


def run_steps(main_dino, train, monkeypatch, steps):
    """Steps of the real loop, none of them logged, that end with EndOfTest."""
    make_loader = main_dino.make_loader

    def few(*args):
        def load(first, last):
            for number, batch in enumerate(make_loader(*args)(first, last)):
                if number == steps:
                    raise EndOfTest
                yield batch

        return load

    monkeypatch.setattr(main_dino, "make_loader", few)
    with pytest.raises(EndOfTest):
        train()


def test_a_step_of_the_loop_reads_nothing_from_the_device(device_that_cannot_be_read, monkeypatch):
    main_dino, run, train = device_that_cannot_be_read
    run_steps(main_dino, train, monkeypatch, steps=2)
    assert run.step == 3


def test_that_device_notices_a_read(device_that_cannot_be_read, monkeypatch):
    _, run, train = device_that_cannot_be_read
    ema_update = utils.ema_update
    for read in (lambda x: x.item(), lambda x: x.cpu(), bool, lambda x: x.tolist(), lambda x: x.nonzero()):
        monkeypatch.setattr(utils, "ema_update",
                            lambda s, t, m, read=read: (read(next(s.parameters()).sum()), ema_update(s, t, m)))
        run.step = 1
        with pytest.raises((RuntimeError, NotImplementedError)):
            train()


def take_back(trainer):
    """What CUDA graphs do: the teacher's results are gone when the student starts."""
    results = []

    def overwrite(module, args) -> None:
        for result in results:
            result.fill_(torch.nan)

    for module in (trainer.teacher, trainer.teacher.backbone, trainer.teacher.head):
        module.register_forward_hook(lambda module, args, result: results.append(result))
    trainer.student.register_forward_pre_hook(overwrite)


def test_what_cuda_graphs_take_back_is_not_needed():
    losses, crops = [], views()[1]
    for graphs in (False, True):
        torch.manual_seed(0)
        trainer = ours.Trainer(**TINY | {"drop_path": 0.0}, local=2)
        if graphs:
            take_back(trainer)
        loss, parts = trainer.losses(crops)
        assert all(part.isfinite().all() for part in parts.values())
        losses.append(loss)
    assert torch.equal(*losses) and losses[0].isfinite()
