"""Bad input, damaged files, full disks, concurrent runs and kills: one line of error, and nothing is overwritten."""
import contextlib
import functools
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, SPLAT_SIZES, nerf_scene, outputs
from PIL import Image

import run
import svg_raster
import toy
from bench import fuzz_scenes, kills
from bench.__main__ import main as bench_main
from edit import LOSSES
from files import sheets
from files.checkpoint import CheckpointError, read_checkpoint, read_run
from files.messages import exit_code, one_line
from files.writing import check_writable, locked, replacing
from loop.progress import progress
from nerf import NeRF
from splat import Splats


def one_error(capsys, *parts):
    """Check that stderr holds one error with all the parts, and return it."""
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("run.py: error: ")]
    assert len(errors) == 1 and all(part in errors[0] for part in parts), lines
    return errors[0]


# ---- checkpoints ----------------------------------------------------------------------------

def change(key, value):
    return lambda state: state.update({key: value})


def first_of(key, value):
    def damage(state):
        name = next(name for name, tensor in state[key].items() if tensor.is_floating_point() and tensor.numel())
        state[key][name] = value(state[key][name])
    return damage


def moment(state):
    state["optimiser"]["state"][0]["exp_avg"] *= float("nan")


DAMAGES = [
    (change("step", -1), "'step' is wrong"), (change("step", True), "'step' is wrong"),
    (change("step", 99), "a longer run"),
    (change("scene", []), "'scene' is wrong"), (change("frames", []), "'frames' is wrong"),
    (change("frames", [torch.zeros(3, 3, 3, dtype=torch.uint8)]), "other pictures"),
    (change("stages", []), "'stages' is wrong"), (change("stages", [[]]), "not those of the run"),
    (change("stages", [[{"views": [[1, "x"]]}]]), "views of its stages is wrong"),
    (change("generators", [torch.zeros(3)]), "'generators' is wrong"),
    (change("generators", [[]]), "0 random number streams"),
    (change("generators", [[torch.zeros(5056, dtype=torch.uint8)]]), "random numbers"),
    (change("optimiser", {}), "optimiser's state does not fit"), (moment, "a moment is not finite"),
    (change("config", "{"), "config is wrong"), (change("config", 3), "'config' is wrong"),
    (first_of("scene", lambda x: x * float("nan")), "is not finite"),
    (first_of("scene", lambda x: x[:1]), "another shape"), (first_of("scene", lambda x: x.double()), "another shape"),
    (lambda state: state.pop("scene"), "'scene' is missing"),
    (lambda state: state["scene"].popitem(), "not those of the scene"), (None, "")]


def test_a_damaged_checkpoint_is_refused_in_one_line(command, tmp_path, capsys):
    assert command("--steps", 2) == 0
    file, before = tmp_path / "out" / "checkpoint.pt", outputs(tmp_path / "out")
    sound = file.read_bytes()
    for damage, reason in DAMAGES:
        if damage:
            state = torch.load(io.BytesIO(sound), weights_only=True)
            damage(state)
            torch.save(state, file)
        else:
            file.write_bytes(sound[:500])
        capsys.readouterr()
        assert command("--steps", 2, "--resume") == 2, reason
        one_error(capsys, f"{file}: no readable checkpoint: ", reason, "delete it to start over")
        assert outputs(tmp_path / "out") == before
    file.unlink()
    assert command("--steps", 2, "--resume") == 0 and outputs(tmp_path / "out") == before


def test_a_checkpoint_of_another_run_is_refused(command, tmp_path, capsys):
    assert command("--steps", 2) == 0 and command("--steps", 2, "--seed", 5, out="other") == 0
    (tmp_path / "other" / "checkpoint.pt").rename(tmp_path / "out" / "checkpoint.pt")
    assert command("--steps", 2, "--resume") == 2
    one_error(capsys, "cannot resume: the earlier run differs in seed")


