"""run.py with trained models (--splats, --fitted, --up), and the names of fits and folders."""
import json
import re
import warnings

import numpy as np
import pytest
import torch
from conftest import nerf_scene, outputs
from PIL import Image

import run
from loop.fit import kept_in
from nerf import NeRF
from options import files_of, slug
from scene.reading import load_scene
from splat import Splats


@pytest.fixture
def ball(tmp_path):
    """The folder of a small scene, nerf_scene's ball, and a file of Gaussians on its surface."""
    folder = nerf_scene(tmp_path / "ball", views=8, size=16)
    normal = torch.nn.functional.normalize(torch.randn(400, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    splats = Splats(load_scene(folder), 0.75 * normal, torch.full((400, 3), -2.7),
                    torch.tensor([[1.0, 0, 0, 0]]).expand(400, 4), torch.full((400,), 3.0), normal / 2 / 0.28209479,
                    torch.zeros(400, 0, 3))
    splats.save(tmp_path / "trained.ply")
    return folder, tmp_path / "trained.ply"


@pytest.fixture
def edit(small_runs, pipelines, tmp_path, capsys):
    """Call run.main with a tiny pipeline and two steps; returns its exit code and its output on stderr."""
    def call(*flags, out="out"):
        code = run.main([*map(str, flags), "--device", "cpu", "--source", "a", "--target", "b", "--model",
                         str(pipelines["sd"]), "--steps", "2", "--out", str(tmp_path / out)])
        return code, capsys.readouterr().err
    return call


def one_error(printed, *parts):
    errors = [line for line in printed.splitlines() if line.startswith("run.py: error: ")]
    assert len(errors) == 1 and all(part in errors[0] for part in parts), printed


# ---- trained models -----------------------------------------------------------------------------------

def test_gaussians_are_edited_with_their_photographs(ball, edit, tmp_path, monkeypatch):
    folder, file = ball
    monkeypatch.setattr(Splats, "fit", lambda *_, **__: pytest.fail("it was fitted"))
    before = file.read_bytes()
    code, printed = edit("--mode", "splat", "--scene", folder, "--splats", file)
    assert code == 0 and "warning" not in printed and not list(tmp_path.glob("*-fit.pt"))
    written = outputs(tmp_path / "out")
    assert {"result.ply", "sheet.png", "turntable.gif"} <= set(written) and file.read_bytes() == before
    edited = Splats.load(tmp_path / "out" / "result.ply", load_scene(folder))
    assert len(edited.means) == len(Splats.load(file, load_scene(folder)).means)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["fitted"] == str(file)
    assert edit("--splats", file, "--scene", folder, "--resume")[0] == 0  # the flag implies the mode
    assert outputs(tmp_path / "out") == written
    Splats.load(file, load_scene(folder)).save(tmp_path / "other.ply")
    (tmp_path / "other.ply").write_bytes(before[:-4] + bytes(4))
    code, printed = edit("--splats", tmp_path / "other.ply", "--scene", folder, "--resume")
    assert code == 2
    one_error(printed, "cannot resume: the earlier run differs in ")


def test_gaussians_are_edited_without_photographs(ball, edit, tmp_path):
    file = ball[1]
    code, printed = edit("--splats", file, "--up", "z", "--export")
    assert code == 0 and "warning" not in printed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = load_scene(tmp_path / "out" / "export")
    assert len(whole.train) + len(whole.test) == 24
    assert (tmp_path / "out" / "source.ply").read_bytes() == file.read_bytes()
    again, before = tmp_path / "out" / "result.ply", outputs(tmp_path / "out")
    code, printed = edit("--splats", again, "--up", "z")
    assert code == 2 and outputs(tmp_path / "out") == before
    one_error(printed, f"{again}: the run would overwrite it: choose another --out")


def test_an_edit_in_a_place_of_the_scene_shows_where_it_acts(ball, edit, tmp_path):
    folder, file = ball
    before = Splats.load(file, load_scene(folder))
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "0.png")  # one of eight photographs
    for name, flags in {"mask": ["--mask", tmp_path / "masks"], "ball": ["--ball", 0.75, 0, 0, 0.5],
                        "box": ["--box", 0, -1, -1, 1, 1, 1]}.items():
        code, told = edit("--mode", "splat", "--scene", folder, "--splats", file, *flags, out=name)
        assert code == 0, told
        assert (tmp_path / name / "masks.png").exists()
        changed = (Splats.load(tmp_path / name / "result.ply", load_scene(folder)).sh_dc != before.sh_dc).any(1)
        assert 0 < changed.float().mean() < 0.9
    assert not changed[before.means[:, 0] < -0.1].any()
    code, told = edit("--mode", "splat", "--scene", folder, "--splats", file, "--ball", 50, 0, 0, 0.1, out="none")
    assert code == 2 and not (tmp_path / "none").exists()
    one_error(told, "the box or ball of the edit is empty")


@pytest.mark.parametrize("flags", [["--splats"], ["--scene"], ["--mode", "splat", "--fitted"],
                                   ["--mode", "splat", "--scene"]])
def test_gaussians_can_be_named_by_any_of_the_flags(flags):
    args = run.parse([*flags, "a.PLY"])
    assert args.mode == "splat" and str(args.input) == str(args.fitted) == "a.PLY"
    args = run.parse([*flags[:-1], "--splats", "a.splat", "--scene", "b"])
    assert args.mode == "splat" and (str(args.input), str(args.fitted)) == ("b", "a.splat")


def test_a_saved_nerf_is_edited_without_a_fit(ball, edit, tmp_path, monkeypatch):
    folder, _ = ball
    nerf = NeRF.fit(load_scene(folder), steps=20, progress=False, levels=4, table=2 ** 10, width=8)
    nerf.save(tmp_path / "a.safetensors")
    monkeypatch.setattr(NeRF, "fit", lambda *_, **__: pytest.fail("it was fitted"))
    assert edit("--fitted", tmp_path / "a.safetensors", "--scene", folder)[0] == 0
    assert (tmp_path / "out" / "result.safetensors").exists()
    code, printed = edit("--fitted", tmp_path / "a.safetensors", "--scene", folder, "--downscale", "2", out="other")
    assert code == 2
    one_error(printed, "a.safetensors: was fitted to another scene than")


def test_a_trained_model_is_measured(ball, tmp_path, capsys):
    folder, file = ball
    assert run.main(["--splats", str(file), "--scene", str(folder), "--fit-only", "--out", str(tmp_path / "out")]) == 0
    printed, own, done = capsys.readouterr().out.splitlines()
    assert done == f"done: {tmp_path / 'out' / 'fit.png'}"
    with Image.open(tmp_path / "out" / "fit.png") as page:  # photographs, renderings, depth of two test views
        assert page.width > 2 * 256 and page.height > 3 * 256
    assert printed.startswith("test PSNR ") and printed.endswith(" dB, 2 views") and float(printed.split()[2]) > 14
    assert own.startswith("training PSNR ") and own.endswith(" dB, 6 views") and float(own.split()[2]) > 14


@pytest.mark.parametrize("flags, message", [
    (["--mode", "nerf", "--splats", "a.ply"], "--splats: only with --mode splat"),
    (["--mode", "splat", "--fitted", "a.safetensors", "--scene", "."], "--mode nerf a .safetensors"),
    (["--fitted", "a.safetensors"], "a.safetensors: also give --scene DIR, the photographs that it was fitted to"),
    (["--mode", "nerf", "--scene", "a.splat"], "a.splat: --mode splat edits a .ply or .splat"),
    (["--mode", "nerf", "--mask", "a", "--ball", "0", "0", "-1", "2"], "--mask and --ball name two places of the edit"),
    (["--mode", "svg", "--splats", "a.ply"], "--splats: only with --mode splat"),
    (["--mode", "image", "--images", "b"], "--images: only with --mode nerf and splat"),
    (["--mode", "nerf", "--up", "z"], "--up: only with --mode splat")])
def test_conflicting_options_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as e:
        run.parse(flags)
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_a_missing_or_damaged_model_is_refused(ball, edit, tmp_path):
    folder, file = ball
    for flags in (["--splats", tmp_path / "none.ply"], ["--splats", tmp_path / "none.ply", "--scene", folder]):
        code, printed = edit(*flags)
        assert code == 2 and not (tmp_path / "out").exists()
        one_error(printed, "none.ply: ")
    (tmp_path / "cut.ply").write_bytes(file.read_bytes()[:-7])
    code, printed = edit("--splats", tmp_path / "cut.ply")
    assert code == 2
    one_error(printed, "cut.ply: is truncated")


# ---- the user's files ---------------------------------------------------------------------------------

def test_all_inputs_of_a_result_are_hashed(ball):
    folder, file = ball
    Image.fromarray(np.full((16, 16), 255, np.uint8)).save(folder / "mask.png")
    for split in ("train", "test"):
        whole = json.loads((folder / f"transforms_{split}.json").read_text())
        (folder / f"transforms_{split}.json").write_text(json.dumps(whole | {"mask_path": "mask.png"}))
    args = run.parse(["--splats", str(file), "--scene", str(folder)])
    assert {folder / "mask.png", folder / "transforms_test.json", file} <= set(files_of(args))
    assert files_of(run.parse(["--splats", str(file)])) == [file]


def test_every_scene_and_every_size_has_its_own_fit(tmp_path):
    """Another --downscale, and another scene of the same name, do not reuse the first scene's fit."""
    for i, radius in enumerate((0.8, 0.5)):
        nerf_scene(tmp_path / str(i) / "ball", views=4, size=8, radius=radius)
    flags = ["--mode", "splat", "--fit-only", "--fit-seconds", "0.05", "--device", "cpu", "--out",
             str(tmp_path / "out" / "x")]
    for scene, more in (("0", []), ("1", []), ("0", ["--downscale", "2"]), ("0", [])):
        assert run.main([*flags, "--scene", str(tmp_path / scene / "ball"), *more]) == 0
    names = sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_file())
    assert len(names) == 3 and all(re.fullmatch("ball-splat-[0-9a-f]{8}-fit.pt", name) for name in names)
    scene = load_scene(tmp_path / "0" / "ball")
    found = {kept_in(tmp_path / "out" / "ball-splat", scene, kind.sizes(device)).name
             for kind in (NeRF, Splats) for device in ("cpu", "cuda")}
    assert len(found) == 4 and len(found & set(names)) == 1


