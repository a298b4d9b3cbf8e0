"""scene/gaussians.py: files of 3D Gaussians, of our own and of other programs."""
import copy
import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import nerf_scene, splat_camera, splat_random
from test_scene_colmap import quaternion
from torch.testing import assert_close

from scene.cameras import around, turntable
from scene.captures import SceneError
from scene.gaussians import FILES, SPLAT
from scene.ply import read_points
from scene.reading import load_scene
from scene.representation import spherical_harmonics
from splat import ATTRIBUTES, Splats, project, rotations

# ---- files --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_a_saved_ply_loads_identically(nerf_sphere, tmp_path, degree):
    splats = splat_random(nerf_sphere, 30, degree)
    splats.save(tmp_path / "a.ply")
    again = Splats.load(tmp_path / "a.ply", nerf_sphere)
    for (name, a), b in zip(splats.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(splats.render(0, 32), again.render(0, 32))
    assert [p.name for p in tmp_path.iterdir()] == ["a.ply"]


def splat_ply(splats, drop=(), types=None, order=None, form="binary_little_endian", element="vertex"):
    """A .ply written attribute by attribute, in any order and of any types, or without some."""
    columns = {f"f_rest_{c * 3 + k}": splats.sh_rest[:, k, c] for c in range(3) for k in range(3)}
    columns |= {f"f_dc_{c}": splats.sh_dc[:, c] for c in range(3)} | {"opacity": splats.opacities}
    columns |= {f"scale_{i}": splats.log_scales[:, i] for i in range(3)}
    columns |= {f"rot_{i}": splats.quaternions[:, i] for i in range(4)}
    columns |= {name: splats.means[:, i] for i, name in enumerate("xyz")} | {"extra": torch.zeros(len(splats.means))}
    names = [n for n in columns if n not in drop]
    names = [names[i] for i in np.random.RandomState(order).permutation(len(names))] if order is not None else names
    kinds = {n: (types or {}).get(n, "float") for n in names}
    codes = {"float": "<f4", "double": "<f8", "uchar": "u1"}
    table = np.empty(len(splats.means), [(n, codes[kinds[n]]) for n in names])
    for n in names:
        table[n] = columns[n].detach()
    lines = ["ply", f"format {form} 1.0", "comment made by a test", f"element {element} {len(table)}",
             *(f"property {kinds[n]} {n}" for n in names), "comment", "end_header", ""]
    return "\n".join(lines).encode() + table.tobytes()


def splat_text(splats, change=None, line="\n"):
    """An ASCII .ply; change: {attribute: value for all Gaussians}."""
    table = np.frombuffer(splat_ply(splats).split(b"end_header\n")[1], "<f4").astype(float)
    table = table.reshape(len(splats.means), -1)
    head = splat_ply(splats, form="ascii").split(b"end_header\n")[0].decode().splitlines()
    names = [words.split()[2] for words in head if words.startswith("property")]
    for name, value in (change or {}).items():
        table[:, names.index(name)] = value
    return line.join([*head, "end_header", *(" ".join(f"{x:.9g}" for x in row) for row in table), ""]).encode()


def splat_bytes(splats, name, value):
    """A .splat in which the first number `name` of the first Gaussian has another value."""
    values = [getattr(splats, key).detach() for key in ATTRIBUTES]
    table = np.frombuffer(bytearray(FILES[".splat"][1](*values, (0, 0, 0), ())), SPLAT)
    table[name][0, 0] = value
    return table.tobytes()


def equal(splats, other):
    """Whether two Splats have the same tensors."""
    pairs = zip(splats.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("contents", [
    splat_text, lambda s: splat_text(s, line="\r\n"),
    lambda s: b"end_header\r\n".join((splat_ply(s).split(b"end_header\n")[0].replace(b"\n", b"\r\n"),
                                      splat_ply(s).split(b"end_header\n")[1])),
    lambda s: splat_ply(s, form="binary_big_endian").split(b"end_header\n")[0] + b"end_header\n" + np.frombuffer(
        splat_ply(s).split(b"end_header\n")[1], "<f4").astype(">f4").tobytes()])
def test_a_ply_of_any_format_and_line_end_is_read(nerf_sphere, tmp_path, contents):
    splats = splat_random(nerf_sphere, 30, 1)
    (tmp_path / "a.ply").write_bytes(contents(splats))
    again = Splats.load(tmp_path / "a.ply", nerf_sphere)
    assert equal(splats, again)


def test_ply_attributes_are_found_by_name(nerf_sphere, tmp_path):
    splats = splat_random(nerf_sphere, 30, 1)
    (tmp_path / "a.ply").write_bytes(splat_ply(splats, order=3, types={"x": "double", "extra": "uchar"}))
    again = Splats.load(tmp_path / "a.ply", nerf_sphere)
    assert equal(splats, again)


@pytest.mark.parametrize("name, contents, message", [
    ("a.ply", lambda s: b"solid stl", "a.ply: not a .ply: it has no header"),
    ("a.ply", lambda s: splat_ply(s, form="binary_middle_endian"), "a.ply: a .ply of unknown format"),
    ("a.ply", lambda s: splat_ply(s, form="ascii"), "a.ply: "),
    ("a.ply", lambda s: splat_text(s, change={"x": 3e38}), "a.ply: 30 of its 30 Gaussians are too large: means"),
    ("a.ply", lambda s: splat_text(s, change={"x": 1e300}), "a.ply: 30 of its 30 Gaussians are not finite"),
    ("a.ply", lambda s: splat_text(s, change={"scale_1": 88}), "30 of its 30 Gaussians are too large: log_scales"),
    ("a.ply", lambda s: splat_text(s, change={"scale_1": 17}), "large: log_scales of up to 17, 16.1 can be drawn"),
    ("a.ply", lambda s: splat_text(s, change={"z": -2e7}), "are too large: means of up to 2e+07, 1e+07 can be drawn"),
    ("a.splat", lambda s: splat_bytes(s, "scale", 1.8e10), "a.splat: 1 of its 30 Gaussians are too large: log_scales"),
    ("a.splat", lambda s: splat_bytes(s, "mean", 1e8), "a.splat: 1 of its 30 Gaussians are too large: means of up to"),
    ("a.ply", lambda s: splat_text(s)[:-400], "a.ply: is truncated"),
    ("a.ply", lambda s: splat_text(s).replace(b"element vertex 30", b"element vertex 0"), "a.ply: holds no Gaussian"),
    ("a.ply", lambda s: splat_ply(s).replace(b"vertex 30", b"vertex " + b"9" * 30), "a.ply: is truncated"),
    ("a.ply", lambda s: splat_ply(s, element="chunk"), "a.ply: is a compressed .ply (SuperSplat): export"),
    ("a.ply", lambda s: splat_ply(s, element="face"), "does not begin with the vertices"),
    ("a.ply", lambda s: splat_ply(s, drop=("scale_1", "opacity")), "it has no scale_1, opacity"),
    ("a.ply", lambda s: splat_ply(s, drop=("f_rest_8",)), "8 f_rest do not make harmonics of degree 0 to 3"),
    ("a.ply", lambda s: splat_ply(s)[:-1], "a.ply: is truncated: 2879 of 2880 bytes"),
    ("a.ply", lambda s: splat_ply(s).replace(b"property float x\n", b"property list uchar int x\n"),
     "a.ply: an unreadable header"),
    ("a.ply", lambda s: splat_text(s, change={"opacity": math.nan}), "a.ply: 30 of its 30 Gaussians are not finite"),
    ("a.ply", lambda s: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
     "a.ply: is a Git LFS pointer, not the file itself: run git lfs pull"),
    ("a.splat", lambda s: b"version https://git-lfs.github.com/spec/v1\n", "a.splat: is a Git LFS pointer"),
    ("a.splat", lambda s: b"\0" * 33, "a.splat: is truncated: 33 bytes are not a multiple of 32"),
    ("a.obj", lambda s: b"", "a.obj: the name of a file of Gaussians must end in .ply or .splat"),
    ("a.ksplat", lambda s: b"", "a.ksplat: GaussianSplats3D's format .ksplat is not supported: convert it to a"),
    ("a.SPZ", lambda s: b"", "a.SPZ: Niantic's format .spz is not supported: convert it to a plain .ply, for example"),
    ("a.sog", lambda s: b"", "a.sog: PlayCanvas's format .sog is not supported"),
])
def test_unusable_files_of_gaussians_are_refused(nerf_sphere, tmp_path, name, contents, message):
    (tmp_path / name).write_bytes(contents(splat_random(nerf_sphere, 30, 1)))
    with pytest.raises(SceneError) as error:
        Splats.load(tmp_path / name, nerf_sphere)
    assert message in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_failed_save_overwrites_nothing(nerf_sphere, tmp_path, monkeypatch):
    splats = splat_random(nerf_sphere, 5)
    splats.save(tmp_path / "a.ply")
    contents = (tmp_path / "a.ply").read_bytes()
    for name in ("a.ply", "a.obj"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "numpy", lambda *_: 1 / 0)
            with pytest.raises((SceneError, ZeroDivisionError)):
                splats.save(tmp_path / name)
    assert (tmp_path / "a.ply").read_bytes() == contents and [p.name for p in tmp_path.iterdir()] == ["a.ply"]
    with pytest.raises(SceneError, match="b.ply: cannot be read: No such file"):
        Splats.load(tmp_path / "b.ply", nerf_sphere)


def test_a_splat_file_is_exact_up_to_quantisation(nerf_sphere, tmp_path):
    splats = splat_random(nerf_sphere, 40, 0)
    with torch.no_grad():
        splats.sh_dc.clamp_(-1.5, 1.5)
    splats.save(tmp_path / "a.splat")
    assert (tmp_path / "a.splat").stat().st_size == 32 * 40
    again = Splats.load(tmp_path / "a.splat", nerf_sphere)
    weight = again.log_scales.sum(1).exp() * again.opacities.sigmoid()
    assert (weight.diff() <= 1e-3 * weight[:-1] + 1e-4).all()  # in descending order of importance
    order = [(again.means - m).norm(dim=1).argmin().item() for m in splats.means]
    again = Splats(nerf_sphere, *(getattr(again, n)[order] for n in ATTRIBUTES))
    assert torch.equal(again.means, splats.means)
    assert_close(again.log_scales, splats.log_scales, atol=1e-5, rtol=0)
    assert (again.opacities.sigmoid() - splats.opacities.sigmoid()).abs().max() < 0.5 / 255 + 1e-6
    assert (again.colours(splat_camera()) - splats.colours(splat_camera()).clamp(0, 1)).abs().max() < 0.5 / 255 + 1e-5
    turned = (rotations(again.quaternions) - rotations(splats.quaternions)).abs().max()
    assert turned < 0.03


# ---- files of other programs -----------------------------------------------------------------------

def loaded(path, table, comments=(), scene=None, **options):
    """Load a .ply with the columns {property: numbers [N]}, without the warning about the upward axis."""
    head = ["ply", "format binary_little_endian 1.0", *(f"comment {text}" for text in comments),
            f"element vertex {len(table['x'])}", *(f"property float {name}" for name in table), "end_header", ""]
    path.write_bytes("\n".join(head).encode() + np.stack(list(table.values()), 1).astype("<f4").tobytes())
    return Splats.load(path, scene, up=None if scene else "z", **options)


def columns(count=40, scale=-2.5):
    rng = np.random.default_rng(0)
    table = {name: rng.normal(0, 0.4, count) for name in "xyz"}
    table |= {f"f_dc_{i}": rng.normal(0, 1, count) for i in range(3)} | {"opacity": rng.normal(1, 1, count)}
    table |= {f"scale_{i}": rng.normal(scale, 0.3, count) for i in range(3)}
    return table | {f"rot_{i}": rng.normal(0, 1, count) for i in range(4)}


def test_small_runs_are_as_bright_as_large_ones(tmp_path):
    """A small picture equals the reduced large one, as the opacity compensates for the low-pass filter; fits made here
    are drawn without that. Most of these Gaussians would be dropped if each had to be visible by itself."""
    table = columns(3000, scale=-5.5) | {"opacity": np.full(3000, 0.5)}
    with torch.no_grad():
        splats = loaded(tmp_path / "a.ply", table, size=32)
        own = Splats(splats.scene, *splats.parameters())
        camera = splats.camera(0)
        small, large = splats.render(camera), torch.nn.functional.avg_pool2d(splats.render(camera, 512), 16)
        assert (small - large).square().mean() < 1e-3 and abs((small - large).mean()) < 2e-3
        assert (small - own.render(camera)).mean() > 0.05
        own.save(tmp_path / "own.ply")
        again = Splats.load(tmp_path / "own.ply", up="z", size=32)
        assert again.comments == own.comments and torch.equal(again.render(camera), own.render(camera))


def test_the_compensated_opacity_has_the_right_gradient(tmp_path):
    splats = loaded(tmp_path / "a.ply", columns(4, scale=-3.5), size=16).double()
    camera, g = splats.camera(0), torch.Generator().manual_seed(0)
    weighting = torch.randn(3, 16, 16, dtype=torch.float64, generator=g)

    def loss(log_scales):
        splats.log_scales.data.copy_(log_scales)
        return (splats.rgb(camera) * weighting).sum()
    start = splats.log_scales.detach().clone()
    loss(start).backward()
    for i in range(4):
        for axis in range(3):
            step = torch.zeros_like(start)
            step[i, axis] = 1e-6
            with torch.no_grad():
                slope = (loss(start + step) - loss(start - step)).item() / 2e-6
            assert splats.log_scales.grad[i, axis].item() == pytest.approx(slope, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("widths", [(1, 1, 1), (1, 1, -3), (1, -3, -3), (1, 0.5, -3)])
def test_a_gaussian_wider_than_the_picture_keeps_its_opacity(tmp_path, widths):
    """The ratio of determinants in float32 against float64, from a pixel up to the widest that is read."""
    for log in (-3, 0, 6, 12, 16):
        table = columns(20) | {f"scale_{i}": np.full(20, log * w if w > 0 else w) for i, w in enumerate(widths)}
        splats = loaded(tmp_path / "a.ply", table, size=16)
        camera = splats.camera(0)
        plain, exact = (project(s.means, s.log_scales, s.quaternions, camera, s.near)[3]
                        for s in (splats, copy.deepcopy(splats).double()))
        assert_close(plain.double(), exact, atol=1e-4, rtol=1e-4)
        picture = splats.render(camera)
        picture.sum().backward()
        assert all(torch.isfinite(x).all() for x in (picture, splats.means.grad, splats.log_scales.grad))


def test_comments_are_kept(tmp_path):
    lines = ("SplatRenderMode: mip", "antialiased 1", "Vertical axis: 0 0 -1", "Generated by someone")
    splats = loaded(tmp_path / "a.ply", columns(), lines, size=16)
    assert splats.comments == lines
    splats.save(tmp_path / "b.ply")
    assert b"\ncomment SplatRenderMode: mip\ncomment antialiased 1\ncomment Vert" in (tmp_path / "b.ply").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Splats.load(tmp_path / "b.ply", size=16)
    assert again.comments == lines and equal(splats, again)
    assert all(view.camera.pose[2, 1] < -0.7 for view in again.scene.train)  # up is -z


def test_a_smoothing_filter_is_fused(tmp_path):
    """As in Mip-Splatting, the filter's variance is added to each variance and the integral stays the same."""
    table, width = columns(), np.random.default_rng(1).uniform(0, 0.2, 40)
    width[0] = 0
    plain = loaded(tmp_path / "a.ply", table, size=16)
    fused = loaded(tmp_path / "b.ply", table | {"filter_3D": width}, size=16)
    scale = plain.log_scales.detach().double().exp()
    wider = (scale.square() + torch.from_numpy(width)[:, None].float().double().square()).sqrt()
    alpha = plain.opacities.detach().double().sigmoid() * (scale / wider).prod(1)
    assert_close(fused.log_scales.detach().double().exp(), wider, rtol=1e-5, atol=0)
    assert_close(fused.opacities.detach().double().sigmoid(), alpha, rtol=1e-5, atol=1e-7)
    assert torch.equal(fused.opacities[0], plain.opacities[0]) and torch.equal(fused.means, plain.means)


def test_infinite_opacities_and_scales_are_valid_and_nans_are_dropped(tmp_path):
    table = columns()
    opacity, scale, x = table["opacity"].copy(), table["scale_1"].copy(), table["x"].copy()
    opacity[:2] = math.inf, -math.inf
    scale[2], scale[5] = -math.inf, math.inf
    x[3], x[4] = math.nan, math.inf
    with pytest.warns(UserWarning, match="a.ply: 3 of its 40 Gaussians are not finite: they are left out"):
        splats = loaded(tmp_path / "a.ply", table | {"opacity": opacity, "scale_1": scale, "x": x}, size=16)
    plain = loaded(tmp_path / "b.ply", table, size=16)
    kept = [0, 1, 2, *range(6, 40)]
    assert torch.equal(splats.means, plain.means[kept])
    assert_close(splats.opacities[:2].sigmoid(), torch.tensor([1.0, 0]), atol=1e-6, rtol=0)
    picture = splats.render(0)
    picture.square().sum().backward()
    assert splats.log_scales[2].exp()[1] < 1e-9 and all(
        torch.isfinite(p.grad).all() for p in splats.parameters() if p.numel())
    flat = dict(columns())
    del flat["scale_2"]  # as in 2DGS
    flat = loaded(tmp_path / "c.ply", flat, size=16)
    assert (flat.log_scales[:, 2].exp() < 1e-9).all() and torch.equal(flat.log_scales[:, :2], plain.log_scales[:, :2])
    assert 0.3 < (flat.render(0) < 0.9).float().mean() / (plain.render(0) < 0.9).float().mean() <= 1


@pytest.mark.parametrize("beside", ["scene", "splats"])
def test_gaussians_in_nerfstudios_coordinates_are_moved_to_the_scene(splat_fitted, tmp_path, beside):
    """Undoing dataparser_transforms.json (rotation, scale, shift) keeps the picture, including the harmonics."""
    scene = splat_fitted.scene
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)))
    turn = turn * torch.linalg.det(turn)
    shift, scale = torch.tensor([0.3, -0.2, 0.9]), 0.37
    where = tmp_path / ("scene" if beside == "scene" else ".")
    where.mkdir(exist_ok=True)
    (where / "dataparser_transforms.json").write_text(json.dumps(
        {"transform": torch.cat((turn, shift[:, None]), 1).tolist(), "scale": scale}))
    scene = replace(scene, path=tmp_path / "scene" / "transforms.json")
    means = (splat_fitted.means @ turn.T + shift) * scale
    g = torch.Generator().manual_seed(0)
    rest = 0.3 * torch.randn(len(means), 15, 3, generator=g)
    plain = Splats(scene, splat_fitted.means, *list(splat_fitted.parameters())[1:5], rest)
    axes = torch.einsum("ij,jkn->nik", turn, rotations(plain.quaternions)).detach()
    rotation = torch.stack([torch.tensor(quaternion(a.double().numpy())) for a in axes]).float()
    d = torch.nn.functional.normalize(torch.randn(3, 40, generator=g), dim=0)
    # colours turn with the scene
    matrix = torch.linalg.lstsq(spherical_harmonics(turn @ d)[1:].T, spherical_harmonics(d)[1:].T).solution
    theirs = Splats(scene, means, plain.log_scales + math.log(scale), rotation, plain.opacities, plain.sh_dc,
                    torch.einsum("jk,nkc->njc", matrix, rest))
    theirs.save(tmp_path / "splat.ply")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Splats.load(tmp_path / "splat.ply", scene)
    assert_close(again.means, plain.means, atol=1e-4, rtol=0)
    assert_close(again.render(1), plain.render(1), atol=2e-3, rtol=0)
    for wrong in ({"scale": 0, "transform": [[1, 0, 0, 0]] * 3}, {"scale": 1.0, "transform": [[2, 0, 0, 0]] * 3}, []):
        (where / "dataparser_transforms.json").write_text(json.dumps(wrong))
        with pytest.raises(SceneError, match="dataparser_transforms.json: "):
            Splats.load(tmp_path / "splat.ply", scene)


