"""Devices: every mode on a pretend accelerator, which refuses to mix devices where CUDA does."""
import copy
import functools
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pretend
import pytest
import torch
from conftest import DRAWING, nerf_scene, outputs, svg_text
from PIL import Image
from torch.utils._pytree import tree_map

import run
import splat
import svg_raster
from bench.__main__ import main as bench
from files import sheets
from image import editors, masks
from image.masks import diffedit_map
from image.updates import DatasetUpdate
from nerf import NeRF
from pipelines.networks import Flux
from prior import Prior
from scene import region
from scene.cameras import Camera
from scene.reading import load_scene
from splat import Splats
from svg_raster import SVG

if pretend.why_not():
    pytest.skip(pretend.why_not(), allow_module_level=True)

SIZES = {NeRF: dict(levels=2, table=2 ** 9, width=8), Splats: dict(count=60, limit=120, degree=2)}
# Dashed strokes, round and mitred joins, gradients with few and with many stops, masks, clips, groups, even-odd.
RICH = svg_text(
    '<defs><linearGradient id="a"><stop offset="0" stop-color="red"/><stop offset="1" stop-opacity=".5"/>'
    '</linearGradient>'
    '<radialGradient id="b" fx=".3" spreadMethod="reflect" r=".3">'
    + "".join(f'<stop offset="{i / 20}" stop-color="#{i % 10}2{9 - i % 10}"/>' for i in range(20))
    + '</radialGradient><mask id="m"><rect width="32" height="32" fill="white"/><circle cx="9" cy="9" r="4"/></mask>'
    '<clipPath id="c"><path d="M2 2H30V28H2z"/></clipPath></defs>'
    '<g mask="url(#m)" opacity=".8"><rect x="3" y="3" width="20" height="20" fill="url(#a)"/></g>'
    '<circle id="face" cx="20" cy="20" r="9" fill="url(#b)" clip-path="url(#c)" stroke="#00f" stroke-width="1.5"/>'
    '<path d="M4 28q8-20 16 0 8-9 9-20" fill="none" stroke="#0a0" stroke-width="2" stroke-linejoin="round" '
    'stroke-linecap="round" stroke-dasharray="4 2 0 2"/><path d="M5 5H15V15H5zM8 8H12V12H8z" fill-rule="evenodd"/>')


@pytest.fixture(scope="module")
def place(pipelines, tmp_path_factory):
    """A folder with drawings, a picture, masks, scenes, and a model whose settings ask for few steps."""
    folder = tmp_path_factory.mktemp("devices")
    (folder / "face.svg").write_text(DRAWING)
    (folder / "rich.svg").write_text(RICH)
    Image.new("RGB", (20, 12), "tomato").save(folder / "red.png")
    nerf_scene(folder / "object", views=4, size=16)
    nerf_scene(folder / "capture", views=4, size=16, alpha=False, split=False, mask_path="mask.png")
    ramp = Image.linear_gradient("L").resize((16, 16))
    ramp.point(lambda value: 255 * (value > 60)).save(folder / "capture" / "mask.png")
    (folder / "masks").mkdir()
    for i in range(4):
        ramp.save(folder / "masks" / f"{i}.png")
    shutil.copytree(pipelines["sd"], folder / "model")
    (folder / "model" / "pds.json").write_text(json.dumps({"steps": 2, "inversion_steps": 4}))
    return folder


@pytest.fixture(scope="module")
def device(place, flows):
    """The name of the device; meanwhile pictures, sheets, fits and the steps of editors are small."""
    with pretend.device() as name, pytest.MonkeyPatch.context() as patch:
        for key in ("FRAMES", "SIDES", "VIEWS", "FRAME_SIZE", "SIDE_SIZE", "SHEET_SIZE"):
            patch.setattr(sheets, key, 16 if key.endswith("SIZE") else 1)
        patch.setattr(DatasetUpdate, "EVERY", 2)
        patch.setattr(DatasetUpdate, "STEPS", 4)
        patch.setattr(region, "FINER", 32)
        patch.setattr(Flux, "SIDE", 8)
        patch.setattr(run, "Prior", SimpleNamespace(from_pretrained=functools.cache(Prior.from_pretrained)))
        def one_noise(*args, **more):
            return diffedit_map(*args[:4], 1, *args[5:], **more)
        patch.setattr(masks, "diffedit_map", one_noise)
        patch.setattr(NeRF, "BATCH_GPU", (2 ** 11, 2 ** 9, 64, 2 ** 9))
        for kind, sizes in SIZES.items():
            patch.setattr(kind, "fit", functools.partial(kind.fit, **sizes))
        yield name


