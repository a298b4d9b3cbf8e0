"""The judge of edits: features of a caption, naming, the direction of a change, bad files, the training."""
import importlib.util
import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from bench.figures import silhouette_iou
from bench.judge import COLOURS, SIDE, Judge, features, load, tensor_of

EMOJI = ROOT / "models/emoji"


@pytest.fixture(scope="module")
def shipped():
    return load(EMOJI)


@pytest.fixture(scope="module")
def training():
    """models/emoji/judge.py as a module."""
    spec = importlib.util.spec_from_file_location("judge_training", EMOJI / "judge.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Known(Judge):
    """A judge with known vectors: captions by their angles, pictures by the red and green of their first pixel."""

    def __init__(self, vectors, names=()):
        super().__init__(names)
        self.vectors = vectors

    def see(self, pictures):
        return torch.nn.functional.normalize(pictures[:, :2, 0, 0], dim=1)

    def read(self, captions):
        return torch.tensor([[math.cos(a), math.sin(a)] for a in (self.vectors.get(c, -math.pi / 2) for c in captions)])


def picture(x, y):
    """A PIL picture whose vector points in the direction (x, y), both at most 1."""
    return Image.new("RGB", (SIDE, SIDE), (round(255 * x), round(255 * y), 0))


def rows(caption):
    where, weights = features(caption)
    return dict(zip(where.tolist(), weights.tolist(), strict=True))


def test_a_caption_becomes_its_words_and_their_trigrams():
    # crc32("a=fox") % 4096 and so on, by hand: one word of weight 1, three trigrams of a third each, in two rows each
    assert sum(rows("fox").values()) == pytest.approx(4)
    assert sum(rows("red fox").values()) == pytest.approx(6)
    assert rows("A Red fox.") == rows("an emoji of the red fox") == rows("red fox")
    assert rows("gray bear") == rows("grey bear") and rows("dog") != rows("fox")
    assert len({*rows("foxes")} & {*rows("fox")}) >= 4  # <fo and fox
    assert rows("") == rows("!") == {0: 1.0}


def test_the_probability_is_the_logistic_function_of_the_scaled_difference():
    judge = Known({"cat": 0.0, "dog": math.pi / 2})
    judge.scale.data.fill_(math.log(8))
    found = judge.prefers(tensor_of(picture(0.6, 0.8)), "dog", "cat")
    torch.testing.assert_close(found, torch.tensor([1 / (1 + math.exp(-8 * (0.8 - 0.6)))]), rtol=1e-4, atol=1e-4)


def test_named_means_among_the_five_best_names_where_synonyms_count_as_one():
    close = {f"name {i}": 0.01 * i for i in range(1, 6)}
    five = [[name] for name in close]
    at_zero = tensor_of(picture(1, 0))
    assert not Known({**close, "far": 0.5}, [*five, ["far"]]).reads_as(at_zero, "far")
    assert Known({**close, "far": 0.5}, [*five[1:], ["far"]]).reads_as(at_zero, "far")
    assert Known({**close, "far": 0.5}, five[1:]).reads_as(at_zero, "far")  # a target outside the vocabulary
    assert Known({**close, "far": 0.5}, [*five[1:], ["name 1", "far"]]).reads_as(at_zero, "far")
    assert Known({**close, "far": 0.5}, five).reads_as(at_zero, "far", count=6)


def test_a_target_with_a_colour_must_beat_all_other_colours():
    judge = Known({"red car": 0.2, "blue car": 0.1}, [["red car"], ["van"]])
    assert not judge.reads_as(tensor_of(picture(1, 0)), "red car")
    assert judge.reads_as(tensor_of(picture(0.9, 0.4)), "red car")
    assert judge.reads_as(tensor_of(picture(1, 0)), "blue car")


def test_the_direction_is_the_cosine_of_the_two_changes():
    judge = Known({"cat": 0.0, "dog": math.pi / 2}, [["cat"], ["dog"]])
    cat, dog, between = picture(1, 0), picture(0, 1), picture(1, 1)
    found = judge.scores([cat], [dog], "cat", "dog")
    assert found["direction"] == pytest.approx(1, abs=1e-5) and found["named"] == 1
    assert judge.scores([dog], [cat], "cat", "dog")["direction"] == pytest.approx(-1, abs=1e-5)
    assert judge.scores([cat], [cat], "cat", "dog")["direction"] == 0  # nothing changed
    # the cosine between (1, 1) / sqrt 2 - (1, 0) and (-1, 1)
    turned = (2 - math.sqrt(2)) / 2 + math.sqrt(2) / 2
    length = math.hypot(1 - math.sqrt(0.5), math.sqrt(0.5)) * math.sqrt(2)
    both = judge.scores([cat, cat], [between, dog], "cat", "dog")
    assert both["direction"] == pytest.approx((turned / length + 1) / 2, abs=1e-3)
    assert found["before"] == pytest.approx(1 - found["after"], abs=1e-5)  # the two pictures mirror each other


def test_rows_of_a_batch_are_independent_and_pictures_are_resized():
    torch.manual_seed(0)
    judge = Judge().eval()
    x = torch.rand(3, 3, 2 * SIDE, 2 * SIDE)
    with torch.no_grad():
        seen = judge.see(x)
        torch.testing.assert_close(seen.norm(dim=1), torch.ones(3))
        torch.testing.assert_close(seen[1:2], judge.see(x[1:2]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen, judge.see(torch.nn.functional.avg_pool2d(x, 2)), rtol=1e-4, atol=1e-5)
        read = judge.read(["red fox", "an owl"])
        torch.testing.assert_close(read[1:], judge.read(["owl"]))


def test_transparent_pixels_are_white():
    drawn = Image.new("RGBA", (SIDE, SIDE), (10, 20, 30, 0))
    assert tensor_of(drawn).min() == 1


def test_silhouettes_have_their_known_overlap():
    a, b, white = torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    a[:, 1, :4], b[:, 2, 2:6] = 0.5, 0.2  # four rows each, two of them in common
    assert silhouette_iou(a, b) == pytest.approx(2 / 6)
    assert silhouette_iou(a, a) == 1 and silhouette_iou(a, white) == 0 and silhouette_iou(white, white) == 1
    a[:, :, 7] = 1 - 7 / 255  # nearly white
    assert silhouette_iou(a, b) == pytest.approx(2 / 6)


def test_the_shipped_judge_names_an_apple_an_umbrella_and_their_colours(shipped):
    apple = Image.open(ROOT / "examples/red-apple.png")
    found = tensor_of(apple)
    assert shipped.reads_as(found, "red apple") and not shipped.reads_as(found, "green apple")
    assert not shipped.reads_as(found, "umbrella")
    assert shipped.prefers(found, "red apple", "automobile") > 0.9
    assert shipped.prefers(found, "red apple", "green apple") > 0.9


def test_the_shipped_judge_names_drawings_made_here(shipped):
    heart = Image.new("RGB", (256, 256), "white")
    draw = ImageDraw.Draw(heart)
    for x in (28, 118):
        draw.ellipse((x, 40, x + 110, 150), fill="#3b88e9")
    draw.polygon([(40, 128), (216, 128), (128, 232)], fill="#3b88e9")
    drawn = tensor_of(heart)
    assert shipped.reads_as(drawn, "blue heart") and not shipped.reads_as(drawn, "red heart")
    yellow = Image.new("RGB", (256, 256), "white")
    draw = ImageDraw.Draw(yellow)
    draw.ellipse((16, 16, 240, 240), fill="#ffcc33")
    for x in (72, 152):
        draw.ellipse((x, 80, x + 32, 124), fill="#664500")
    draw.arc((72, 100, 184, 190), 20, 160, fill="#664500", width=10)
    assert shipped.prefers(tensor_of(yellow), "slightly smiling face", "red apple") > 0.9
    scores = shipped.scores([yellow], [heart], "slightly smiling face", "blue heart")
    assert scores["named"] == 1 and scores["direction"] > 0.5 and scores["before"] < 0.1 < 0.9 < scores["after"]


def test_the_shipped_judge_is_small():
    assert (EMOJI / "judge.safetensors").stat().st_size <= 4e6


def test_bad_files_are_refused_in_one_line(tmp_path):
    def refused(message):
        with pytest.raises(ValueError) as error:
            load(tmp_path)
        assert message in str(error.value) and "\n" not in str(error.value)
    refused("judge.safetensors: no such file")
    weights = {k: v for k, v in Judge().state_dict().items() if v.is_floating_point()}
    save_file(weights, tmp_path / "judge.safetensors")
    refused("captions.txt: no such file")
    (tmp_path / "captions.txt").write_text("# names\n")
    refused("no captions")
    (tmp_path / "captions.txt").write_text("# names\nred apple | apple | COLOUR apple\nowl\n")
    assert load(tmp_path).names == [["red apple", "apple"], ["owl"]]
    save_file({k: v for k, v in weights.items() if k != "scale"}, tmp_path / "judge.safetensors")
    refused("scale is missing")
    save_file(weights | {"head.1.bias": torch.zeros(3)}, tmp_path / "judge.safetensors")
    refused("head.1.bias is missing, or of another shape")
    save_file(weights | {"head.1.bias": torch.full((128,), math.nan)}, tmp_path / "judge.safetensors")
    refused("head.1.bias is missing, or of another shape, or not finite")
    (tmp_path / "judge.safetensors").write_bytes(b"not weights")
    refused("judge.safetensors: no readable judge")


def test_augmentation_changes_drawings_and_keeps_them_in_range(training):
    drawings = torch.zeros(16, 4, 72, 72, dtype=torch.uint8)
    drawings[:, 0, 20:50, 20:50], drawings[:, 3, 20:50, 20:50] = 200, 255
    first, again = (training.distort(drawings, torch.zeros(16, dtype=torch.bool), torch.Generator().manual_seed(0), 48)
                    for _ in range(2))
    assert first.shape == (16, 3, 48, 48) and first.min() >= 0 and first.max() <= 1 and first.equal(again)
    assert (first[1:] - first[:1]).abs().amax((1, 2, 3)).min() > 0.1  # no two are alike
    still = training.plain(drawings)
    assert still.shape == (16, 3, SIDE, SIDE) and still[:, :, 0, 0].eq(1).all()
    assert (still[:, 1].amin((1, 2)) < 0.02).all()


def test_the_judge_learns_from_more_sets_than_the_prior_and_never_from_those_held_out(training, tmp_path):
    asked = []

    def items(icons, styles, sets, recoloured):
        asked.append((styles, recoloured))
        return torch.zeros(2, 4, 128, 128, dtype=torch.uint8), [["owl"], []], None, None
    trainer = SimpleNamespace(TRAIN=["noto"], HELD_OUT=["noto-v1"], items=items)
    for held_out in (False, True):
        args = SimpleNamespace(icons="icons", work=tmp_path, sets=tmp_path)
        drawings, captions = training.load_items(trainer, args, held_out)
        assert drawings.shape == (1, 4, training.CACHED, training.CACHED) and captions == [["owl"]]
    assert asked == [(["noto", "openmoji", "fluent-emoji-high-contrast"], True), (["noto-v1"], False)]


def test_captions_that_may_be_true_are_no_negatives(training):
    vocab = {"car": ["car", "auto", "COLOUR car"], "owl": ["owl"]}
    said = training.Captions(vocab, [["car", "auto"], ["car", "auto", "red car"], ["blue car", "car"], ["owl"]])
    rows, wanted, hidden = said.targets([0, 1, 2, 3], random.Random(1), torch.Generator().manual_seed(0))
    texts = [said.texts[i] for i in rows]
    hidden = [{t for t, h in zip(texts, row, strict=True) if h} for row in hidden.tolist()]
    said_now = [texts[i] for i in wanted]
    assert hidden[0] == {"car", "auto", *(f"{c} car" for c in COLOURS)} - {said_now[0]}  # the car may be red
    assert hidden[1] == {"car", "auto", "red car"} - {said_now[1]} and hidden[2] == {"car", "blue car"} - {said_now[2]}
    assert said_now[3] == "owl" and not hidden[3]
    assert said.shares.tolist() == pytest.approx([0.5, 0.5, 0.1, 1])


def test_calibration_recovers_a_known_scale(training):
    rng = torch.Generator().manual_seed(0)
    margins = torch.rand(40000, generator=rng) / 5
    margins = torch.where(torch.rand(40000, generator=rng) < (12 * margins).sigmoid(), margins, -margins)  # scale 12
    scale = training.fit_scale(margins)
    assert scale == pytest.approx(12, rel=0.05)
    right, sure, error = training.calibration(margins, scale)
    assert right == pytest.approx(sure, abs=0.01) and error < 0.015
    # of four margins three are right, each with a probability of about 1
    right, sure, error = training.calibration(torch.tensor([1.0, 1.0, 1.0, -1.0]), 20.0)
    assert (right, sure, error) == pytest.approx((0.75, 1, 0.25), abs=1e-6)


def test_the_text_tower_settles_between_captions_and_drawings(training):
    torch.manual_seed(2)
    judge, lines = Judge().eval().requires_grad_(False), []
    drawings = torch.randint(256, (3, 4, 72, 72), dtype=torch.uint8)
    said = training.Captions({"car": ["car"], "owl": ["owl", "bird"]}, [["car"], ["car"], ["owl"]])
    before, seen = judge.read(["car", "owl"]), training.see_all(judge, drawings)
    training.settle(judge, drawings, said, lines.append, steps=150)
    centres = torch.nn.functional.normalize(torch.stack([seen[0] + seen[1], seen[2]]), dim=1)
    wanted = torch.nn.functional.normalize(before + centres, dim=1)
    assert ((judge.read(["car", "owl"]) * wanted).sum(1) > 0.99).all() and len(lines) == 1
    assert training.see_all(judge, drawings).equal(seen)


def test_an_export_loads_as_the_same_judge(training, tmp_path):
    torch.manual_seed(1)
    judge = Judge().eval()
    training.export(judge, tmp_path / "judge.safetensors")
    (tmp_path / "captions.txt").write_text("owl\n")
    again = load(tmp_path)
    assert {v.dtype for v in load_file(tmp_path / "judge.safetensors").values()} == {torch.float16}
    x = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again.see(x), judge.see(x), atol=2e-3, rtol=0)
        torch.testing.assert_close(again.read(["owl"]), judge.read(["owl"]), atol=2e-3, rtol=0)