def test_every_prompt_has_its_own_folder(pipelines, tmp_path, monkeypatch):
    made = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "run_one", lambda prior, name, args, out, view: made.append(str(out)) or ([], []))
    Image.new("RGB", (16, 16), "red").save(tmp_path / "pear.png")
    for target in ("a green pear", "a blue pear!"):
        run.main(["--image", "pear.png", "--source", "a pear", "--target", target, "--model", str(pipelines["sd"])])
    assert made == ["out/pear-a-green-pear-pds", "out/pear-a-blue-pear-pds"]


@pytest.mark.parametrize("prompt, name", [
    ("green apple", "green-apple"), ("  A 'Green'/apple!! ", "a-green-apple"), ("Grüner Apfel", "gruner-apfel"),
    ("", ""), ("../..", ""), ("x" * 40, "x" * 40)])
def test_a_prompt_becomes_a_file_name(prompt, name):
    assert slug(prompt) == name


def test_prompts_without_ascii_letters_get_different_names():
    found = [slug(p) for p in ("зелёное яблоко", "красное яблоко", "a " * 30 + "b", "a " * 30 + "c", "apple 苹果")]
    assert len(set(found)) == 5 and all(0 < len(name) <= 47 and name.isascii() for name in found)
    assert found[4].startswith("apple-") and all("/" not in name and not name.startswith("-") for name in found)