@pytest.fixture
def call(place, device):
    """run.main on the files of `place` and the device; later flags win."""
    def call(*flags, mode="svg", file="face.svg", out="out"):
        given = [f"--{'scene' if mode in ('nerf', 'splat') else mode}", str(place / file)] if file else []
        return run.main(["--mode", mode, *given, "--source", "a", "--target", "b", "--model", str(place / "model"),
                         "--every", "2", "--device", device, "--out", str(place / out),
                         *(["--fit-seconds", "0.001"] if mode in ("nerf", "splat") else []), *map(str, flags)])
    return call


def test_torch_is_restored_afterwards():
    def state():
        return torch.Generator, torch.load, torch.tensor, torch.rand, torch.autograd.is_multithreading_enabled()
    before = state()
    with pretend.device() as name:
        assert torch.Generator(name).device.type == name and not torch.autograd.is_multithreading_enabled()
    assert state() == before


# ---- every mode ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, file, flags", [
    ("svg", "rich.svg", ["--local", "--only", "face", "--colours-only"]), ("svg", "face.svg", ["--compare"]),
    ("svg", "face.svg", ["--smooth", "0", "--no-steady", "--opacities", "--ss", "2", "--mask", "red.png"]),
    ("image", "red.png", ["--local", "--batch", "2"]),
    ("image", "red.png", ["--pixels", "--mask", "red.png", "--loss", "sds"]),
    ("image", "red.png", ["--loss", "sdedit"]), ("image", "red.png", ["--loss", "inv2n"]),
    ("image", "red.png", ["--loss", "in2n", "--instruct", "instruct"]),
    ("image", "red.png", ["--model", "xl", "--steps", "2", "--refine", "1"]),
    ("image", "red.png", ["--model", "v", "--steps", "2", "--refine", "1", "--loss", "dds"]),
    ("image", "red.png", ["--model", "sd3", "--steps", "2", "--refine", "1", "--local"]),
    ("image", "red.png", ["--model", "flux", "--steps", "2", "--refine", "0"]),
    ("nerf", "object", ["--mask", "masks"]),
    ("nerf", "capture", ["--ball", "0", "0", "0", "0.8", "--path", "input"]),
    ("nerf", "capture", ["--refine", "2", "--export"]), ("nerf", "capture", ["--fit-only"]),
    ("splat", "object", ["--local", "--path", "input"]), ("splat", "capture", ["--mask", "masks"]),
    ("splat", "capture", ["--loss", "in2n", "--instruct", "instruct"]),
    ("splat", "object", ["--refine", "2", "--export"]), ("splat", "capture", ["--fit-only"])],
    ids=lambda x: "".join(x) if isinstance(x, list) else x)
def test_every_mode_runs(call, pipelines, flows, place, mode, file, flags):
    flags = [(pipelines | flows).get(flag, place / flag if (place / flag).exists() else flag) for flag in flags]
    assert call(*flags, mode=mode, file=file) == 0


def test_the_table_of_edits_runs(place, device):
    (place / "edits.txt").write_text("image | red.png | a | b\n")
    assert bench(["edits", "--list", str(place / "edits.txt"), "--compare", "pds", "sdedit", "--device", device,
                  "--out", str(place / "edits"), "--model", str(place / "model")]) == 0
    assert (place / "edits" / "table.csv").read_text().count("\n") == 3


@pytest.mark.parametrize("kind, last", [(NeRF, 96), (Splats, 99)])  # a step in which all periodic work of a fit is due
def test_a_fit_resumes_from_its_checkpoint(place, device, tmp_path, kind, last):
    photographs, path = load_scene(place / "object"), tmp_path / "fit.pt"
    fit = functools.partial(kind.fit, photographs, checkpoint=path, device=device, progress=False)
    first = fit(steps=1)
    torch.save(torch.load(path) | {"step": last}, path)
    before, after = fit(steps=last), fit(steps=last + 1)
    for name, value in fit(steps=last + 1).state_dict().items():
        assert value.device.type == device and torch.equal(value, after.state_dict()[name]), name
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in before.state_dict().items())
    assert not all(torch.equal(value, first.state_dict().get(name, value)) for name, value in after.named_parameters())


@pytest.mark.parametrize("mode, kind, file", [("nerf", NeRF, "object"), ("splat", Splats, "object"),
                                              ("splat", Splats, None)])
def test_a_trained_model_is_edited(call, place, tmp_path, mode, kind, file):
    path = tmp_path / f"trained{run.SUFFIX[mode]}"
    kind.fit(load_scene(place / "object"), steps=1, progress=False).save(path)
    assert call("--fitted", path, "--steps", "1", mode=mode, file=file) == 0


