"""models/emoji/train.py: rendering, naming and augmenting the pictures, the losses, the training run."""
import importlib.util
import json
import math
import sys
import types

import pytest
import torch
from conftest import ABAR, ROOT
from PIL import Image
from torch.testing import assert_close


@pytest.fixture(scope="module")
def train():
    spec = importlib.util.spec_from_file_location("train", ROOT / "models" / "emoji" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sample_sheet_matches_its_captions(train, tmp_path):
    pipe = train.StableDiffusionPipeline.from_pretrained(ROOT / "models" / "emoji").to(dtype=torch.float32)
    train.sample_sheet(pipe, ["blue heart", "red heart"], tmp_path / "sheet.png", columns=2)
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    assert sheet.size == (2 * 140, 152)
    (red, green, blue), (r, g, b) = sheet.getpixel((70, 68)), sheet.getpixel((210, 68))
    assert blue > red + 60 and r > b + 60 and r > g + 60, ((red, green, blue), (r, g, b))


def test_training_timesteps_are_drawn_in_proportion_to_min_snr_weights(train):
    scheduler = types.SimpleNamespace(alphas_cumprod=ABAR.float())
    rng = torch.Generator().manual_seed(0)
    t = torch.cat([train.draw_timesteps(scheduler, 128, rng) for _ in range(500)])
    snr = ABAR / (1 - ABAR)
    weight = (5 / snr).clamp(max=1)
    for low, high in ((0, 100), (100, 200), (200, 500), (500, 1000)):
        share = ((t >= low) & (t < high)).double().mean()
        wanted = weight[low:high].sum() / weight.sum()
        assert share.item() == pytest.approx(wanted.item(), abs=0.002)  # stratified, hence the small tolerance


def test_augmentation_keeps_hue_and_area_and_mirrors_on_request(train):
    rgba = torch.zeros(3, 4, 128, 128, dtype=torch.uint8)
    rgba[:, 3, 32:96, 32:96] = 255
    rgba[1, 0] = 255  # black, red, grey squares
    rgba[2, :3] = 128
    plain = train.augment(rgba, torch.Generator(), white=1.0, strength=0.0)
    assert_close(plain, torch.nn.functional.avg_pool2d(
        rgba[:, :3] / 255 * (rgba[:, 3:] / 255) + 1 - rgba[:, 3:] / 255, 2), atol=1e-5, rtol=0)
    red = train.augment(rgba[1:2], torch.Generator().manual_seed(1), white=1.0)[0]
    assert red[0, 24:40, 24:40].min() > red[1:, 24:40, 24:40].max() + 0.3  # red remains red under augmentation
    warped = train.augment(rgba, torch.Generator().manual_seed(1), white=1.0, strength=0.0, warp=0.05)
    def area(x):
        return (1 - x[0]).sum()
    assert 0.7 * area(plain) < area(warped) < 1.4 * area(plain) and (warped - plain).abs().amax() > 0.3
    rgba[0, 3, :, 32:64] = 0
    unmirrored = train.augment(rgba, torch.Generator(), white=1.0, strength=0.0)
    mirrored = train.augment(
        rgba, torch.Generator(), white=1.0, strength=0.0, mirrored=torch.tensor([True, False, True])
    )
    assert_close(mirrored, torch.stack([unmirrored[0].flip(-1), unmirrored[1], unmirrored[2]]), atol=1e-5, rtol=0)
    assert (mirrored[0] - unmirrored[0]).abs().amax() > 0.9


def test_names_are_drawn_equally_often(train):
    captions = [["cat", "meow"], ["cat", "meow"], ["cat", "meow"], ["owl", "o"], ["blue car"], ["blue car"], [],
                ["brown car"], ["panda"]]
    # every name equally often but white things, recoloured drawings less often, brown ones four times as often as
    # others, pictures without a caption never
    assert_close(train.shares(captions), torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0, 0.15, 0.15, 0.0, 1.2, 12.0]))


def test_wrong_colours_are_near_ones_more_often(train):
    names = [f"{colour} car" for colour in train.PAINTS]
    near = train.nearest("orange")
    assert {"red", "yellow"} < set(near) and "orange" not in near and len(near) == 4
    like = train.alike(names)["orange car"]
    assert {name: like.count(name) for name in names} == {
        f"{colour} car": 0 if colour == "orange" else 3 if colour in near else 1 for colour in train.PAINTS}


