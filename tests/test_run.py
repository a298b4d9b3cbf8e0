"""run.py: the command line, the files of a run, --compare, the editors alone, bad input."""
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, nerf_scene, outputs
from PIL import Image

import run
from edit import MODES, SCENES
from files import sheets
from image.figures import outside
from scene.cameras import sides
from scene.reading import load_scene
from splat import Splats


@pytest.mark.parametrize("mode, flags", [("svg", ()), ("svg", ("--colours-only", "--loss", "dds")), ("image", ()),
                                         ("image", ("--pixels", "--loss", "sds", "--schedule", "decreasing"))])
def test_a_run_writes_its_files_and_is_reproducible(command, tmp_path, mode, flags):
    assert command(*flags, mode=mode) == 0 and command(*flags, mode=mode, out="again") == 0
    first = outputs(tmp_path / "out")
    suffix = "svg" if mode == "svg" else "png"
    assert set(first) >= {
        f"source.{suffix}",
        "source.png",
        f"result.{suffix}",
        "result.png",
        "progress.gif",
        "sheet.png",
    }
    assert first == outputs(tmp_path / "again")
    assert first["result.png"] != first["source.png"]
    assert command(*flags, "--seed", 1, mode=mode, out="other") == 0
    assert outputs(tmp_path / "other")["result.png"] != first["result.png"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["seed"] == 0 and config["target"] == "a cat" and len(config["sha256"]) == 64
    assert not list((tmp_path / "out").glob(".*"))  # no partial file is left behind


def test_compare_shows_the_three_methods_side_by_side(command, tmp_path):
    assert command("--compare", "--steps", 2) == 0
    assert Image.open(tmp_path / "out" / "sheet.png").width > 4 * sheets.SHEET_SIZE
    results = [(tmp_path / "out" / name / "result.png").read_bytes() for name in ("sds", "dds", "pds")]
    assert len(set(results)) == 3


@pytest.mark.parametrize("name", ["sdedit", "inv2n", "in2n", "drfs"])
def test_an_editor_edits_a_picture_on_its_own(command, pipelines, tmp_path, name, capsys):
    flags = ["--loss", name, "--instruct", pipelines["instruct"]]
    assert command(*flags, mode="image") == 0 and command(*flags, mode="image", out="again") == 0
    first = outputs(tmp_path / "out")
    assert first == outputs(tmp_path / "again") and first["result.png"] != first["source.png"]
    assert command(*flags, "--seed", 1, mode="image", out="other") == 0
    assert outputs(tmp_path / "other")["result.png"] != first["result.png"]
    with pytest.raises(SystemExit):
        command(*flags)
    assert f"{name} edits pictures: only with --mode image, nerf and splat" in capsys.readouterr().err


def test_a_model_that_is_not_an_editor_is_refused(command, pipelines, tmp_path, capsys):
    assert command("--loss", "in2n", mode="image") == 2  # --model is not an editor
    assert "no InstructPix2Pix model" in capsys.readouterr().err
    assert command("--loss", "in2n", "--instruct", "no/such/model", mode="image") == 2
    assert "no/such/model: no such model directory" in capsys.readouterr().err
    assert command("--loss", "in2n", "--instruct", ROOT / "models" / "emoji", mode="image") == 2
    assert "made for 64 pixels" in capsys.readouterr().err and not (tmp_path / "out").exists()
    nerf_scene(tmp_path / "scene", views=4, size=16)
    assert (
        run.main(
            [
                "--scene",
                str(tmp_path / "scene"),
                "--source",
                "a face",
                "--target",
                "a cat",
                "--compare",
                "pds",
                "in2n",
                "--model",
                str(pipelines["sd"]),
                "--device",
                "cpu",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert "no InstructPix2Pix model" in capsys.readouterr().err
    assert not list(tmp_path.glob("*-fit.pt"))  # refused before anything is fitted


def test_the_change_outside_the_subject_is_measured():
    before, after = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8), "white")
    after.paste((229, 229, 229), (4, 0, 8, 8))  # 0.102 darker on the right
    after.paste((0, 0, 0), (0, 0, 4, 4))  # black in the upper left, which is the subject
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    mask[0, 0, 0, 0] = True
    wanted = -10 * math.log10((26 / 255) ** 2 * 2 / 3)
    assert outside([before], [after], [mask]) == (
        f"outside the subject, 75 % of the picture: PSNR {wanted:.1f} dB against the source")


def test_splats_are_fitted_edited_refined_and_exported(small_runs, pipelines, tmp_path, capsys, monkeypatch):
    nerf_scene(tmp_path / "scene", views=8, size=16)
    flags = ["--mode", "splat", "--scene", str(tmp_path / "scene"), "--fit-seconds", "0.2", "--device", "cpu",
             "--source", "a", "--target", "b", "--model", str(pipelines["sd"]), "--steps", "3", "--refine", "12",
             "--export"]
    assert run.main([*flags, "--out", str(tmp_path / "out" / "edit")]) == 0
    written = outputs(tmp_path / "out" / "edit")
    assert {"result.ply", "turntable.gif", "depth.png", "sheet.png"} <= set(written)
    export = load_scene(tmp_path / "out" / "edit" / "export")
    assert len(export.train) + len(export.test) == 6
    assert len(list((tmp_path / "out").glob("scene-splat-*-fit.pt"))) == 1
    scene = load_scene(tmp_path / "scene")
    edited = Splats.load(tmp_path / "out" / "edit" / "result.ply", scene)  # the fit after the edit
    with torch.no_grad():
        picture = edited.render(sides(edited, sheets.SIDES, 24)[0])
    page = Image.open(tmp_path / "out" / "edit" / "result.png").crop((0, 0, 24, 24))
    assert (picture[0].permute(1, 2, 0) * 255 - torch.from_numpy(np.array(page)).float()).abs().max() < 1


def test_the_loop_and_the_loaders_have_the_same_modes():
    assert tuple(run.LOAD) == tuple(run.SUFFIX) == tuple(run.EXAMPLE) == MODES and tuple(run.FITTED) == SCENES


@pytest.mark.parametrize("flags, message", [
    (["--svg", "nothing.svg"], "nothing.svg: no such file"), (["--target", " "], "--target is missing or empty"),
    (["--model", "no/such/model"], "no/such/model: no such model directory"),
    (["--svg", "broken.svg"], "broken.svg"), (["--svg", "empty.svg"], "empty.svg: nothing to edit"),
    (["--t-min", "0.9", "--t-max", "0.1"], "t_min <= t_max"), (["--stride", "2000"], "stride")])
def test_bad_input_gets_one_line_and_overwrites_nothing(command, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.svg").write_text("<svg><path d='M0 0")
    (tmp_path / "empty.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 1 1'/>")
    assert command(*flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("run.py: error: ") and message in error[0]
    assert not (tmp_path / "out").exists()
    assert command("--image", tmp_path / "broken.svg", mode="image") == 2
    assert "broken.svg: no readable picture" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_empty_prompt_is_refused_for_the_shipped_example_too(tmp_path, capsys):
    assert run.main(["--target", "", "--out", str(tmp_path / "out")]) == 2
    assert "--target is missing or empty" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--steps", "0"], ["--guidance", "nan"], ["--seed", "x"], ["--mode", "video"]])
def test_bad_flags_are_refused_by_the_parser(command, flags, capsys):
    with pytest.raises(SystemExit) as e:
        command(*flags)
    assert e.value.code == 2 and flags[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--fit-only"], "--fit-only: only with --mode nerf and splat"),
        (["--latent", "1"], "--latent: only with --mode image"),
        (["--refine", "3"], "--refine: only with --mode image and nerf and splat"),
        (["--list", "edits.txt"], "--list"),
        (["--image", "a.png"], "--svg and --image name two things to edit: choose one"),
    ],
)
def test_options_of_another_mode_are_refused(command, flags, message, capsys):
    with pytest.raises(SystemExit) as e:
        command(*flags)
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_run_py_works_as_a_script(pipelines, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "run.py"), "--model", str(pipelines["sd"]), "--steps", "2",
                           "--out", str(tmp_path / "out")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sheet.png" in done.stdout and "Warning" not in done.stderr and "step" in done.stderr
