"""image/masks.py: the user's masks, DiffEdit's masks, agreement of views, a mask that moves with a drawing."""
import copy

import numpy as np
import pytest
import torch
from conftest import rand
from PIL import Image
from torch.testing import assert_close

from image.masks import Where, agree, local_masks, photograph_maps, read_mask, read_masks
from scene.representation import Representation


class Disagrees:
    """A prior whose two prompts differ in the left half of the latent; the latent is the picture itself."""
    abar, guidance = torch.linspace(0.999, 0.01, 100, dtype=torch.float64), 7.0

    def at(self, scale, source=None):
        twin = copy.copy(self)
        twin.guidance = scale
        return twin

    def encode(self, picture):
        return picture

    def embed(self, prompt):
        return torch.full((1, 1, 1, 1), {"a": 0.0, "b": 1.0}[prompt])

    def eps(self, x_t, t, y):
        assert self.guidance == 1 and len(x_t) == len(y) == 8
        out = x_t.clone()
        out[..., :x_t.shape[-1] // 2] += y
        return out


def test_the_mask_of_the_prompts_is_soft_and_dilated_by_a_pixel():
    prior = Disagrees()
    mask, = local_masks(prior, [rand(1, 3, 8, 16, dtype=torch.float32)], "a", "b")
    assert mask.shape == (1, 1, 8, 16) and prior.guidance == 7
    assert_close(mask[0, 0, 4], torch.tensor([1.0] * 8 + [2 / 3, 1 / 3] + [0.0] * 6))


class Explains(Disagrees):
    """A prior whose source prompt is right in the left half, and wrong by 1 in the right one, where the target is right
    and elsewhere wrong by 2; the latent of a black picture is 0."""

    def eps(self, x_t, t, y):
        noise = x_t / (1 - self.abar[t]).sqrt().to(x_t).view(-1, 1, 1, 1)
        left = torch.arange(x_t.shape[-1]) < x_t.shape[-1] // 2
        return noise + torch.where(left, 2 * y, y - 1)


def test_the_map_of_a_photograph_is_how_much_better_the_source_explains_it():
    found, = photograph_maps(Explains(), [torch.zeros(1, 3, 4, 8)], "a", "b")
    assert_close(found, torch.tensor([4.0] * 4 + [-1.0] * 4).expand(1, 1, 4, 8), rtol=0, atol=1e-4)


def test_the_masks_of_the_user_are_matched_by_name(tmp_path):
    picture = np.zeros((8, 8), np.uint8)
    picture[:, :4] = 255
    Image.fromarray(picture).save(tmp_path / "view_1.png")
    Image.fromarray(picture.T).save(tmp_path / "view_2.png")
    mask = read_mask(tmp_path / "view_1.png", (4, 4))
    assert_close(mask, torch.tensor([1.0, 1, 0, 0]).expand(1, 1, 4, 4))
    names = ["images/view_2.jpg", "images/view_3.jpg", "images/view_1.jpg"]
    masks = read_masks(tmp_path, names, [(4, 4)] * 3)  # some photographs have none
    assert set(masks) == {0, 2}
    assert_close(masks[0], mask.mT)
    assert_close(masks[2], mask)
    assert set(read_masks(tmp_path / "view_1.png", names, [(4, 4)] * 3)) == {2}
    with pytest.raises(ValueError, match="no mask in it is named like a photograph, e.g. view_4.png for images/view_4"):
        read_masks(tmp_path, ["images/view_4.jpg"], [(4, 4)])
    with pytest.raises(ValueError, match="several photographs, in different folders, are named view_1"):
        read_masks(tmp_path, ["a/view_1.png", "b/view_1.png"], [(4, 4)] * 2)
    (tmp_path / "broken.png").write_text("no picture")
    for name in ("broken.png", "none.png"):
        with pytest.raises(ValueError, match=f"{name}: no readable mask"):
            read_mask(tmp_path / name, (4, 4))


def test_a_mask_moves_with_the_drawing_and_is_downsampled_by_averaging():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:32, 16:32] = 1
    where, like = Where([mask], (64, 64)), torch.zeros(1, 4, 16, 16)
    still = where(None, like)
    assert_close(still[0, 0, 4:8, 4:8], torch.ones(4, 4))
    assert still.sum() == 16 and still.shape == (1, 1, 16, 16)
    moved = where((8.0, -4.0), like)  # to the right by two latent pixels, up by one
    assert_close(moved[0, 0, 3:7, 6:10], torch.ones(4, 4))
    assert moved.sum() == pytest.approx(16)
    assert_close(Where([mask, 1 - mask])(1, like), 1 - still)


class Ball(Representation):
    """A ball of radius 0.8 around the origin, which every camera looks at."""

    def depth(self, camera):
        rays_o, rays_d = camera.rays()
        along = (rays_o * rays_d).sum(0)
        root = along ** 2 - rays_o.square().sum(0) + 0.8 ** 2
        return torch.where(root > 0, -along - root.clamp_min(0).sqrt(), 0).view(1, 1, camera.height, camera.width)


def test_the_mask_of_one_bad_view_does_not_spread(nerf_sphere):
    ball, count = Ball(nerf_sphere), len(nerf_sphere.train)
    masks = [torch.zeros(1, 1, 4, 4) for _ in range(count)]
    masks[0] += 1
    agreed = agree(ball, masks, 16, cells=8)
    assert len(agreed) == count and agreed[0].shape == (1, 1, 16, 16)
    assert 0 < agreed[0].mean() < 0.4 and max(mask.mean() for mask in agreed[1:]) < 0.2
    everywhere = agree(ball, [torch.ones(1, 1, 4, 4)] * count, 16)
    assert all((mask[ball.depth(ball.camera(i, 16)) > 0] > 1 - 1e-6).all() for i, mask in enumerate(everywhere))


def test_empty_pixels_keep_their_mask_only_next_to_the_object(nerf_sphere):
    ball = Ball(nerf_sphere)
    agreed = agree(ball, [torch.ones(1, 1, 4, 4)] * len(nerf_sphere.train), 16)
    hit = ball.depth(ball.camera(0, 16)) > 0
    beside = torch.nn.functional.max_pool2d(hit.float(), 3, 1, 1) > 0
    assert_close(agreed[0], beside.float())
