"""Training: prompts and labels of a step, the loss of both kinds of network, and runs that are interrupted."""

import signal

import numpy as np
import pytest
import torch

from detection import coco, networks, prompts, training
from parallel import Stopped
from pretraining.faults import Requests
from weights import checkpoints

CPU = torch.device("cpu")
RECIPE = training.Recipe(steps=4, batch_size=3, lr=1e-3, backbone_lr=0.5, phrases=6, num_workers=0)


@pytest.fixture(scope="module")
def objects():
    return coco.open_objects("scenes:8x48", "", "--train")


def make(objects, seed=0):
    return networks.tiny(" ".join(objects.phrases.values()).split(), 48, CPU, seed)


def other_kind(detector):
    """The same sizes as a network of the other class."""
    transformers = networks.import_transformers()
    own = detector.network.config
    names = ("backbone_config", "text_config", "d_model", "num_queries", "num_feature_levels", "encoder_layers",
             "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim", "encoder_attention_heads",
             "decoder_attention_heads", "dropout", "fusion_droppath")
    config = transformers.GroundingDinoConfig(**{name: getattr(own, name) for name in names})
    return detector._replace(network=transformers.GroundingDinoForObjectDetection(config))


def test_the_phrases_present_come_first_and_others_fill_the_prompt():
    rng, lengths = np.random.default_rng(0), dict.fromkeys(range(100), 3)
    for _ in range(20):
        chosen = training.choose({3, 50}, lengths, 256, 0, rng)
        assert {3, 50} <= set(chosen) and len(set(chosen)) == len(chosen) == 84  # of 254 tokens
        chosen = training.choose({3, 50}, lengths, 256, 6, rng)
        assert {3, 50} <= set(chosen) and len(chosen) == 6
        assert set(training.choose({1, 2, 3}, lengths, 256, 2, rng)) == {1, 2, 3}
    assert len(training.choose(set(range(100)), lengths, 256, 0, rng)) == 84  # more are present than fit


def prompts_ids(detector, objects):
    return prompts.encode(objects.phrases, list(objects.phrases)[:3], detector.processor.tokenizer).ids


def row(box, category, crowd=0) -> dict:
    return {"bbox": box, "category_id": category, "iscrowd": crowd}


def test_labels():
    rows = [row([0, 0, 10, 10], 4), row([10, 5, 20, 10], 2), row([1, 1, 1, 1], 7, crowd=1)]
    labels = training.as_labels(rows, [9, 2, 7], (20, 40), flip=False)  # 4 isn't asked for, 7 is a crowd
    assert labels["class_labels"].tolist() == [1] and labels["boxes"].tolist() == [[0.5, 0.5, 0.5, 0.5]]
    mirrored = training.as_labels([row([-0.5, 0, 10.5, 10], 2)], [2], (20, 40), flip=True)  # clipped
    assert mirrored["boxes"].tolist() == [[0.875, 0.25, 0.25, 0.5]]


def test_boxes_are_fractions_of_the_image_and_not_of_the_padded_batch(objects):
    """What the network predicts: where padding lies beside an image, its first boxes stay the same to a hundredth."""
    detector = make(objects)
    image, ids = objects.load(0), prompts_ids(detector, objects)
    boxes = []
    for batch in ([image], [image, torch.zeros(3, 48, 96, dtype=torch.uint8)]):
        pixels = detector.processor.image_processor(images=batch, return_tensors="pt")
        assert pixels["pixel_values"].shape[-1] == 48 * len(batch)
        with torch.no_grad():
            out = detector.network(**pixels, input_ids=ids.expand(len(batch), -1),
                                   attention_mask=torch.ones_like(ids).expand(len(batch), -1))
        boxes.append(out.enc_outputs_coord_logits[0].sigmoid())
    alone, padded = boxes
    inside = [i for i, box in enumerate(padded) if torch.cdist(box[None], alone).min() < 0.01]
    assert len(inside) == len(alone) < len(padded)


def test_steps_depend_on_the_seed_and_their_number_alone(objects):
    steps = training.Steps(objects, make(objects), RECIPE)
    assert sorted(steps.numbers(0) + steps.numbers(1) + steps.numbers(2)[:2]) == list(range(8))
    one, two = steps[2], training.Steps(objects, make(objects, 1), RECIPE)[2]
    assert torch.equal(one["pixel_values"], two["pixel_values"]) and torch.equal(one["ids"], two["ids"])
    assert not torch.equal(one["ids"], training.Steps(objects, make(objects), RECIPE._replace(seed=1))[2]["ids"])


@pytest.mark.parametrize("kind", ["mm", "published"])
def test_every_parameter_is_trained(objects, kind):
    """The encoder's heads too, which the library's own loss leaves without gradient."""
    detector = make(objects) if kind == "mm" else other_kind(make(objects))
    batch = training.Steps(objects, detector, RECIPE)[0]
    loss, terms = training.losses(detector, batch)
    loss.backward()
    without = [name for name, p in detector.network.named_parameters() if p.grad is None]
    assert loss.isfinite() and not without, without
    assert {"ce", "bbox", "giou", "ce_encoder", "bbox_encoder", "giou_encoder"} < terms.keys()


