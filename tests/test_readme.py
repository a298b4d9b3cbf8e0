"""README.md and --help: the core on one screen and all examples run as printed, and all named files exist."""
import re
import shlex
import shutil

import pytest
import torch
from conftest import ROOT, nerf_scene
from PIL import Image

import run
import toy

README = (ROOT / "README.md").read_text()


def test_the_core_on_one_screen_edits_the_shipped_apple(tmp_path, monkeypatch):
    """The first Python block, with fewer steps: the apple loses red and gains green."""
    code = re.search(r"```python\n(import torch.*?)```", README, re.S)[1]
    assert len(code.splitlines()) <= 20
    for name in ("models", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space = {}
    exec(code.replace("range(120)", "range(20)"), space)
    red, green, _ = space["svg"].colours[space["svg"].colours[:, 0].argmax()].tolist()
    before = run.SVG.load("examples/red-apple.svg").colours
    assert green > before[before[:, 0].argmax()][1] + 0.05 or red < before[:, 0].max() - 0.1
    assert (tmp_path / "green-apple.svg").read_text().startswith(("<svg", "<?xml"))


@pytest.mark.parametrize("text", [run.__doc__, README], ids=["help", "README"])
def test_every_printed_command_of_run_py_parses(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = text.replace("\\\n", " ")
    commands = re.findall(r"^ *(?:pip install .*&& )?python run\.py (.*)$", text, re.M)
    assert len(commands) >= 6
    for command in commands:
        words = shlex.split(command.replace("--device cuda", "--device cpu"), comments=True)
        assert run.parse(words).mode


def test_every_example_of_the_help_runs(pipelines, small_runs, tmp_path, monkeypatch):
    """As printed, in a folder with the files that they name, but with a tiny model, two steps and a short fit."""
    from scene.reading import load_scene
    from splat import Splats
    monkeypatch.setattr(toy, "STEPS", 20)
    monkeypatch.setitem(run.EXAMPLE, "nerf", (tmp_path / "DIR", *run.EXAMPLE["nerf"][1:]))  # smaller than the apple
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "examples/smiling-face.svg", "cat.svg")
    Image.new("RGB", (20, 20), "tomato").save("apple.png")
    Splats.fit(load_scene(nerf_scene(tmp_path / "DIR", views=6, size=16)), 0.05).save(tmp_path / "trained.ply")
    commands = re.findall(r"python run\.py (.*)", run.__doc__)
    assert len(commands) >= 9
    for number, command in enumerate(commands):
        words = [*shlex.split(command, comments=True), "--out", str(number)]
        around, mode = {"--fit-seconds": "0.05"}, run.parse(words).mode
        few = {"--model": pipelines["sd"], "--instruct": pipelines["instruct"], "--steps": 2, "--device": "cpu"}
        few |= (around if mode in ("nerf", "splat") else {}) | ({"--refine": 1} if "--refine" in words else {})
        more = [str(part) for pair in few.items() for part in pair] if mode != "toy" else []
        assert run.main([*words, *more]) == 0, command
        sheet = tmp_path / str(number) / ("toy.png" if mode == "toy" else "sheet.png")
        assert sheet.exists() != ("--fit-only" in words), command


def test_the_files_that_the_readme_names_exist():
    for name in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"`((?:\w+/)?\w+\.py)`", README):
        assert (ROOT / name).exists() or name == "train_dreambooth.py", name  # a script of diffusers
