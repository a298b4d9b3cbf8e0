"""README.md: the core on one screen runs as it is printed, the examples of --help parse, the files it names exist."""
import re
import shlex

import pytest
import torch
from conftest import ROOT

import run

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
    exec(code.replace("range(120)", "range(40)"), space)
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


def test_the_files_that_the_readme_names_are_there():
    for name in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"`((?:\w+/)?\w+\.py)`", README):
        assert (ROOT / name).exists() or name == "train_dreambooth.py", name  # a script of diffusers