class Trap:
    """An object that runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (Trap.folder,)


def test_no_pickle_is_executed(tmp_path, monkeypatch):
    Trap.folder = str(tmp_path / "sprung")
    torch.save({"step": 1, "scene": Trap()}, tmp_path / "a.pt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError, match="a.pt: no readable checkpoint"):
        read_checkpoint(tmp_path / "a.pt", {})
    with pytest.raises(CheckpointError):
        read_run(tmp_path / "a.pt", None)
    assert not (tmp_path / "sprung").exists()


def test_a_longer_fit_is_another_run(small_runs, pipelines, tmp_path, capsys, monkeypatch):
    nerf_scene(tmp_path / "scene", views=4, size=16)
    for kind, sizes in ((NeRF, dict(levels=2, table=2 ** 8, width=8)), (Splats, dict(count=40, limit=60, degree=1))):
        monkeypatch.setattr(kind, "fit", functools.partial(kind.fit, **sizes))
    flags = ["--scene", str(tmp_path / "scene"), "--device", "cpu", "--source", "a", "--target", "b", "--model",
             str(pipelines["sd"]), "--steps", "2", "--out", str(tmp_path / "scene" / "out")]  # within the scene
    for mode in ("nerf", "splat"):
        mine = ["--mode", mode, *flags]
        assert run.main([*mine, "--fit-seconds", "0.05"]) == 0
        config = json.loads((tmp_path / "scene" / "out" / "config.json").read_text())
        assert len(config["fit"]) == 64 and config["threads"] == torch.get_num_threads()
        (tmp_path / "scene" / "out" / "fit.png").unlink(missing_ok=True)  # of the other mode
        before = outputs(tmp_path / "scene" / "out")
        assert run.main([*mine, "--fit-seconds", "0.05", "--resume"]) == 0  # although the scene's folder has new files
        assert outputs(tmp_path / "scene" / "out") == before
        assert run.main([*mine[:4], "--fit-only", "--fit-seconds", "0.2", *flags[2:]]) == 0
        capsys.readouterr()
        assert run.main([*mine, "--fit-seconds", "0.05", "--resume"]) == 2
        one_error(capsys, "cannot resume: the earlier run differs in fit")
        after = outputs(tmp_path / "scene" / "out")
        assert after.pop("fit.png") and after == before


# ---- disks and concurrent runs -----------------------------------------------------------------------------

@pytest.fixture
def tiny_disk(tmp_path):
    """A folder on a disk of 2 MB; skips the test if the user may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no right to mount a disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_keeps_old_results_and_resume_ends_bit_identically(command, tmp_path, tiny_disk, capsys,
                                                                       monkeypatch):
    monkeypatch.setattr(sheets, "SHEET_SIZE", 512)  # results larger than a checkpoint
    assert command(out="whole") == 0
    assert command("--steps", 4, out="disk/out") == 0  # an earlier run
    def files():
        return {path.name: path.read_bytes() for path in (tiny_disk / "out").iterdir() if path.name != "checkpoint.pt"}
    before = files()
    ballast = tiny_disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):  # until the disk is full
        while True:
            file.write(bytes(1024))
    room = (tiny_disk / "out" / "checkpoint.pt").stat().st_size
    capsys.readouterr()
    assert command(out="disk/out") == 2
    one_error(capsys, f"{tiny_disk / 'out'}", "cannot be written: No space left on device")
    assert files() == before
    with open(ballast, "r+b") as file:  # room for one checkpoint, but not for a second one
        file.truncate(max(0, ballast.stat().st_size - room - 8192))
    assert command(out="disk/out") == 2
    one_error(capsys, "cannot be written: No space left on device")
    assert not list((tiny_disk / "out").glob(".*"))
    ballast.unlink()
    assert command("--resume", out="disk/out") == 0
    assert outputs(tiny_disk / "out") == outputs(tmp_path / "whole")


def test_a_read_only_disk_keeps_old_results(command, tmp_path, tiny_disk, capsys):
    assert command("--steps", 4, out="disk/out") == 0
    before = outputs(tiny_disk / "out")
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    capsys.readouterr()
    assert command(out="disk/out") == 2 and outputs(tiny_disk / "out") == before
    one_error(capsys, f"{tiny_disk / 'out'}")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="a: cannot be written: full"):
        with replacing(tmp_path / "a") as part:
            part.write_text("new")
            raise OSError(28, "full")
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError, match="nowhere"):
        with replacing(tmp_path / "nowhere" / "a") as part:
            part.write_text("new")


def test_two_runs_cannot_write_to_the_same_folder(command, tmp_path, capsys):
    assert command(out="whole") == 0
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".result.svg.99.part").write_text("left by a killed run")
    with locked(tmp_path / "out" / "run"):
        assert command() == 2
        one_error(capsys, f"{tmp_path / 'out'}: another run is writing there")
    (tmp_path / "out" / ".result.svg.99.part").write_text("left by a killed run")
    assert command() == 0 and outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    assert not list((tmp_path / "out").glob(".*"))