def test_the_loss_of_the_boxes_is_the_papers(objects):
    """L1 and GIoU of the encoder's proposals, recomputed from the queries that are matched to the objects."""
    from scipy.optimize import linear_sum_assignment
    from torchvision.ops import box_convert, generalized_box_iou

    detector = make(objects)
    batch = training.Steps(objects, detector, RECIPE)[0]
    with torch.no_grad():
        _, terms = training.losses(detector, batch)
        ids = batch["ids"].expand(3, -1)
        out = detector.network(batch["pixel_values"], ids, attention_mask=torch.ones_like(ids))
    l1 = giou = objects_in_all = 0
    for logits, at, label in zip(out.enc_outputs_class, out.enc_outputs_coord_logits.sigmoid(), batch["labels"],
                                 strict=True):
        truth, p = label["boxes"], logits[:, : ids.shape[1]].sigmoid()
        positive, negative = -0.25 * (1 - p)**2 * (p + 1e-8).log(), -0.75 * p**2 * (1 - p + 1e-8).log()
        ends = torch.isin(ids[0], torch.tensor([101, 102, 1012]))
        number = torch.where(ends, 0, ends.cumsum(0))
        token_cost = torch.stack([(positive - negative)[:, number == k + 1].mean(1) for k in label["class_labels"]], 1)
        distance = (at[:, None] - truth).abs().sum(-1)
        overlap = generalized_box_iou(box_convert(at, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy"))
        i, j = linear_sum_assignment((token_cost + 5 * distance - 2 * overlap).numpy())
        l1, giou = l1 + distance[i, j].sum(), giou + (1 - overlap[i, j]).sum()
        objects_in_all += len(truth)
    assert terms["bbox_encoder"] == pytest.approx(float(l1) / objects_in_all, rel=1e-4)
    assert terms["giou_encoder"] == pytest.approx(float(giou) / objects_in_all, rel=1e-4)


def test_images_without_objects(objects):
    detector = make(objects)
    batch = training.Steps(objects, detector, RECIPE)[0]
    empty = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    loss, _ = training.losses(detector, batch | {"labels": [empty] * 3})
    assert loss.isfinite()


def test_backbones_learn_at_their_own_rate(objects):
    groups = training.make_optimizer(make(objects), RECIPE).param_groups
    assert [group["share"] for group in groups] == [0.5, 1.0]
    network = make(objects).network
    inside = sum(p.numel() for p in [*network.model.backbone.parameters(), *network.model.text_backbone.parameters()])
    assert sum(p.numel() for p in groups[0]["params"]) == inside
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(p.numel() for p in network.parameters())


@pytest.fixture
def handlers():
    """Puts back what answers to signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, answer in before.items():
        signal.signal(number, answer)


def run(objects, folder, recipe=RECIPE, settings=None):
    folder.mkdir(exist_ok=True)
    detector = make(objects)
    settings = settings or {"lr": recipe.lr}
    latest = training.find_checkpoint(folder, settings)
    training.train(detector, objects, recipe, folder, settings, latest, Requests(CPU), 1)
    return detector.network.state_dict()


def test_an_interrupted_run_ends_like_an_uninterrupted_one(objects, tmp_path, monkeypatch, handlers):
    whole = run(objects, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Requests, "agreed", lambda self, step: (step == 2, False))
        with pytest.raises(SystemExit) as stopped:
            run(objects, tmp_path / "parts")
    assert stopped.value.code == 75 and checkpoints.read_latest(tmp_path / "parts")[0]["step"] == 2
    resumed = run(objects, tmp_path / "parts")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    lines = [(tmp_path / name / "log_steps.txt").read_text() for name in ("whole", "parts")]
    assert lines[0] == lines[1] and lines[0].count("\n") == 4
    with pytest.raises(ValueError, match="--output_dir .*lr 0.001 -> 0.5.*choose another folder"):
        run(objects, tmp_path / "parts", settings={"lr": 0.5})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_after_training_end_the_process_at_once(handlers, number):
    requests = Requests(CPU)
    requests.finish()
    with pytest.raises(SystemExit) as stopped:
        signal.raise_signal(number)
    assert stopped.value.code == 75
    requests = Requests(CPU)
    signal.raise_signal(number)  # while the network is written: it is written to its end
    with pytest.raises(SystemExit):
        requests.finish()


def test_a_loss_that_is_not_finite_stops_the_run(objects, tmp_path, handlers):
    with pytest.raises(Stopped, match="step .*lower --lr"):
        run(objects, tmp_path / "out", RECIPE._replace(lr=1e30, steps=4))
    assert checkpoints.read_latest(tmp_path / "out") is None
