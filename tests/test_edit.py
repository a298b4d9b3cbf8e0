"""edit.py: the stages and the loop; Ctrl-C, kills and --resume, dataset updates, non-finite losses."""
import signal

import pytest
import torch
from conftest import nerf_scene, outputs
from PIL import Image

import pds
import run
from edit import LOSSES
from files import sheets
from image.updates import DatasetUpdate
from nerf import NeRF
from scene.reading import load_scene


def load(path):
    return torch.load(path, weights_only=True)


def stop_at(monkeypatch, step, how):
    """Call how() in the loss of the given step, once."""
    calls = []

    def loss(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            how()
        return pds.pds_loss(*args, **kwargs)
    monkeypatch.setitem(LOSSES, "pds", loss)


@pytest.mark.parametrize("mode", ["svg", "image"])
def test_ctrl_c_keeps_the_edit_so_far_and_resume_ends_bit_identically(command, tmp_path, monkeypatch, mode, capsys):
    assert command(mode=mode, out="whole") == 0
    stop_at(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    assert command(mode=mode) == 130
    assert "--resume goes on" in capsys.readouterr().err and (tmp_path / "out" / "result.png").exists()
    assert load(tmp_path / "out" / "checkpoint.pt")["step"] == 3
    assert command("--resume", mode=mode) == 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_a_second_ctrl_c_stops_at_once(command, tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    stop_at(monkeypatch, 3, twice)
    assert command() == 130
    assert load(tmp_path / "out" / "checkpoint.pt")["step"] == 2 and not (tmp_path / "out" / "result.png").exists()


def test_a_run_completes_where_ctrl_c_is_ignored(command, tmp_path, monkeypatch):
    """As for a job started with `nohup ... &` or in the background of a shell."""
    assert command(out="whole") == 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # conftest.py restores it
    stop_at(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    assert command() == 0 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_a_killed_run_resumes_from_its_last_checkpoint(command, tmp_path, monkeypatch, capsys):
    assert command(out="whole") == 0

    def kill():
        raise LookupError
    stop_at(monkeypatch, 6, kill)
    with pytest.raises(LookupError):
        command()
    assert load(tmp_path / "out" / "checkpoint.pt")["step"] == 4
    assert command("--resume", "--seed", 3) == 2 and "differs in seed" in capsys.readouterr().err
    assert command("--resume") == 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_a_non_finite_loss_stops_the_run(command, monkeypatch, capsys):
    monkeypatch.setitem(LOSSES, "pds", lambda prior, x0, *args, **kwargs: x0.sum() * float("nan"))
    assert command() == 1
    assert "the loss is nan at step 0" in capsys.readouterr().err


def test_a_nerf_is_fitted_measured_and_edited(small_runs, pipelines, tmp_path, capsys, monkeypatch):
    nerf_scene(tmp_path / "scene", views=8, size=16)
    flags = ["--mode", "nerf", "--scene", str(tmp_path / "scene"), "--fit-seconds", "0.2", "--device", "cpu",
             "--out", str(tmp_path / "out" / "edit")]
    assert run.main([*flags, "--fit-only"]) == 0
    assert "test PSNR" in capsys.readouterr().out
    assert [p.match("scene-nerf-*-fit.pt") for p in (tmp_path / "out").iterdir() if p.suffix == ".pt"] == [True]
    edit = [*flags, "--source", "a", "--target", "b", "--model", str(pipelines["sd"]), "--steps", "4", "--every", "2"]
    assert run.main(edit) == 0
    first = outputs(tmp_path / "out" / "edit")
    assert {"result.safetensors", "turntable.gif", "depth.png", "sheet.png"} <= set(first)
    assert "outside the subject" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "edit" / "result.png").size == (sheets.SIDES * 24, 24)
    assert run.main(edit) == 0 and outputs(tmp_path / "out" / "edit") == first  # the fit is kept, the edit repeats
    # the refining stage: killed midway, resumed, and exported
    edit[-3:] = ["2", "--every", "3", "--refine", "14", "--export"]
    assert run.main([*edit, "--out", str(tmp_path / "out" / "whole")]) == 0
    data_loss, calls = NeRF.data_loss, []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:
            raise LookupError
        return data_loss(*args, **kwargs)
    monkeypatch.setattr(NeRF, "data_loss", killed)
    with pytest.raises(LookupError):
        run.main(edit)
    assert load(tmp_path / "out" / "edit" / "checkpoint.pt")["step"] == 9
    assert run.main([*edit, "--resume"]) == 0
    export = load_scene(tmp_path / "out" / "edit" / "export")
    assert len(export.train) + len(export.test) == 6
    for name in ("result.safetensors", "sheet.png", "progress.gif", "depth.png", "turntable.gif"):
        assert (tmp_path / "out" / "edit" / name).read_bytes() == (tmp_path / "out" / "whole" / name).read_bytes(), name
    assert (tmp_path / "out" / "whole" / "result.safetensors").read_bytes() != first["result.safetensors"]
    assert run.main([*flags[:3], str(tmp_path), *flags[4:-1], str(tmp_path / "no" / "out"), "--fit-only"]) == 2
    assert "no transforms.json" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("mode", ["nerf", "splat"])
def test_datasets_are_updated_by_an_editor(small_runs, pipelines, tmp_path, monkeypatch, mode):
    monkeypatch.setattr(DatasetUpdate, "EVERY", 3)
    nerf_scene(tmp_path / "scene", views=8, size=16)
    flags = ["--mode", mode, "--scene", str(tmp_path / "scene"), "--fit-seconds", "0.1", "--device", "cpu", "--source",
             "a", "--target", "b", "--model", str(pipelines["sd"]), "--instruct", str(pipelines["instruct"]),
             "--steps", "7"]
    assert run.main([*flags, "--compare", "in2n", "inv2n", "--out", str(tmp_path / "out" / "whole")]) == 0
    whole = tmp_path / "out" / "whole"
    assert Image.open(whole / "sheet.png").height > 3 * 24  # source, in2n, inv2n
    assert Image.open(whole / "in2n" / "in2n-views.png").height > 3 * 24  # photographs, their edits, the scene
    assert (whole / "in2n" / "result.png").read_bytes() != (whole / "inv2n" / "result.png").read_bytes()
    edited, calls = DatasetUpdate.edited, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 3:  # at step 6
            raise LookupError
        return edited(*args)
    monkeypatch.setattr(DatasetUpdate, "edited", killed)
    again = [*flags, "--loss", "in2n", "--every", "2", "--out", str(tmp_path / "out" / "again")]
    with pytest.raises(LookupError):
        run.main(again)
    assert run.main([*again, "--resume"]) == 0 and len(calls) == 4  # the third is repeated
    for name in ("result.png", "in2n-views.png", "progress.gif"):
        assert (tmp_path / "out" / "again" / name).read_bytes() == (whole / "in2n" / name).read_bytes(), name
    assert load(tmp_path / "out" / "again" / "checkpoint.pt")["stages"][0][0]["edited"] == [
        v for v in dict.fromkeys(load(whole / "in2n" / "checkpoint.pt")["stages"][0][0]["edited"])]