def test_alike_lists_names_that_share_a_word(train):
    like = train.alike(["letter a", "letter b", "red letter", "red car", "owl", "owl"])
    assert like["letter a"] == ["letter b", "red letter"] and like["red letter"] == ["letter a", "letter b", "red car"]
    assert like["owl"] == ["letter a", "letter b", "red car", "red letter"]


def square(colour):
    """RGBA uint8 [4,128,128]: a square of one colour on a transparent ground, with a white square in it."""
    rgba = torch.zeros(4, 128, 128, dtype=torch.uint8)
    rgba[:3, 32:96, 32:96] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    rgba[3, 32:96, 32:96] = 255
    rgba[:3, 48:56, 48:56] = 255
    return rgba


@pytest.mark.parametrize("name", ["red", "yellow", "green", "blue", "purple", "brown", "white", "black"])
def test_recoloured_drawings_have_the_named_colour_and_keep_their_highlights(train, name):
    """The original is a dull purple, which would stay dark if only its hue were turned."""
    painted = train.recolour(square((120, 70, 140)), name)
    wanted = [int(train.PAINTS[name][0][i:i + 2], 16) for i in (1, 3, 5)]
    got = painted[:3, 70:90, 70:90].float().mean((1, 2))
    assert (got - torch.tensor(wanted)).abs().max() < 12, got
    assert painted[:3, 50:54, 50:54].float().min() > 235 and torch.equal(painted[3], square((0, 0, 0))[3])
    assert train.colour_of(train.dominant(painted)) == name


def test_captions_name_the_colour_of_a_drawing(train, tmp_path, monkeypatch):
    words = {"fox": ["fox", "COLOUR fox"], "car": ["car", "auto", "COLOUR car"], "red-book": ["red book"],
             "koala": ["koala"]}
    monkeypatch.setattr(train, "vocabulary", lambda: words)
    rgba = torch.stack([square(c) for c in ((247, 133, 27), (44, 123, 224), (229, 48, 45), (150, 156, 163))])
    monkeypatch.setattr(train, "render_icons", lambda *_: (["fox", "car", "red-book", "koala"], rgba))
    found = train.items("icons", ["set"], tmp_path)
    first = [found.drawing.index(k) for k in range(4)]
    assert [found.captions[i] for i in first] == [["fox", "orange fox"], ["car", "auto", "blue car"], ["red book"],
                                                  ["koala", "grey koala"]]
    # "fox" implies orange, "car" implies no colour: only captions that imply or name the colour teach it
    assert [found.telling[i] for i in first] == [["fox"], ["blue car"], ["red book"], ["koala"]]
    foxes, cars = ([c for c, k in zip(found.captions, found.drawing, strict=True) if k == n][1:] for n in (0, 1))
    assert len(foxes) == len(cars) == 4
    assert all(len(c) == 1 and c[0].endswith(" fox") and c[0] != "orange fox" for c in foxes)
    assert all(c[0].endswith(" car") and c[1] == "car" for c in cars)
    assert [c for c, k in zip(found.captions, found.drawing, strict=True) if k == 3][1:] == [[], []]
    again = train.items("icons", ["set"], tmp_path)  # from the cache
    assert again.captions == found.captions and torch.equal(again.rgba, found.rgba)


def test_what_is_meant_to_be_white_is_whitened(train, tmp_path, monkeypatch):
    """The light grey, bluish fur becomes white; the black nose stays, and the rim is darker than the page."""
    rgba = square((200, 210, 222))
    rgba[:3, 60:68, 60:68] = 40
    white = train.whitened(rgba)
    fur = white[:3, 76:84, 60:68].float()
    assert fur.min() > 240 and (fur.amax(0) - fur.amin(0)).max() <= 3
    assert torch.equal(white[:3, 60:68, 60:68], rgba[:3, 60:68, 60:68]) and torch.equal(white[3], rgba[3])
    edge = torch.nonzero(rgba[3, 64])[0].item()
    assert white[:3, 76, edge].max() < fur.min() - 20
    assert train.whitened(square((120, 70, 40))) is None  # nothing in it is light
    monkeypatch.setattr(train, "vocabulary", lambda: {"panda": ["panda"], "koala": ["koala"]})
    monkeypatch.setattr(train, "render_icons", lambda *_: (["panda", "koala"], torch.stack([rgba, rgba])))
    found = train.items("icons", ["set"], tmp_path)
    assert torch.equal(found.rgba[0], white)
    assert found.captions[0] == ["panda", "white panda"] and found.telling[0] == ["panda"]
    assert torch.equal(found.rgba[1], rgba) and found.captions[1] == found.telling[1] == []
    assert torch.equal(found.rgba[found.drawing.index(1)], rgba)  # a koala is grey