def test_the_second_fit_waits_for_the_first(tmp_path):
    order, file = [], tmp_path / "fit.pt"

    def second():
        with warnings.catch_warnings(record=True), locked(file, wait=True):
            order.append("second")
    with locked(file):
        other = threading.Thread(target=second)
        other.start()
        time.sleep(0.3)
        order.append("first")
    other.join()
    assert order == ["first", "second"] and not list(tmp_path.iterdir())


def test_a_failed_run_keeps_the_old_result(command, tmp_path, monkeypatch):
    assert command() == 0
    before, config = outputs(tmp_path / "out"), (tmp_path / "out" / "config.json").read_bytes()
    monkeypatch.setitem(LOSSES, "pds", lambda prior, x0, *args, **kwargs: x0.sum() * float("nan"))
    assert command("--seed", 3) == 1
    assert outputs(tmp_path / "out") == before and (tmp_path / "out" / "config.json").read_bytes() == config


@pytest.mark.parametrize("mode, name", [("svg", "result.svg"), ("image", "result.png"), ("image", "source.png")])
def test_a_run_does_not_overwrite_its_input(command, tmp_path, capsys, mode, name):
    assert command(mode=mode) == 0
    file = tmp_path / "out" / name
    before = outputs(tmp_path / "out")
    assert command(f"--{mode}", file, mode=mode) == 2
    one_error(capsys, f"{file}: the run would overwrite it")
    assert outputs(tmp_path / "out") == before
    assert command(f"--{mode}", file, mode=mode, out="next") == 0


def test_an_unwritable_folder_is_reported_before_a_fit(pipelines, tmp_path, capsys, monkeypatch):
    nerf_scene(tmp_path / "scene", views=4)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr("nerf.NeRF.fit_loss", lambda *_: pytest.fail("it was fitted"))
    for flags in (["--fit-only"], ["--source", "a", "--target", "b", "--model", str(pipelines["sd"])]):
        assert run.main(["--scene", str(tmp_path / "scene"), "--out", str(tmp_path / "file" / "a" / "b"), *flags]) == 2
        one_error(capsys, str(tmp_path / "file"))
    with pytest.raises(OSError, match="is a file"):
        check_writable(tmp_path / "file")
    check_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


# ---- the command line ---------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [
    ["--fit-seconds", "0"], ["--fit-seconds", "1e308"], ["--steps", "10000000"], ["--seed", "1" + "0" * 20],
    ["--colours", "1e308"], ["--guidance", "1e308"], ["--refine", "100000000"], ["--every", "0"],
    ["--downscale", "1" * 400],
    ["--device", "cuda:99"], ["--device", "toaster"]])
def test_numbers_out_of_bounds_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as e:
        run.parse(flags)
    assert e.value.code == 2 and flags[0] in one_line_of(capsys)


def one_line_of(capsys):
    """The output on stderr, which must be a single line."""
    line, = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("main, flags", [
    (toy.main, ["--seed", "x"]), (svg_raster.main, ["a.svg", "--size", "x", "--out", "b"]), (bench_main, ["no-such"]),
    (bench_main, ["svg-batch", "--seed", "x"]), (run.main, ["--no-such"]),
    (run.main, ["--mode", "svg", "--loss", "drfs"])])
def test_a_bad_command_line_is_reported_in_one_line(main, flags, capsys):
    with pytest.raises(SystemExit) as e:
        main(flags)
    assert e.value.code == 2 and "error: " in one_line_of(capsys)


@pytest.mark.parametrize("flags, mode", [([], "svg"), (["--svg", "a"], "svg"), (["--image", "a"], "image"),
                                         (["--image=a"], "image"), (["--scene", "a"], "nerf"),
                                         (["--mode", "splat", "--scene", "a"], "splat")])
def test_the_flag_of_the_file_implies_the_mode(flags, mode):
    assert run.parse(flags).mode == mode


def test_a_schedule_that_ends_in_zero_is_refused_and_equal_prompts_warn(command, tmp_path, capsys):
    args = run.parse(["--t-max", "1"])
    prior = types.SimpleNamespace(size=16, multiple=4, defaults={"guidance": {"pds": 1}})
    prior.abar = torch.linspace(0.99, 0, 1000, dtype=torch.float64)
    with pytest.raises(ValueError, match="--t-max 1: the model's schedule has no signal left there"):
        run.complete(args, prior)
    run.complete(run.parse([]), prior)
    assert command("--target", "a  face", "--steps", 1) == 0
    assert "warning: --source and --target are the same" in capsys.readouterr().err


