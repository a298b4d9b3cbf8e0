"""parallel.py: processes of torchrun against --batch in one, resuming, a process that dies, a table that is shared out."""
import csv
import json
import os
import subprocess
import sys
import textwrap

import pytest
import tiny
import torch
from conftest import ROOT, nerf_scene, outputs
from torch.testing import assert_close

import run
from files import sheets

SCRIPT = """
    import sys
    sys.path[:0] = [ROOT, ROOT + "/tests"]
    import torch
    import edit, pds, run, tiny
    from files import sheets
    from loop import parallel
    torch.set_num_threads(1)
    for name, value in tiny.SIZES.items():
        setattr(sheets, name, value)
    run.load_prior, parallel.stop = lambda args: tiny.Tiny(), lambda: None
"""
SVG = ["--mode", "svg", "--svg", "face.svg", "--source", "a face", "--target", "a cat", "--steps", "6", "--every", "2"]
SPLAT = ["--mode", "splat", "--scene", "scene", "--source", "a", "--target", "bcd", "--steps", "4", "--refine", "12",
         "--fit-seconds", "0.5"]
BENCH = ["--mode", "bench", "--list", "list.txt", "--compare", "dds", "pds", "--steps", "2", "--out", "table"]
FIT = ["--mode", "nerf", "--scene", "scene", "--fit-only", "--fit-seconds", "1", "--out", "fits/a"]


def launch(folder, body):
    """Run a script with the tiny prior in two processes of torchrun -> the finished process."""
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT).replace("ROOT", repr(str(ROOT))) + textwrap.dedent(body))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_processes_take_the_steps_of_a_batch_survive_a_kill_and_share_a_table_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "face.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'><circle cx='16' cy='16' "
                                       "r='12' fill='#fc0'/><rect x='8' y='18' width='16' height='4' fill='#a40'/></svg>")
    nerf_scene(tmp_path / "scene")
    (tmp_path / "list.txt").write_text("svg | face.svg | a face | a cat\nsvg | face.svg | a face | a bear\n")
    load = lambda path: torch.load(tmp_path / path, weights_only=True)

    # the second of two processes dies in its fifth step: both end, with its message
    done = launch(tmp_path, f"""
        def fails(*args, calls=[], **kwargs):
            calls.append(1)
            if len(calls) == 5 and parallel.rank() == 1:
                raise ValueError("the second process has had enough")
            return pds.pds_loss(*args, **kwargs)
        edit.LOSSES["pds"] = fails
        sys.exit(run.main({SVG} + ["--out", "killed"]))""")
    assert done.returncode != 0 and "run.py: error: the second process has had enough" in done.stderr
    assert load("killed/checkpoint.pt")["step"] == 4

    # a single process may not go on with that
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "load_prior", lambda args: tiny.Tiny())
    for name, value in tiny.SIZES.items():
        monkeypatch.setattr(sheets, name, value)
    assert run.main([*SVG, "--out", "killed", "--resume"]) == 2
    assert "it was made with another processes" in capsys.readouterr().err

    done = launch(tmp_path, f"""
        runs = ({SVG} + ["--out", "killed", "--resume"], {SVG} + ["--out", "two"], {SPLAT} + ["--out", "splats/two"],
                {BENCH}, {FIT})
        sys.exit(max([run.main(words) for words in runs]))""")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done: two/sheet.png") == 1  # the first process alone speaks
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "two")
    assert run.main([*SVG, "--batch", "2", "--out", "batch"]) == run.main([*SPLAT, "--batch", "2", "--out", "splats/batch"]) == 0
    for kind in ("", "splats/"):
        two, batch = load(f"{kind}two/checkpoint.pt"), load(f"{kind}batch/checkpoint.pt")
        assert two["step"] == batch["step"] and len(two["generators"]) == 2 and len(batch["generators"]) == 1
        for key, value in two["scene"].items():
            assert_close(value, batch["scene"][key], atol=1e-5, rtol=1e-4)
        assert all(map(torch.equal, [own for own, in two["generators"]], batch["generators"][0]))
    updated = [load(f"splats/{name}/checkpoint.pt")["stages"][0][1]["edited"] for name in ("two", "batch")]
    assert updated[0] == updated[1] and len(set(updated[0])) == 4  # two of the 9 views in each of two updates
    processes = [json.loads((tmp_path / name / "config.json").read_text())["processes"] for name in ("two", "batch")]
    assert processes == [2, 1]
    rows = list(csv.DictReader((tmp_path / "table" / "table.csv").open()))
    assert [(row["target"], row["loss"]) for row in rows] == [(t, m) for t in ("a cat", "a bear") for m in ("dds", "pds")]
    fit = load(next((tmp_path / "fits").glob("scene-nerf-*-fit.pt")))
    assert len(fit["others"]) == 1 and not torch.equal(fit["generator"], fit["others"][0])