# ---- models trained by other programs ------------------------------------------------------------------

def ball_of_gaussians(path, up="", centre=(3.0, -2.0, 5.0), floaters=30):
    """A ball of radius 0.8 around `centre`, red above (towards -y), blue below, with faint floaters far around it."""
    g = torch.Generator().manual_seed(0)
    normal = torch.nn.functional.normalize(torch.randn(400, 3, generator=g), dim=1)
    means = torch.cat((0.8 * normal, 40 * torch.randn(floaters, 3, generator=g))) + torch.tensor(centre)
    colour = torch.zeros(len(means), 3)
    colour[:400, 0], colour[:400, 2] = (normal[:, 1] < 0).float(), (normal[:, 1] >= 0).float()
    names = ("x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2",
             "rot_0", "rot_1", "rot_2", "rot_3")
    table = torch.cat((means, (colour - 0.5) / 0.28209479, torch.full((len(means), 1), 4.0),
                       torch.full((len(means), 3), -2.5), torch.tensor([[1.0, 0, 0, 0]]).expand(len(means), 4)), 1)
    table[400:, 6] = -3
    lines = ["ply", "format binary_little_endian 1.0", *([f"comment Vertical Axis: {up}"] if up else []),
             f"element vertex {len(means)}", *(f"property float {n}" for n in names), "end_header", ""]
    path.write_bytes("\n".join(lines).encode() + table.numpy().astype("<f4").tobytes())
    return path