def test_scenes_are_refused_on_a_device_without_float64(place):
    for kind in (NeRF, Splats):
        with pytest.raises(ValueError, match="float64, which mps lacks"):
            kind.fit(load_scene(place / "object"), steps=1, device="mps")


class Killed(BaseException):
    """An exception that run.py does not handle."""


@pytest.mark.parametrize("mode, file, kind, flags", [
    ("svg", "face.svg", SVG, ["--steps", "3", "--every", "1"]),
    ("splat", "object", Splats, ["--steps", "3", "--refine", "2"])])
def test_a_killed_run_resumes_from_its_checkpoint(call, place, monkeypatch, mode, file, kind, flags):
    assert call(*flags, mode=mode, file=file, out="whole") == 0
    project, calls = kind.project_, []

    def killed(self):
        project(self)
        calls.append(1)
        if len(calls) == (5 if mode == "splat" else 3):
            raise Killed
    monkeypatch.setattr(kind, "project_", killed)
    with pytest.raises(Killed):
        call(*flags, mode=mode, file=file, out="killed")
    assert call(*flags, "--resume", mode=mode, file=file, out="killed") == 0
    assert outputs(place / "killed") == outputs(place / "whole")


@pytest.mark.parametrize("mode, file, flags", [
    ("svg", "rich.svg", ()), ("nerf", "object", ()), ("splat", "object", ["--colours", "1"])])
def test_an_edit_matches_the_cpu(call, place, mode, file, flags):
    pictures = {}
    for name in (pretend.NAME, "cpu"):
        assert call("--device", name, "--dtype", "float32", *flags, mode=mode, file=file, out=name) == 0
        pictures[name] = np.asarray(Image.open(place / name / "result.png")).astype(int)
    source = np.asarray(Image.open(place / "cpu" / "source.png")).astype(int)
    assert np.abs(pictures["cpu"] - pictures[pretend.NAME]).max() <= 1  # rounding, in steps of 1 / 255
    assert np.abs(pictures["cpu"] - source).max() > 10


# ---- the device itself --------------------------------------------------------------------------------

# x [2,2] is on the device, y [2,2] and the indices i [2] are on the CPU.
REFUSED = {
    "matmul": lambda x, y, i: x @ y,
    "addmm": lambda x, y, i: torch.addmm(x[0], x, y),
    "linear": lambda x, y, i: torch.nn.Linear(2, 2)(x),
    "convolution": lambda x, y, i: torch.conv2d(x[None, None], y[None, None]),
    "samples": lambda x, y, i: torch.nn.functional.grid_sample(x[None, None], y[None, None], align_corners=False),
    "cat": lambda x, y, i: torch.cat((x, y)),
    "stack of numbers": lambda x, y, i: torch.stack((x[0, 0], torch.tensor(0.0))),
    "add": lambda x, y, i: x + y,
    "a number of the device": lambda x, y, i: y + x[0, 0],
    "add in place": lambda x, y, i: y.add_(x),
    "add in place to a number": lambda x, y, i: torch.tensor(0.0).add_(x[0, 0]),
    "out": lambda x, y, i: torch.add(x, x, out=y),
    "where": lambda x, y, i: torch.where(x > 0, x, y),
    "condition": lambda x, y, i: torch.where(y > 0, x, x),
    "lerp": lambda x, y, i: torch.lerp(x, x, y),
    "masked_fill": lambda x, y, i: x.masked_fill(y > 0, 0),
    "an index of the device": lambda x, y, i: y[i.to(x.device)],
    "values at an index": lambda x, y, i: x.__setitem__(i, y.clone()),
    "index_select": lambda x, y, i: x.index_select(0, i),
    "index_add": lambda x, y, i: x.index_add_(0, i, x.clone()),
    "gather": lambda x, y, i: x.gather(0, i[None]),
    "scatter": lambda x, y, i: x.scatter_reduce(0, i[None], x[:1].clone(), "amax"),
    "searchsorted": lambda x, y, i: torch.searchsorted(x[0], y[0]),
    "Adam": lambda x, y, i: torch._fused_adam_(
        [x], [x], [x], [x], [], [torch.tensor(1.0)], lr=1, beta1=0.9, beta2=0.9, weight_decay=0, eps=1e-8,
        amsgrad=False, maximize=False),
    "a generator of the CPU": lambda x, y, i: torch.rand(2, device=x.device, generator=torch.Generator()),
    "a generator of the device": lambda x, y, i: torch.rand(2, generator=torch.Generator(x.device)),
    "noise in place": lambda x, y, i: x.normal_(generator=torch.Generator()),
    "a state on the device": lambda x, y, i: torch.Generator().set_state(torch.Generator().get_state().to(x.device)),
    "numpy": lambda x, y, i: x.numpy(),
    "an array": lambda x, y, i: np.asarray(x)}
