"""loop/parallel.py: torchrun against --batch in one process; resuming, a process that fails, Ctrl-C, tables."""
import contextlib
import csv
import json
import multiprocessing
import os
import signal
import socket
import sys
import textwrap
import time
import traceback
from functools import partial

import pytest
import tiny
import torch
from conftest import NERF_SIZES, nerf_scene, outputs

import run
from bench.__main__ import main as bench
from files import sheets
from loop import parallel
from nerf import NeRF

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
SCRIPT = """
    import sys, time
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
         "--fit-seconds", "0.3"]
BENCH = ["edits", "--list", "list.txt", "--compare", "dds", "pds", "--steps", "2", "--out", "table"]
FIT = ["--mode", "nerf", "--scene", "scene", "--fit-only", "--fit-seconds", "0.1", "--out", "fits/a"]


@pytest.fixture
def place(tmp_path):
    """A folder with a drawing, a scene, and a list of edits."""
    (tmp_path / "face.svg").write_text(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'><circle cx='16' cy='16' r='12' fill='#fc0'/>"
        "<rect x='8' y='18' width='16' height='4' fill='#a40'/></svg>")
    nerf_scene(tmp_path / "scene", size=16)
    (tmp_path / "list.txt").write_text("svg | face.svg | a face | a cat\nsvg | face.svg | a face | a bear\n")
    return tmp_path


@pytest.fixture
def small(monkeypatch):
    """The tiny prior and small pictures, for the runs of this process and of its forks."""
    monkeypatch.setattr(run, "load_prior", lambda args: tiny.Tiny())
    monkeypatch.setattr(parallel, "stop", lambda: None)
    monkeypatch.setattr(NeRF, "sizes", lambda device: NERF_SIZES)
    for name, value in tiny.SIZES.items():
        monkeypatch.setattr(sheets, name, value)


def worker(script):
    """Run a script in a process that torchrun has forked: with the signals' usual handlers instead of torchrun's."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    exec(script, {})