def test_cameras_are_placed_around_a_model_without_photographs(tmp_path):
    with pytest.warns(UserWarning, match="a.ply: does not say which axis is up: assuming -y"):
        splats = Splats.load(ball_of_gaussians(tmp_path / "a.ply"), size=48)
    scene, centre = splats.scene, torch.tensor([3.0, -2, 5])
    assert len(scene.train) == 24 and not scene.test and not scene.bounded
    assert (scene.centre - centre).norm() < 0.2 and 0.8 < scene.half < 1.1  # without the floaters
    ups = torch.stack([v.camera.pose[:, 1] for v in scene.train])
    assert (ups[:, 1] < -0.7).all()
    position = torch.stack([v.camera.pose[:, 3] for v in scene.train])
    assert position[:, 1].max() < -1.7 and len(position.round(decimals=3).unique(dim=0)) == 24  # none looks from below
    ahead = torch.nn.functional.normalize(scene.centre - position, dim=1)
    assert_close(-torch.stack([v.camera.pose[:, 2] for v in scene.train]), ahead, atol=1e-5, rtol=0)
    picture = scene.train[0].pixels.float() / 255  # upright: red above, blue below, white around
    assert (picture[0, 0] > 0.9).all() and picture[16, 24, 0] > 0.7 > 0.3 > picture[16, 24, 2]
    assert picture[31, 24, 2] > 0.7 and 0.3 < (picture.amin(2) < 0.5).float().mean() < 0.8
    with torch.no_grad():
        rendered = splats.render(5)[0].permute(1, 2, 0)
    assert (scene.train[5].pixels.float() / 255 - rendered).abs().max() < 0.5 / 255 + 1e-6
    assert turntable(splats, 4, 20)[0].pose[1, 1] < -0.7