ALLOWED = {
    "a number of the CPU": lambda x, y, i: x * torch.tensor(2.0) + torch.where(x > 0, torch.tensor(1.0), x),
    "an exponent": lambda x, y, i: x ** torch.tensor(2),
    "an index of the CPU": lambda x, y, i: x[i] + x[:, i] + x[y > 0].view(2, 2),
    "a list": lambda x, y, i: x[[0, 1]],
    "a number at an index": lambda x, y, i: x.clone().index_put_((i,), torch.tensor(3.0)),
    "a slice": lambda x, y, i: x.clone().__setitem__(slice(0, 1), y[:1]),
    "copies": lambda x, y, i: (x.clone().copy_(y), y.clone().copy_(x))[0],
    "float64": lambda x, y, i: x.double().cumsum(0).float(),
    "complex": lambda x, y, i: torch.view_as_real(torch.view_as_complex(x)[[1, 0]]),
    "new_tensor": lambda x, y, i: x.new_tensor([1, 2]) + x.new_tensor(y.tolist()),
    "as_tensor": lambda x, y, i: torch.as_tensor(y, device=x.device) @ torch.as_tensor(x),
    "numbers": lambda x, y, i: torch.tensor([x[0, 0], float(x[0, 1]), x[1, 1].item()]).to(x.device),
    "arange and eye": lambda x, y, i: torch.arange(0, 2, 0.5, device=x.device) * torch.eye(4, device=x.device),
    "another shape": lambda x, y, i: x[None].squeeze_(0).t_(),
    "quantile": lambda x, y, i: x.quantile(0.5, dim=1),
    "a generator": lambda x, y, i: torch.rand(2, device=x.device, generator=torch.Generator(x.device).manual_seed(0))}


@pytest.mark.parametrize("what", REFUSED)
def test_devices_do_not_mix(device, what):
    x, y, i = torch.rand(2, 2, device=device), torch.rand(2, 2), torch.tensor([0, 1])
    with pytest.raises((RuntimeError, TypeError), match="same device|device type|expected a torch.ByteTensor"):
        REFUSED[what](x, y, i)
    REFUSED[what](y, y, i)  # works on a single device


@pytest.mark.parametrize("what", ALLOWED)
def test_operations_that_cuda_allows_match_the_cpu(device, what):
    x, y, i = torch.rand(2, 2) + 1, torch.rand(2, 2), torch.tensor([0, 1])
    result, wanted = ALLOWED[what](x.to(device), y, i), ALLOWED[what](x, y, i)
    if wanted is not None:
        assert result.device == torch.device(device, 0) and torch.equal(result.cpu(), wanted)


@pytest.mark.parametrize("mode, file, flags, where, name", [
    ("image", "red.png", ["--loss", "sdedit"], editors, "draw_noise"), ("svg", "rich.svg", [], svg_raster, "flatten"),
    ("nerf", "object", [], Camera, "rays"), ("splat", "object", [], splat, "quadratics")])
def test_a_mix_in_the_product_is_caught(call, monkeypatch, mode, file, flags, where, name):
    """A function of the product returns its result on the CPU, as if it had forgotten the device."""
    plain = getattr(where, name)

    def forgetful(*args, **kwargs):
        return tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, plain(*args, **kwargs))
    monkeypatch.setattr(where, name, forgetful)
    with pytest.raises(RuntimeError, match="found at least two devices|indices should be"):
        call(*flags, mode=mode, file=file)


@pytest.mark.parametrize("where, wanted", [(None, ("pretend", "cpu")), ("cpu", ("cpu", "cpu")),
                                           ("pretend", ("pretend", "pretend"))])
def test_files_remember_the_device(device, where, wanted):
    file = io.BytesIO()
    torch.save({"x": torch.ones(2, device=device), "y": torch.ones(2)}, file)
    file.seek(0)
    state = torch.load(file, map_location=where, weights_only=True)
    assert (state["x"].device.type, state["y"].device.type) == wanted


def test_modules_and_adam_match_the_cpu(device):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LeakyReLU(), torch.nn.Linear(3, 1))
    moved = copy.deepcopy(copy.deepcopy(plain).to(device))
    for model, there in ((plain, "cpu"), (moved, device)):
        for fused in (False, True):
            adam = torch.optim.Adam(model.parameters(), 0.1, fused=fused)
            for _ in range(2):
                adam.zero_grad()
                model(torch.ones(4, 2, device=there)).square().sum().backward()
                adam.step()
    for a, b in zip(plain.parameters(), moved.parameters(), strict=True):
        assert b.is_leaf and b.requires_grad and b.device.type == device
        torch.testing.assert_close(a, b.cpu())