def test_errors_of_libraries_are_reported_in_one_line(capsys):
    def raises(error):
        def call():
            raise error
        return call
    assert exit_code("x", raises(ValueError("first\nsecond\n"))) == 2
    assert exit_code("x", raises(OSError())) == 2
    assert exit_code("x", raises(MemoryError())) == 2
    assert exit_code("x", lambda: torch.zeros(1 << 50)) == 2
    with pytest.raises(RuntimeError, match="a fault"):
        exit_code("x", raises(RuntimeError("a fault of the program")))
    assert exit_code("x", raises(KeyboardInterrupt())) == 130
    assert exit_code("x", raises(KeyboardInterrupt("hint"))) == 130
    first, second, third, fourth, *rest = capsys.readouterr().err.splitlines()
    assert [first, second, third] == ["x: error: first second", "x: error: OSError", "x: error: MemoryError"]
    assert fourth.startswith("x: error: ") and "allocate memory" in fourth
    assert rest == ["x: interrupted", "x: interrupted: hint"]
    assert len(one_line("y" * 10 ** 5)) < 600


def test_ctrl_c_during_startup_is_reported_in_one_line(tmp_path):
    for seconds in (0.4, 1.2):
        process = subprocess.Popen([sys.executable, str(ROOT / "run.py"), "--out", str(tmp_path / "out")], cwd=tmp_path,
                                   stderr=subprocess.PIPE, text=True)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)[1]
        assert process.returncode == 130 and printed.splitlines() == ["run.py: interrupted"]


def test_without_a_terminal_progress_is_an_occasional_line(capsys):
    with progress(total=3000, desc="fit", unit="step") as bar:
        for _ in range(3000):
            bar.update()
    lines = capsys.readouterr().err
    assert "\r" not in lines and 1 <= len(lines.splitlines()) <= 3 and "3000/3000" in lines


# ---- pictures, fuzz, kills ----------------------------------------------------------------------------

def test_a_run_turns_converts_and_bounds_its_pictures(command, tmp_path, capsys):
    shape = Image.new("RGB", (40, 40), "white")
    shape.paste("red", (0, 0, 40, 12))
    shape.save(tmp_path / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    shape.transpose(Image.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    grey = np.linspace(0, 65535, 1600).reshape(40, 40)
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray((grey / 257).round().astype(np.uint8)).save(tmp_path / "flat.png")
    Image.new("1", (1, 60000)).save(tmp_path / "tower.png")
    made = {}
    for name in ("plain", "turned", "deep", "flat", "tower"):
        assert command("--image", tmp_path / f"{name}.png", "--pixels", "--steps", 1, mode="image", out=name) == 0
        made[name] = (tmp_path / name / "source.png").read_bytes()
    assert made["plain"] == made["turned"]
    a, b = (np.array(Image.open(tmp_path / name / "source.png"), int) for name in ("deep", "flat"))
    assert np.abs(a - b).max() <= 2 and a.std() > 30


@pytest.mark.parametrize("kind", fuzz_scenes.COUNTS)
def test_a_sample_of_fuzzed_inputs_passes(tmp_path, kind):
    for case in range({"scenes": 12, "colmap": 12, "ply": 12, "pictures": 20, "settings": 8}[kind]):
        end, seconds, _ = fuzz_scenes.run_case(kind, case, 1, tmp_path)
        assert end in ("read", "refused"), (case, end)


@pytest.mark.parametrize("kind", ["svg", "splat"])
def test_killed_runs_resume_bit_identically(pipelines, tmp_path, monkeypatch, kind):
    small = ["--model", str(pipelines["sd"]), *(["--fit-seconds", "0.1"] if kind == "splat" else [])]
    monkeypatch.setattr(kills, "SMALL", kills.SMALL | {"SIDES": 2, "SHEET_SIZE": 64})
    monkeypatch.setattr(Splats, "sizes", lambda device: SPLAT_SIZES)
    monkeypatch.setattr(kills, "RUNS", {kind: [*kills.RUNS[kind], *small]})
    kills.whole_run(kind, tmp_path / kind)
    out, found = tmp_path / kind / "killed", []

    def until_it_has_begun(_):
        while not (out / "checkpoint.pt").exists():
            time.sleep(0.005)
        found.extend(path.name for path in out.iterdir())
    monkeypatch.setattr(kills, "time", types.SimpleNamespace(sleep=until_it_has_begun))
    assert kills.kill_and_resume(kind, tmp_path / kind, 0.0) == ""
    assert (out / "result.png").exists() and "result.png" not in found