def test_up_is_given_by_the_file_or_the_user(tmp_path):
    prints = set()
    for comment, given, axis in (("z", None, 2), ("", "z", 2), ("z", "-x", 0), ("", "y", 1)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scene = Splats.load(ball_of_gaussians(tmp_path / "a.ply", comment), size=8, up=given).scene
        ups = torch.stack([v.camera.pose[:, 1] for v in scene.train])[:, axis]
        assert (ups * (-1 if given == "-x" else 1) > 0.7).all()
        prints.add(scene.fingerprint)
    assert len(prints) == 4


@pytest.mark.parametrize("count", [1, 2])
def test_cameras_can_be_placed_around_a_point(count):
    centre, radius, cameras = around(torch.arange(3.0 * count).view(count, 3), torch.zeros(count), (0, 0, 1), 16)
    assert radius > 0 and all(torch.isfinite(c.pose).all() for c in cameras) and torch.isfinite(centre).all()


def test_a_model_of_another_scene_warns(nerf_sphere, splat_fitted, tmp_path):
    splat_fitted.save(tmp_path / "fit.ply")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(Splats.load(tmp_path / "fit.ply", nerf_sphere).means, splat_fitted.means)
    moved = copy.deepcopy(splat_fitted)
    with torch.no_grad():
        moved.means += 1
    moved.save(tmp_path / "moved.ply")
    with pytest.warns(UserWarning, match="moved.ply: looks unlike the photographs of .*transforms_train.json, PSNR"):
        Splats.load(tmp_path / "moved.ply", nerf_sphere)


def test_gaussians_in_map_coordinates_are_saved_precisely(tmp_path):
    """Positions are relative to an origin in the file, as map coordinates in float32 are off by half a metre."""
    folder = nerf_scene(tmp_path, split=False, alpha=False)
    file = json.loads((folder / "transforms.json").read_text())
    for frame in file["frames"]:
        for row, by in zip(frame["transform_matrix"][:3], (512345.0, 5412345.0, 431.0), strict=True):
            row[3] += by
    (folder / "transforms.json").write_text(json.dumps(file))
    scene = load_scene(folder)
    splats = splat_random(scene, 30, 1)
    with pytest.warns(UserWarning, match="a.ply: its positions are relative to 51234.* 54123.* in the coordinates of"):
        splats.save(tmp_path / "a.ply")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random Gaussians look unlike the photographs
        again = Splats.load(tmp_path / "a.ply", scene)
        assert torch.equal(again.means, splats.means)
        other = Splats.load(tmp_path / "a.ply", replace(scene, origin=(scene.origin[0] - 2.0, *scene.origin[1:])))
        assert_close(other.means, splats.means + torch.tensor([2.0, 0, 0]), atol=1e-5, rtol=0)
        data = splat_ply(splats, types=dict.fromkeys("xyz", "double"))  # from a program that stores float64
        (tmp_path / "b.ply").write_bytes(data)
        near = Splats.load(tmp_path / "b.ply", replace(scene, origin=(5e6, 0.0, 0.0)))
        assert_close(near.means[:, 0].double(), splats.means[:, 0].double() - 5e6, atol=0.5, rtol=0)
    contents = (tmp_path / "a.ply").read_bytes()
    for wrong in (b"comment origin nan 0 0", b"comment origin 1 2", b"comment origin x y z"):
        (tmp_path / "a.ply").write_bytes(contents.replace(contents.split(b"\n")[2], wrong))
        with pytest.raises(SceneError, match="a.ply: the origin in its header is invalid"):
            Splats.load(tmp_path / "a.ply", scene)


@pytest.mark.parametrize("kind, values, wanted", [
    ("uchar", (0, 51, 255), (0, 0.2, 1)), ("ushort", (0, 13107, 65535), (0, 0.2, 1)),
    ("float", (0.0, 0.2, 1.0), (0, 0.2, 1)), (None, (), None)])
def test_clouds_may_have_colours_of_any_type(tmp_path, kind, values, wanted):
    lines = ["ply", "format ascii 1.0", "element vertex 1", *(f"property float {a}" for a in "xyz"),
             *(f"property {kind} {c}" for c in ("red", "green", "blue") if kind), "element face 0",
             "property list uchar int vertex_indices", "end_header"]
    (tmp_path / "a.ply").write_text("\n".join([*lines, " ".join(map(str, (1, 2.5, -3, *values))), ""]))
    points, colours = read_points(tmp_path / "a.ply")
    assert points.tolist() == [[1, 2.5, -3]] and (colours is None if wanted is None else
                                                  colours.ravel() == pytest.approx(wanted))


@pytest.mark.parametrize("change, message", [
    (("property float z", "property float w"), "a.ply: not a cloud of points: it has no x, y and z"),
    (("1 2 3", "1 nan 3"), "a.ply: a point that is not finite"), (("1 2 3", "1 2 1e9"), "or further than 1e[+]07"),
    (("1 2 3", "1 2"), "a.ply: is truncated"), (("1 2 3", "1 2 x"), "a.ply: could not convert")])
def test_unusable_clouds_are_refused(tmp_path, change, message):
    text = ("ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\n"
            "end_header\n1 2 3\n")
    (tmp_path / "a.ply").write_text(text.replace(*change))
    with pytest.raises(SceneError, match=message):
        read_points(tmp_path / "a.ply")
    with pytest.raises(SceneError, match="b.ply: cannot be read: No such file"):
        read_points(tmp_path / "b.ply")