def torchrun(folder, script):
    """Run a script in two processes of torchrun, forked ones, as their imports take seconds; what they print goes to
    torchrun.txt."""
    os.setsid()
    os.chdir(folder)
    os.environ["OMP_NUM_THREADS"] = "1"
    log = os.open("torchrun.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args
    config, *_ = config_from_args(parse_args(["--nproc-per-node=2", "--rdzv-backend=c10d", "script.py"]))
    config.rdzv_endpoint, config.start_method = "localhost:0", "fork"  # as --standalone
    elastic_launch(config, worker)(script)


def launch(folder, body):
    """Start a script with the tiny prior in two processes of torchrun; returns torchrun's process."""
    script = textwrap.dedent(SCRIPT) + textwrap.dedent(body)
    process = multiprocessing.get_context("fork").Process(target=torchrun, args=(folder, script))
    process.start()
    return process


def forked(folder, body):
    """Call body() in two forked processes of one group, as torchrun would; returns what each of them printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        process, code = os.fork(), 1
        if process:
            processes.append(process)
            continue
        try:
            signal.alarm(200)
            os.chdir(folder)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(port)}
            log = open(f"{rank}.txt", "w", buffering=1)
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                try:
                    code = body()
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    said = [(folder / f"{rank}.txt").read_text() for rank in range(2)]
    assert codes == [0, 0], "\n".join(said)[-3000:]
    return said


def test_an_error_is_printed_once_and_one_failing_process_ends_all(place, small, monkeypatch, capsys):
    done = launch(place, f"""
        assert run.main({SVG} + ["--svg", "none.svg", "--out", "none"]) == 2
        try:
            run.main(["--steps", "many"])
        except SystemExit as e:
            assert e.code == 2

        def fails(*args, calls=[], **kwargs):
            calls.append(1)
            if len(calls) == 5 and parallel.rank() == 1:
                raise ValueError("the second process fails")
            return pds.pds_loss(*args, **kwargs)
        edit.LOSSES["pds"] = fails
        sys.exit(run.main({SVG} + ["--out", "killed"]))""")
    done.join(200)
    printed = (place / "torchrun.txt").read_text()
    assert done.exitcode and "run.py: error: the second process fails" in printed
    assert printed.count("none.svg: no such file") == printed.count("argument --steps: ") == 1, printed
    assert torch.load(place / "killed" / "checkpoint.pt", weights_only=True)["step"] == 4
    monkeypatch.chdir(place)  # a single process must not resume it
    assert run.main([*SVG, "--out", "killed", "--resume"]) == 2
    assert "the earlier run differs in processes" in capsys.readouterr().err


def test_ctrl_c_saves_the_results_before_the_pictures(place):
    """torchrun kills its processes 30 s after Ctrl-C; here, as for a slow scene, rendering takes longer than that."""
    running = launch(place, f"""
        import os, pathlib
        plain = run.Shown.look

        def slow(*args, **kwargs):
            begun.write_text(str(os.getpid()))
            time.sleep(0.02)
            return pds.pds_loss(*args, **kwargs)
        edit.LOSSES["pds"], begun = slow, pathlib.Path("begun-" + os.environ["RANK"])
        run.Shown.look = lambda self, scene: time.sleep(600) if begun.exists() else plain(self, scene)
        sys.exit(run.main({SVG} + ["--steps", "100000", "--every", "100000", "--out", "slow"]))""")
    try:
        ends = time.monotonic() + 200

        def wait(*names):
            while not all((place / name).exists() for name in names):
                assert time.monotonic() < ends and running.is_alive(), (place / "torchrun.txt").read_text()
                time.sleep(0.02)
        wait("begun-0", "begun-1")
        os.kill(running.pid, signal.SIGINT)
        wait("slow/config.json", "slow/result.svg", "slow/source.svg", "slow/checkpoint.pt")
    finally:
        for process in [running.pid, *(int(path.read_text() or 0) for path in place.glob("begun-*"))]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process or running.pid, signal.SIGKILL)
        running.join()


def test_processes_match_a_batch_resume_and_share_the_edits_of_a_table(place, small, monkeypatch):
    def load(path):
        return torch.load(place / path, weights_only=True)

    def runs():
        killed = partial(run.main, [*SVG, "--steps", "6", "--out", "killed"])
        with pytest.MonkeyPatch.context() as patch:
            calls = []

            def fails(*args, plain=run.LOSSES["pds"], **kwargs):
                calls.append(1)
                if len(calls) == 5:
                    raise ValueError("both processes fail")
                return plain(*args, **kwargs)
            patch.setitem(run.LOSSES, "pds", fails)
            assert killed() == 2
        words = ([*SVG, "--out", "killed", "--resume"], [*SVG, "--out", "two"], [*SPLAT, "--out", "splats/two"], FIT)
        return max([*map(run.main, words), bench(BENCH)])
    said = forked(place, runs)
    assert "done: two/sheet.png" in said[0] and "done: " not in said[1]  # only the first process prints
    assert outputs(place / "killed") == outputs(place / "two")
    monkeypatch.chdir(place)
    assert run.main([*SVG, "--batch", "2", "--out", "batch"]) == 0
    assert run.main([*SPLAT, "--batch", "2", "--out", "splats/batch"]) == 0
    for kind in ("", "splats/"):
        two, batch = load(f"{kind}two/checkpoint.pt"), load(f"{kind}batch/checkpoint.pt")
        assert two["step"] == batch["step"] and len(two["generators"]) == 2 and len(batch["generators"]) == 1
        for key, value in two["scene"].items():
            # as a whole: sums differ in their order, and Adam turns the rounding of a gradient near 0 into a step
            away = (value - batch["scene"][key]).double().norm()
            assert away <= 3e-6 * value.double().norm(), (kind, key, away.item())
        assert all(map(torch.equal, [own for own, in two["generators"]], batch["generators"][0]))
    updated = [load(f"splats/{name}/checkpoint.pt")["stages"][0][1]["edited"] for name in ("two", "batch")]
    assert updated[0] == updated[1] and len(set(updated[0])) == 4  # two of the 9 views in each of two updates
    processes = [json.loads((place / name / "config.json").read_text())["processes"] for name in ("two", "batch")]
    assert processes == [2, 1]
    rows = [(row["target"], row["loss"]) for row in csv.DictReader((place / "table" / "table.csv").open())]
    assert rows == [(target, name) for target in ("a cat", "a bear") for name in ("dds", "pds")]
    fit = load(next((place / "fits").glob("scene-nerf-*-fit.pt")))
    assert len(fit["others"]) == 1 and not torch.equal(fit["generator"], fit["others"][0])