def test_contrast_acts_where_the_wrong_caption_fits_better(train):
    right, wrong = (
        torch.tensor([0.05, 0.05, 0.05], requires_grad=True),
        torch.tensor([0.2, 0.05, 0.0], requires_grad=True),
    )
    value = train.contrast(right, wrong, width=0.01)
    value.sum().backward()
    assert_close(value[1].item(), 0.01 * math.log(2))
    assert_close(right.grad, torch.sigmoid(torch.tensor([-15.0, 0.0, 5.0])))
    assert_close(wrong.grad, -right.grad)


def test_dropout_acts_in_the_residual_blocks_alone(train):
    unet = train.UNet2DConditionModel.from_pretrained(ROOT / "models" / "emoji", subfolder="unet")
    train.set_dropout(unet, 0.3)
    rates = {name: m.p for name, m in unet.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {r for name, r in rates.items() if ".resnets." in name} == {0.3}
    assert {r for name, r in rates.items() if ".attentions." in name} == {0.0}


@pytest.mark.parametrize("flags, said", [(["--icons", "nowhere"], "nowhere/noto/icons.json: no such file; 6 more"),
                                         (["--icons", "x", "--drawings", "0"], "--drawings must be at least 1")])
def test_bad_input_of_the_training_is_refused(train, flags, said, monkeypatch, capsys, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    for style in ("twemoji", train.RENDERED):  # cached renders: their packages are not needed
        (work / f"{style}.npz").touch()
    monkeypatch.setattr(sys, "argv", ["train.py", "--work", str(work), *flags])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_restyling_keeps_the_shape_and_the_order_of_tones(train):
    alpha = torch.zeros(200, 1, 24, 24)
    alpha[..., 6:18, 6:18] = 1
    colour = torch.full((200, 3, 24, 24), 0.2)
    colour[..., 12:] = 0.8
    colour[:, :, 9, 9] = 1  # a detail of a single pixel
    rgb, wider = train.restyle(colour * alpha, alpha, torch.Generator().manual_seed(0))
    assert rgb.min() >= 0 and (rgb <= wider + 1e-6).all()
    grown = wider.sum((1, 2, 3)) > 12 * 12
    assert_close(wider[grown], torch.nn.functional.max_pool2d(alpha[grown], 3, 1, 1))
    assert_close(wider[~grown], alpha[~grown])
    ring = (wider > alpha).expand_as(rgb)
    assert rgb[ring].max() <= 0.3  # the outline is dark
    left, right, detail, edge = rgb[:, 0, 14, 9], rgb[:, 0, 14, 15], rgb[:, 0, 9, 9], rgb[:, 0, 14, 11]
    assert (left < right).all() and left.min() < 0.15 < 0.25 < left.max()  # tones change, their order does not
    flat, lined = detail == left, edge < left - 1e-3
    for some in (grown, flat, lined):
        assert 0.15 < some.float().mean() < 0.35
    names = "backhand index pointing left", "three oclock", "letter r", "keycap 7", "waning crescent moon"
    assert all(train.HANDED.search(n) for n in names) and not any(map(train.HANDED.search, ("red apple", "cat face")))


@pytest.mark.parametrize("losses, best", [([3.0, 1.0, 2.0], 1), ([0.5, 1.0, 0.7], 0)])
def test_the_result_mixes_the_last_weights_with_the_best_held_out_ones(train, tmp_path, monkeypatch, losses, best):
    clock = iter(range(0, 10000, 180))
    monkeypatch.setattr(train, "time", types.SimpleNamespace(time=lambda: next(clock)))  # a step takes three minutes
    torch.manual_seed(0)
    def start():
        return train.Run(tmp_path / "net.pt", {"net": torch.nn.Linear(2, 2)}, 0.1, 12)
    run, held_out, lines = start(), iter(losses), []
    def weight():
        return run.ema["net"].weight.clone()
    exported = [weight()]  # the initial weights may be the best
    run.train(lambda: (run.modules["net"].weight - 1).square().sum(), lambda net: torch.tensor(next(held_out)),
              lambda: exported.append(weight()), lines.append, share=0.75)
    assert run.step == 4 and len(exported) == 3 and len([x for x in lines if "held-out" in x]) == 3
    mixed, run = weight(), start()  # the checkpoint holds the unmixed averages
    assert run.step == 4 and run.best[0] == min(losses) and (weight() - exported[best]).abs().amin() > 1e-3
    assert_close(run.best[1]["net"]["weight"], exported[best])
    assert_close(mixed, 0.75 * weight() + 0.25 * exported[best])


def test_renders_are_named_by_their_code_points(train, tmp_path):
    icons, assets = tmp_path / "@iconify-json", tmp_path / "@lobehub" / train.RENDERED / "assets"
    for folder, chars in (("noto", {"1f34e": "red-apple", "1f1e6": "flag-x"}), ("twemoji", {"2764-fe0f": "red-heart"})):
        (icons / folder).mkdir(parents=True)
        (icons / folder / "chars.json").write_text(json.dumps(chars))
    assets.mkdir(parents=True)
    for code, colour in (("1f34e", "red"), ("2764", "pink"), ("1f1e6", "blue"), ("1f9d1-1f3fb", "tan")):
        Image.new("RGBA", (64, 64), colour).save(assets / f"{code}.webp", lossless=True)
    names, pictures = train.open_pictures(icons)
    assert names == ["red-apple", "red-heart"]  # the others are not in the vocabulary
    assert [p.shape for p in pictures] == [(4, train.RENDER, train.RENDER)] * 2
    assert pictures[0][:, 5, 5].tolist() == [255, 0, 0, 255]


def test_names_with_other_spellings_are_normalised(train):
    assert train.compact("alarm-clock 2") == "alarmclock2"
    assert train.hour("clock8thirty") == "eightthirty" and train.hour("clock12oclock") == "twelveoclock"
    assert train.hour("clock13oclock") == "clock13oclock" and train.hour("alarm-clock") == "alarm-clock"


def test_a_saved_model_is_readable_by_transformers_4(train, tmp_path):
    (tmp_path / "text_encoder").mkdir()
    path, index = tmp_path / "text_encoder" / "model.safetensors", tmp_path / "model_index.json"
    train.save_file({"final_layer_norm.bias": torch.ones(2)}, path)
    index.write_text('{"tokenizer": ["transformers", "CLIPTokenizer"]}')
    for _ in range(2):  # the second call changes nothing
        train.readable_by_transformers_4(tmp_path)
        assert {k: v.tolist() for k, v in train.load_file(path).items()} == {"text_model.final_layer_norm.bias": [1, 1]}
        assert index.read_text() == '{"tokenizer": ["transformers", "CLIPTokenizerFast"]}'
    shipped = train.load_file(ROOT / "models" / "emoji" / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in shipped)


class Answers(torch.nn.Module):
    """A stand-in for a UNet whose prediction is says(x, t)."""

    def __init__(self, says):
        super().__init__()
        self.says = says

    def forward(self, x, t, states):
        return types.SimpleNamespace(sample=self.says(x, t.view(-1, 1, 1, 1)))


def test_a_velocity_student_learns_the_mean_of_its_teacher(train):
    """A student that predicts (eps - x) / (1 - sigma) has no error; beyond the teacher's noise levels the target is the
    picture's own velocity."""
    import diffusers
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    text = Answers(None)
    text.forward = lambda ids: (ids,)
    student = Answers(lambda x, t: (0.3 * x / ((t / 1000) ** 2 + (1 - t / 1000) ** 2).sqrt() - x) / (1 - t / 1000))
    velocity = train.Velocity(Answers(lambda x, t: 0.3 * x), text, scheduler)
    x0, noise = (torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    t = torch.linspace(10, 990, 20).long()
    errors = velocity.errors_of(student, text, x0, torch.zeros(20), noise, t, beyond=0.2)
    assert_close(errors[4:], torch.zeros(16), atol=1e-8, rtol=0)
    last = (1 - scheduler.alphas_cumprod[-1]).sqrt() / (scheduler.alphas_cumprod[-1].sqrt()
                                                        + (1 - scheduler.alphas_cumprod[-1]).sqrt())
    for i in range(4):
        sigma = last + (1 - last) * (i + 0.5) / 4
        x = (1 - sigma) * x0[i] + sigma * noise[i]
        wrong = student(x[None], 1000 * sigma.view(1), None).sample[0] - (noise[i] - x0[i])
        assert_close(errors[i], wrong.square().mean(), rtol=1e-4, atol=1e-4)
