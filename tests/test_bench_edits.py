"""bench/edits.py and bench/step.py: the figures, the list of edits, the table and its sheet, the time of a step."""
import csv
import io
import json
import math
import multiprocessing
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ABAR, DRAWING, ROOT, rand
from PIL import Image

import run
import toy
from bench import figures
from bench.__main__ import main as measure
from bench.edits import read_edits
from bench.figures import Clip, log_odds, peak, restart_peak, ssim
from files import sheets
from files.sheets import beside
from files.writing import write
from image.figures import psnr
from pipelines.captions import plain, read_captions

SRC, TGT = torch.tensor([0]), torch.tensor([1])


def test_psnr_and_ssim_have_their_known_values():
    a, b = rand(1, 3, 32, 32).sigmoid(), rand(1, 3, 32, 32, seed=1).sigmoid()
    assert ssim(a, a) == pytest.approx(1, abs=1e-12) and psnr(a, a) == 100
    # for two constant pictures only the means matter
    dark, light = torch.full_like(a, 0.3), torch.full_like(a, 0.5)
    assert ssim(dark, light) == pytest.approx((2 * 0.3 * 0.5 + 1e-4) / (0.3 ** 2 + 0.5 ** 2 + 1e-4), abs=1e-9)
    assert psnr(dark, light) == pytest.approx(-20 * math.log10(0.2))
    # an 11 x 11 picture has a single window: weighted means, variances and covariance by numpy
    a, b = a[..., :11, :11], b[..., :11, :11]
    line = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5 ** 2))
    weights, values = np.outer(line, line).ravel(), []
    for x, y in zip(a[0].flatten(1).numpy(), b[0].flatten(1).numpy(), strict=False):
        (vx, vxy), (_, vy) = np.cov(x, y, aweights=weights, ddof=0)
        mx, my = np.average(x, weights=weights), np.average(y, weights=weights)
        values.append((2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx ** 2 + my ** 2 + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(a, b) == pytest.approx(np.mean(values), abs=1e-9) and ssim(a, b) < 0.9


def test_log_odds_match_the_exact_prior():
    means = torch.tensor([[[-1.0, 0.5]], [[1.5, 0.0]]], dtype=torch.float64)
    prior = toy.Mixtures(means, guidance=3.0)
    odds = [log_odds(prior, x.view(1, 2, 1, 1), TGT, SRC) for x in (means[0, 0], means.mean((0, 1)), means[1, 0])]
    assert odds[0] < odds[1] < odds[2] and odds[0] < -0.1 and odds[2] > 0.1
    assert log_odds(prior, means[1].view(1, 2, 1, 1), SRC, TGT) == pytest.approx(-odds[2])
    assert prior.guidance == 3.0
    # the long form: a loop over the timesteps, the noise prediction of one Gaussian written out
    noises, terms = torch.randn(8, 2, 1, 1, generator=torch.Generator().manual_seed(0)).double(), []
    for noise, t in zip(noises.view(8, 2), range(200, 901, 100), strict=False):
        x_t = ABAR[t].sqrt() * means[1, 0] + (1 - ABAR[t]).sqrt() * noise
        var = ABAR[t] * prior.sigma ** 2 + 1 - ABAR[t]
        predictions = [(1 - ABAR[t]).sqrt() * (x_t - ABAR[t].sqrt() * mean[0]) / var for mean in means]
        errors = [(noise - eps).square().sum() for eps in predictions]
        terms.append((errors[0] - errors[1]).item())
    assert odds[2] == pytest.approx(np.mean(terms), rel=1e-9)


@pytest.fixture
def edits(pipelines, tmp_path, monkeypatch, capsys):
    """Run `bench edits` on a drawing and a picture with a tiny pipeline that sets its own steps; returns its output."""
    for name, size in {"FRAMES": 2, "FRAME_SIZE": 24, "SHEET_SIZE": 64}.items():  # large animations are slow
        monkeypatch.setattr(sheets, name, size)
    monkeypatch.setattr(figures.log_odds, "__defaults__", (2,))  # noises
    monkeypatch.setattr(figures.pixels, "__defaults__", (64,))  # pixels a side of the pictures that are measured
    (tmp_path / "face.svg").write_text(DRAWING)
    Image.new("RGB", (20, 12), "tomato").save(tmp_path / "red.png")
    (tmp_path / "list.txt").write_text("# two edits\nsvg | face.svg | a face | a cat\n\nimage|red.png|a red|a blue\n")
    shutil.copytree(pipelines["sd"], tmp_path / "model")
    guidance = dict.fromkeys(("sds", "dds", "pds"), 3)
    (tmp_path / "model" / "pds.json").write_text(json.dumps({"guidance": guidance, "steps": 2, "inversion_steps": 4,
                                                              "svg": {"steps": 1}}))

    def call(*flags, out="out"):
        capsys.readouterr()
        code = measure(
            [
                "edits",
                "--list",
                str(tmp_path / "list.txt"),
                "--model",
                str(tmp_path / "model"),
                "--compare",
                "sds",
                "pds",
                "--device",
                "cpu",
                "--out",
                str(tmp_path / out),
                *map(str, flags),
            ]
        )
        return code, capsys.readouterr().out.splitlines()
    return call


def csv_rows(path, without=()):
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


@pytest.fixture
def fake_edits(edits, tmp_path, monkeypatch):
    """`bench edits` without real edits: run_one writes five flat side views and records its arguments."""
    called = []

    def run_one(prior, loss, args, out):
        called.append((args.mode, loss))
        out.mkdir(parents=True)
        for name, tints in {"source": range(0, 100, 20), "result": range(10, 110, 20)}.items():
            beside([Image.new("RGB", (32, 32), (100, 100, tint)) for tint in tints]).save(out / f"{name}.png")
        write(out / "config.json", json.dumps(run.settings(run.complete(args, prior, loss), prior, loss)))
    monkeypatch.setattr(run, "run_one", run_one)
    monkeypatch.setattr(run, "fit", lambda args: called.append(("fit", args.fit)))
    edits.called = called
    (tmp_path / "scene").mkdir()
    (tmp_path / "list.txt").write_text("nerf | scene | a ball | a face\nsplat | scene | a ball | a face\n")
    return edits


def test_the_table_holds_the_means_and_finished_rows_are_reused(edits, tmp_path, monkeypatch):
    code, lines = edits()
    assert code == 0
    rows = csv_rows(tmp_path / "out" / "table.csv")
    wanted = [(m, f, n) for m, f in (("svg", "face.svg"), ("image", "red.png")) for n in ("sds", "pds")]
    assert [(r["mode"], r["file"], r["loss"]) for r in rows] == wanted
    start = next(i for i, line in enumerate(lines) if line.startswith("mode "))
    printed = [line.split() for line in lines[start:start + 7]]
    assert printed[0] == ["mode", "loss", "edits", "log-odds", "read", "named", "turn", "PSNR", "SSIM", "IoU", "s",
                          "MB"]
    assert [p[:3] for p in printed[1:]] == [[m, n, "1"] for m in ("svg", "image") for n in ("source", "sds", "pds")]
    assert len(printed[1]) == 5 and float(printed[1][3]) == round(float(rows[0]["before"]), 2)
    for p, row in zip(printed[2:4] + printed[5:], rows, strict=False):
        assert p[4] == ("1/1" if float(row["log-odds"]) > 0 else "0/1")
        assert [float(p[7]), float(p[8])] == [round(float(row["PSNR"]), 1), round(float(row["SSIM"]), 3)]
        assert float(row["s"]) > 0 and float(row["MB"]) > 50
    # settings of one mode do not leak into the next
    steps = [json.loads((tmp_path / "out" / folder / "pds" / "config.json").read_text())["steps"]
             for folder in ("svg/face-a-cat", "image/red-a-blue")]
    assert steps == [1, 2]
    for mode in ("svg", "image"):
        assert Image.open(tmp_path / "out" / f"{mode}.png").size == (3 * 208 + 16, 192 + 56 + 32)
    assert edits(out="again")[0] == 0
    apart = [csv_rows(tmp_path / out / "table.csv", ("s", "MB")) for out in ("out", "again")]
    assert apart[0] == apart[1]

    def refuse(*_):
        raise FloatingPointError("it runs")
    monkeypatch.setattr(run, "run_one", refuse)
    assert edits() == (0, lines[start - 1:])  # every row is reused, including its seconds
    assert edits("--modes", "image")[0] == 0 and len(csv_rows(tmp_path / "out" / "table.csv")) == 2
    assert edits("--seed", 1)[0] == 1  # with other settings nothing is reused


def test_several_seeds_print_a_mean_and_its_spread(edits, tmp_path):
    code, lines = edits("--modes", "svg", "--seeds", 3, "--seed", 5)
    assert code == 0
    rows = csv_rows(tmp_path / "out" / "table.csv")
    assert [(row["loss"], row["seed"]) for row in rows] == [(loss, s) for loss in ("sds", "pds") for s in "567"]
    table = [line.split() for line in lines if line.startswith(("svg", "      "))]
    assert [words[:3] for words in table] == [
        ["svg", "source", "3"], ["svg", "sds", "3"], ["+-", table[2][1], table[2][2]], ["svg", "pds", "3"],
        ["+-", table[4][1], table[4][2]]]
    odds = [float(row["log-odds"]) for row in rows[3:]]
    assert float(table[3][3]) == pytest.approx(np.mean(odds), abs=0.006)
    assert float(table[4][1]) == pytest.approx(np.std(odds, ddof=1), abs=0.006)
    # the first seed uses the folder of a single-seed table, whose rows are unchanged
    made = {path.name: json.loads((path / "config.json").read_text())["seed"]
            for path in (tmp_path / "out" / "svg" / "face-a-cat").iterdir()}
    assert made == {"sds": 5, "sds-seed6": 6, "sds-seed7": 7, "pds": 5, "pds-seed6": 6, "pds-seed7": 7}
    code, lines = edits("--modes", "svg", "--seed", 5)
    assert code == 0 and not any("+-" in line for line in lines)
    assert "seed" not in csv_rows(tmp_path / "out" / "table.csv")[0]


def test_the_seconds_exclude_the_fit_and_scenes_are_measured_from_all_sides(fake_edits, tmp_path):
    assert fake_edits()[0] == 0
    fits = [("fit", tmp_path / "out" / mode / f"scene-{mode}") for mode in ("nerf", "splat")]
    assert fake_edits.called == [fits[0], ("nerf", "sds"), fits[0], ("nerf", "pds"),
                                 fits[1], ("splat", "sds"), fits[1], ("splat", "pds")]
    row = csv_rows(tmp_path / "out" / "table.csv")[0]
    # one of three channels is brighter by 10 of 255 in every view
    assert float(row["PSNR"]) == pytest.approx(10 * math.log10(3 * 25.5 ** 2), abs=1e-3)
    low, high = np.arange(0, 100, 20) / 255, np.arange(10, 110, 20) / 255
    blue = (2 * low * high + 1e-4) / (low ** 2 + high ** 2 + 1e-4)
    assert float(row["SSIM"]) == pytest.approx((2 + blue.mean()) / 3, abs=1e-5)
    assert Image.open(tmp_path / "out" / "nerf.png").size == (5 * 176 + 16, 3 * (160 + 56 + 16) + 16)


def test_an_interrupted_table_resumes_with_the_missing_edits(fake_edits, tmp_path, monkeypatch):
    made = run.run_one

    def stop(prior, loss, args, out):
        if (args.mode, loss) == ("splat", "sds"):
            made(prior, loss, args, out)
            raise KeyboardInterrupt
        return made(prior, loss, args, out)
    monkeypatch.setattr(run, "run_one", stop)
    assert fake_edits()[0] == 130
    kept = (tmp_path / "out" / "nerf" / "scene-a-face" / "pds" / "row.json").read_bytes()
    shutil.rmtree(tmp_path / "out" / "splat")
    monkeypatch.setattr(run, "run_one", made)
    fake_edits.called.clear()
    assert fake_edits()[0] == 0
    assert [c for c in fake_edits.called if c[0] != "fit"] == [("splat", "sds"), ("splat", "pds")]
    assert (tmp_path / "out" / "nerf" / "scene-a-face" / "pds" / "row.json").read_bytes() == kept


def test_the_list_of_the_examples_is_the_default(edits, tmp_path, monkeypatch):
    listed = []

    def read(path, only=None):
        listed.append(path)
        return read_edits(tmp_path / "list.txt", only)
    monkeypatch.setattr("bench.edits.read_edits", read)
    assert measure(["edits", "--compare", "inv2n", "pds", "--steps", "1", "--model", str(tmp_path / "model"),
                    "--out", str(tmp_path / "out")]) == 0
    assert listed == [ROOT / "examples" / "edits.txt"]
    rows = [(row["mode"], row["loss"]) for row in csv_rows(tmp_path / "out" / "table.csv")]
    assert rows == [("svg", "pds"), ("image", "inv2n"), ("image", "pds")]  # editors of pictures skip drawings


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
    folder = tmp_path_factory.mktemp("clip")
    tokens = AutoTokenizer.from_pretrained(ROOT / "models" / "emoji" / "tokenizer")
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    text = small | dict(vocab_size=len(tokens), max_position_embeddings=20, bos_token_id=tokens.bos_token_id,
                        pad_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id)
    vision = small | dict(image_size=16, patch_size=8)
    CLIPModel(CLIPConfig(projection_dim=8, vision_config=vision, text_config=text)).save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(pictures, tokens).save_pretrained(folder)
    return folder


def test_clip_and_lpips_add_their_columns_to_finished_rows(fake_edits, tiny_clip, tmp_path, monkeypatch):
    assert fake_edits("--modes", "nerf")[0] == 0 and "CLIP" not in csv_rows(tmp_path / "out" / "table.csv")[0]
    fake_edits.called.clear()

    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, a, b):
            assert a.dtype == torch.float32 and a.min() < 0
            return (a - b).abs().mean().view(1, 1, 1, 1)
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    code, lines = fake_edits("--modes", "nerf", "--clip", tiny_clip)
    assert code == 0 and not fake_edits.called  # recomputed from the files
    row, header = csv_rows(tmp_path / "out" / "table.csv")[0], next(line for line in lines if line.startswith("mode "))
    assert header.split()[5:] == ["named", "turn", "PSNR", "SSIM", "IoU", "LPIPS", "CLIP", "dir", "s", "MB"]
    assert float(row["LPIPS"]) == pytest.approx(2 * 10 / 255 / 3, rel=1e-4)
    # the long form: each view separately, with the two encoders of the model
    clip = Clip(str(tiny_clip), "cpu")
    def picture(tint):
        values = clip.processor.image_processor(Image.new("RGB", (32, 32), (100, 100, tint)), return_tensors="pt")
        return clip.model.visual_projection(clip.model.vision_model(**values).pooler_output)[0]
    def unit(x):
        return x / x.norm()
    with torch.no_grad():
        texts = [clip.processor.tokenizer(text, return_tensors="pt") for text in ("a ball", "a face")]
        y_src, y_tgt = (unit(clip.model.text_projection(clip.model.text_model(**t).pooler_output)[0]) for t in texts)
        sides = [(unit(picture(tint)), unit(picture(tint + 10))) for tint in range(0, 100, 20)]
        score = np.mean([(now @ y_tgt).item() for _, now in sides])
        change = np.mean([(unit(now - was) @ unit(y_tgt - y_src)).item() for was, now in sides])
    assert float(row["CLIP"]) == pytest.approx(score, abs=1e-4) and float(row["dir"]) == pytest.approx(change, abs=1e-3)


@pytest.mark.parametrize("text, message", [
    ("# fine\n\nsvg | face.svg | a face", "line 3: need mode | file | source prompt | target prompt"),
    ("svg | face.svg | | a cat", "line 1: need mode"),
    ("video | face.svg | a | b", "line 1: mode 'video' is not one of svg, image"),
    ("svg | face.svg | a | b\nimage | cat.png | a | b", "cat.png: no such file"),
    ("nerf | face.svg | a | b", "face.svg: no such folder"), ("# nothing", "no edit in it"),
    ("svg | face.svg | a | b\nsvg | face.svg | c | B", "line 2: its results would lie in svg/face-b with another")])
def test_a_bad_line_of_the_list_is_named_and_nothing_runs(fake_edits, tmp_path, capsys, text, message):
    (tmp_path / "list.txt").write_text(text)
    assert measure(["edits", "--list", str(tmp_path / "list.txt"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith(f"bench: error: {tmp_path / 'list.txt'}") and message in error[0]
    assert not fake_edits.called and not (tmp_path / "out").exists()


def test_a_missing_or_damaged_clip_is_reported_in_one_line(fake_edits, tiny_clip, tmp_path, capsys):
    from safetensors.torch import load_file, save_file
    bad = shutil.copytree(tiny_clip, tmp_path / "damaged") / "model.safetensors"
    bad.write_bytes(bad.read_bytes()[:1000])
    part = shutil.copytree(tiny_clip, tmp_path / "part") / "model.safetensors"
    weights = load_file(part)
    save_file({k: v for k, v in weights.items() if "text" not in k}, part, metadata={"format": "pt"})
    for name in ("damaged", "part", "none"):
        capsys.readouterr()
        code = measure(["edits", "--list", str(tmp_path / "list.txt"), "--model", str(tmp_path / "model"),
                        "--out", str(tmp_path / "out"), "--clip", str(tmp_path / name)])
        error = capsys.readouterr().err.splitlines()
        assert code == 2 and len(error) == 1 and error[0].startswith(f"bench: error: {tmp_path / name}: ")
    assert not fake_edits.called and not (tmp_path / "out").exists()


def test_the_error_of_a_non_finite_loss_names_the_edit(fake_edits, monkeypatch, capsys):
    def fail(*_):
        raise FloatingPointError("pds: the loss is nan at step 3")
    monkeypatch.setattr(run, "run_one", fail)
    with monkeypatch.context() as context:
        context.setattr(sys, "stderr", io.StringIO())
        assert fake_edits()[0] == 1
        assert "nerf/scene-a-face: pds: the loss is nan at step 3" in sys.stderr.getvalue()


def growth():
    """How far 128 MB that are freed immediately raise the memory peak, in MB, and how far the peak rises after that."""
    device = torch.device("cpu")
    restart_peak(device)
    before = peak(device)
    torch.ones(2 ** 25)
    first = peak(device) - before
    restart_peak(device)
    return first, peak(device) - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can reset the peak")
def test_the_memory_peak_can_be_reset():
    """In a process of its own, whose memory nothing else changes meanwhile."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        with_it, anew = pool.apply(growth)
    assert 100 < with_it < 200 and anew < 60  # 128 MB, freed immediately


def test_a_step_is_the_network_and_the_rest(capsys):
    assert measure(["step", "--steps", "3"]) in (0, 1)  # 1 where the machine is too slow for the bars
    out = capsys.readouterr().out
    whole, network, rest = (float(re.search(rf"{name} +([0-9.]+) ms", out)[1])
                            for name in ("whole step, batch 1", "the network's forward", "everything else"))
    assert network > 0 and 0 < rest < whole


def test_the_shipped_list_is_complete():
    found = read_edits(ROOT / "examples" / "edits.txt")
    assert [sum(mode == m for mode, *_ in found) for m in ("svg", "image", "nerf")] == [10, 10, 3]
    taught = read_captions((ROOT / "models" / "emoji" / "captions.txt").read_text())
    assert {plain(p) for _, _, *prompts, _ in found for p in prompts} <= set(taught)
    for _, file, *_ in found:
        if file.suffix == ".png":
            assert Image.open(file).size == (128, 128) and file.stat().st_size < 10_000
