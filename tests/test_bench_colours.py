"""bench/colours.py: the colour probe and the pull test, on a prior whose predictions are known."""
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.colours import held_out, hits, load_trainer, natural, painted, shares
from bench.judge import COLOURS

PAINTS = {colour: torch.tensor([i % 3, i // 3 % 3, i % 4]) / 4 for i, colour in enumerate(COLOURS)}


class Painter:
    """A prior that predicts a flat picture, `share` of the way from the colour `start` to the prompt's first word."""
    size, guidance, abar = 16, 1.0, torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)

    def __init__(self, start="red", share=1.0, blind=()):
        self.start, self.share, self.blind = start, share, blind

    def at(self, scale):
        twin = copy.copy(self)
        twin.guidance = scale
        return twin

    def encode(self, picture):
        return torch.nn.functional.interpolate(picture, (4, 4), mode="area")

    def decode(self, x0):
        return torch.nn.functional.interpolate(x0, (self.size, self.size))

    def embed(self, caption):
        colour = caption.split()[0]
        return (PAINTS["red" if colour in self.blind else colour].view(1, 1, 3),)

    def eps(self, x_t, t, y):
        abar = self.abar[t].float().view(-1, 1, 1, 1)
        start = PAINTS[self.start].view(1, 3, 1, 1)
        meant = start + self.share * (y[0].view(-1, 3, 1, 1) - start)
        return (x_t - abar.sqrt() * meant) / (1 - abar).sqrt()


def flat(colour):
    return PAINTS[colour].view(1, 3, 1, 1).expand(1, 3, 16, 16).clone()


def recolour(rgba, name, rng, found):
    return torch.cat([(PAINTS[name] * 255).round().byte().view(3, 1, 1).expand(3, *rgba.shape[1:]), rgba[3:]])


# The part of train.py that bench/colours.py uses: the dominant paint covers the whole drawing, whose colour is green.
TRAINER = SimpleNamespace(
    recolour=recolour, colour_of=lambda found: "green" if found[3] > 0.5 else None,
    dominant=lambda rgba: (None, np.ones(rgba.shape[1:]), None, rgba[0].float().mean().item() / 255),
    augment=lambda rgba, rng, white, strength: torch.nn.functional.interpolate(rgba[:, :3].float() / 255, (16, 16)),
    vocabulary=lambda: {"car": ["car", "COLOUR car", "COLOUR auto"], "owl": ["owl"], "van": ["van", "COLOUR van"]})


def test_the_pull_test_measures_the_share_by_which_the_prior_moves_a_colour():
    rgba = torch.full((4, 16, 16), 255, dtype=torch.uint8)
    for share in (0.0, 0.3, 1.0):
        found = shares(Painter("blue", share), TRAINER, rgba, "blue", "pink car", "pink", noises=2)
        assert found == pytest.approx([share, share], abs=0.02)
    assert shares(Painter("blue", 0.5), TRAINER, rgba, "blue", "blue car", "pink", 2) == pytest.approx([0, 0], abs=0.02)


def test_the_probe_finds_exactly_the_colours_that_the_prior_distinguishes():
    items = [(flat(colour), "car", colour) for colour in COLOURS]
    assert hits(Painter(), items, noises=3, low=1).all()
    blind = hits(Painter(blind=("green", "black")), items, noises=3, low=1)
    wrong = [COLOURS.index("green"), COLOURS.index("black")]
    assert not blind[wrong].any() and blind.sum() == 2 * (len(COLOURS) - 2)
    two = [(flat(colour), "car", colour) for colour in ("red", "green")]  # the blind prior takes both for red
    assert hits(Painter(blind=("green",)), two, 3, 1, ("red", "green")).tolist() == [[True] * 2, [False] * 2]


def test_every_noun_is_painted_once_in_every_colour():
    rgba = torch.stack([torch.full((4, 16, 16), value, dtype=torch.uint8) for value in (255, 255, 50, 255)])
    found = painted(TRAINER, ["car", "owl", "van", "car"], rgba, 5)  # too little of the van is painted
    assert [(noun, colour) for _, noun, colour in found] == [("car", colour) for colour in COLOURS]
    assert [c for *_, c in painted(TRAINER, ["car"], rgba, 5, colours=["blue"])] == ["blue"]
    assert natural(TRAINER, ["car"], rgba, 5, colours=["blue"]) == []
    torch.testing.assert_close(found[3][0], flat(found[3][2]), atol=0.003, rtol=0)
    kept = natural(TRAINER, ["car", "owl", "van", "car"], rgba, 1)
    assert [(noun, colour) for _, noun, colour in kept] == [("car", "green")]
    assert len(natural(TRAINER, ["car", "owl", "van", "car"], rgba, 5)) == 2


def test_a_missing_training_script_is_reported_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"train.py: no such file"):
        load_trainer(tmp_path / "train.py")


def test_the_folder_of_the_rendered_drawings_is_made(tmp_path):
    work = tmp_path / "new" / "colours"
    trainer = SimpleNamespace(HELD_OUT=("a", "b"), render_icons=lambda icons, style, folder: (style, folder.is_dir()))
    assert held_out(trainer, SimpleNamespace(icons="", work=work)) == {"a": ("a", True), "b": ("b", True)}
