"""--view: what a page is sent, what that costs an edit, and the pages in a browser."""
import _thread
import math
import socket
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import Chromium
from conftest import NERF_SIZES, nerf_scene, outputs

import run
from nerf import NeRF
from scene.cameras import Camera
from scene.reading import load_scene
from splat import Splats

viser = pytest.importorskip("viser", reason="no viser: pip install viser")
from scene import viewer  # noqa: E402
from scene.viewer import BOTH, COARSE, FINE, LONGEST, SHARE, SOURCE, Viewer  # noqa: E402


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def ball(tmp_path_factory):
    """The folder of a small scene, a NeRF of it and its file, Gaussians of it and their file."""
    folder = tmp_path_factory.mktemp("ball")
    scene = load_scene(nerf_scene(folder / "ball", views=8, size=24))
    nerf = NeRF.fit(scene, steps=112, progress=False, **NERF_SIZES)
    normal = torch.nn.functional.normalize(torch.randn(400, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    splats = Splats(scene, 0.75 * normal, torch.full((400, 3), -2.7), torch.tensor([[1.0, 0, 0, 0]]).expand(400, 4),
                    torch.full((400,), 3.0), normal / 2 / 0.28209479, torch.zeros(400, 0, 3))
    nerf.save(folder / "result.safetensors"), splats.save(folder / "result.ply")
    return SimpleNamespace(folder=folder / "ball", nerf=nerf, splats=splats)


class Stub:
    """A page without a browser, whose camera goes round by `turn` with every look; `pictures`: what it was sent."""

    def __init__(self, turn=0.0):
        self.angle, self.turn, self.pictures = 0.0, turn, []
        self.scene = SimpleNamespace(set_background_image=lambda pixels, *_, **__: self.pictures.append(pixels))

    @property
    def camera(self):
        self.angle += self.turn
        back = np.array([math.cos(self.angle), math.sin(self.angle), 0.3]) / math.hypot(1, 0.3)
        right = np.cross([0, 0, 1], back) / np.linalg.norm(np.cross([0, 0, 1], back))
        axes = np.stack((right, -np.cross(back, right), -back), 1)
        return SimpleNamespace(wxyz=viser.transforms.SO3.from_matrix(axes).wxyz, position=back * 35, fov=0.7,
                               image_width=300, image_height=200)


@pytest.fixture
def view():
    with Viewer(free_port()) as view:
        yield view


def looked_at(view, page, monkeypatch):
    monkeypatch.setattr(view.server, "get_clients", lambda: {0: page})
    return SimpleNamespace(seen=False)


# ---- without a browser --------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["nerf", "splats"])
def test_a_picture_is_the_scene_from_the_pages_camera(ball, view, kind, monkeypatch):
    """As rendered by the scene itself from that camera; beside it the source, at the divider."""
    scene, page = getattr(ball, kind), Stub()
    view.show(scene)
    camera = view._camera((*page.camera.wxyz, *page.camera.position, 0.7, 1.5), COARSE)
    back = torch.tensor([1.0, 0, 0.3]) / math.hypot(1, 0.3)
    torch.testing.assert_close(camera.pose[:, 3], scene.centre + 3.5 * scene.scene.half * back, atol=1e-4, rtol=0)
    torch.testing.assert_close(camera.pose[:, 2], back, atol=1e-5, rtol=0)
    with torch.no_grad():
        wanted = scene.render(camera)
    assert wanted.shape[-2:] == (64, 96) and wanted.std() > 0.1
    view.depth.value, view.which.value = False, BOTH
    for value in view.source.parameters():
        value.data.mul_(0)  # a source without colours
    pixels = view._look(camera, lambda: False)
    right = (wanted[0, :, :, 50:] * 255).permute(1, 2, 0).numpy()
    assert np.abs(pixels[:, 50:] - right).max() <= 1 and np.abs(pixels[:, :46] - right[:, :46]).mean() > 10
    view.depth.value = True
    assert np.ptp(view._look(camera, lambda: False)[:, 50:]) > 50


class Slow(torch.nn.Module):
    """A scene on a clock of its own: so many seconds a pixel."""

    def __init__(self, like, speed):
        super().__init__()
        self.scene, self.centre, self.background, self.like = like.scene, like.centre, like.background, [like]
        self.camera, self.photograph, self.speed, self.now = like.camera, like.photograph, speed, 0.0

    def render(self, camera=None, size=None):
        self.now += self.speed * camera.width * camera.height
        return torch.zeros(1, 3, camera.height, camera.width)


def test_a_resting_camera_gets_finer_pictures_and_a_moving_one_coarse_ones(ball, view, monkeypatch):
    page = Stub()
    view.show(Slow(ball.nerf, 1e-7), edited=False)
    looked_at(view, page, monkeypatch)
    for _ in range(6):
        view._draw("", 0)
    assert [p.shape[0] for p in page.pictures] == [COARSE, 128, 256, FINE]  # and nothing once it is fine
    page.turn = 0.1
    view._draw("", 0)
    assert [p.shape[0] for p in page.pictures[4:]] in ([COARSE], [])  # it may have moved on while it was drawn


@pytest.mark.parametrize("speed", [1e-7, 1e-5, 1e-4])
@pytest.mark.parametrize("turn", [0.0, 0.1])
def test_drawing_takes_at_most_its_share_of_the_edit(ball, view, speed, turn, monkeypatch):
    """However slow a picture is and whether or not the camera moves, over 300 steps of 0.15 seconds."""
    monkeypatch.setattr(viewer, "FINE", 128)
    scene, page = Slow(ball.nerf, speed), Stub(turn)
    view.clock = lambda: scene.now
    view.show(scene, edited=False)
    interrupt, spent = looked_at(view, page, monkeypatch), []
    for step in range(300):
        scene.now += 0.15
        before = scene.now
        view.between("pds", step, 300, 0.5, interrupt)
        spent.append(scene.now - before)
    one = max(LONGEST, speed * COARSE ** 2 * 1.5)  # a picture that may be under way
    assert sum(spent) <= SHARE * 300 * 0.15 + LONGEST + one and max(spent) <= 1.5 * one
    assert len(page.pictures) >= (3 if speed == 1e-4 else 20)


def gone(*_, **__):
    """In the place of Viewer.stay: a stub never closes."""


@pytest.mark.parametrize("mode", ["nerf", "splat"])
def test_an_edit_takes_the_same_steps_with_and_without_a_page(ball, mode, small_runs, pipelines, tmp_path,
                                                              monkeypatch):
    """Every output is equal to the bit, though the page has moved and been sent pictures of all kinds."""
    monkeypatch.setattr(viewer, "SHARE", 10.0)  # a picture after every step
    monkeypatch.setattr(viewer, "PACE", 0.0)
    page, between = Stub(0.3), Viewer.between
    monkeypatch.setattr(viser.ViserServer, "get_clients", lambda self: {0: page})
    monkeypatch.setattr(Viewer, "stay", gone)

    def turned(self, stage, step, *others):
        self.depth.value, self.which.value = step % 3 == 0, (BOTH, SOURCE, "now")[step % 3]
        return between(self, stage, step, *others)
    monkeypatch.setattr(Viewer, "between", turned)
    file = {"nerf": "result.safetensors", "splat": "result.ply"}[mode]
    flags = ["--mode", mode, "--scene", ball.folder, "--fitted", ball.folder.parent / file, "--source", "a", "--target",
             "b", "--model", pipelines["sd"], "--steps", "6", "--refine", "0", "--device", "cpu"]
    assert run.main([*map(str, flags), "--out", str(tmp_path / "without")]) == 0
    assert run.main([*map(str, flags), "--out", str(tmp_path / "with"), "--view", str(free_port())]) == 0
    assert len(page.pictures) >= 4 and outputs(tmp_path / "with") == outputs(tmp_path / "without")


def test_two_pages_take_turns_and_one_may_close(ball, view, monkeypatch):
    pages = {0: Stub(), 1: Stub()}
    view.show(ball.nerf)
    monkeypatch.setattr(view.server, "get_clients", lambda: dict(pages))
    for _ in range(4):
        view._draw("", 0)
    assert [len(page.pictures) for page in pages.values()] == [2, 2]
    closed, pages[2] = pages.pop(0), Stub()  # and one comes late
    for _ in range(3):
        view._draw("", 0)
    assert len(closed.pictures) == 2 and len(pages[1].pictures) + len(pages[2].pictures) == 5
    assert set(view.pages) == {1, 2} and len(pages[2].pictures) >= 1


def test_a_pause_ends_by_the_button_and_by_ctrl_c(ball, view, monkeypatch):
    view.show(ball.splats)
    interrupt = looked_at(view, Stub(), monkeypatch)
    for end in (lambda: setattr(view, "paused", False), lambda: setattr(interrupt, "seen", True),
                lambda: setattr(view, "stopped", True)):
        view.paused = True
        timer = threading.Timer(0.1, end)
        timer.start()
        assert view.between("pds", 1, 9, 0.5, interrupt) == view.stopped
        timer.join()


def test_it_listens_on_this_machine_alone_and_never_for_the_outside(view):
    assert view.server.get_host() == "127.0.0.1" and view.server.request_share_url() is None
    listening = view.server._websock_server._background_event_loop
    assert listening.is_running()


def test_a_taken_port_and_a_missing_package_are_told_before_anything_starts(ball, tmp_path, capsys, monkeypatch):
    flags = ["--view", "--fitted", str(ball.folder.parent / "result.ply"), "--device", "cpu"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run.main(["--view", str(port), *flags[1:]]) == 2
    assert run.main([*flags, "--view-host", "203.0.113.1"]) == 2
    monkeypatch.setitem(sys.modules, "viser", None)
    assert run.main(flags) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run.py: error: ")]
    assert len(errors) == 3 and f"--view: cannot listen on 127.0.0.1:{port}: Address already in use" in errors[0]
    assert "203.0.113.1:8080" in errors[1] and "pip install -U viser" in errors[2]


def test_several_processes_and_drawings_have_no_viewer(capsys, monkeypatch):
    monkeypatch.setattr(run.parallel, "world", lambda: 2)
    with pytest.raises(ValueError, match="one process, not of 2"):
        run.viewer(run.parse(["--mode", "nerf", "--view"]))
    with pytest.raises(SystemExit) as error:
        run.parse(["--mode", "svg", "--view"])
    assert error.value.code == 2 and "--view: only with --mode nerf and splat" in capsys.readouterr().err


def test_the_camera_of_a_frustum_is_that_of_its_photograph(ball, view):
    view.show(ball.nerf, edited=False)
    camera = ball.nerf.camera(2)
    wxyz, position = view._place(camera)
    fov = 2 * math.atan(camera.height / 2 / camera.lens[1])
    there = view._camera((*wxyz, *position, fov, camera.width / camera.height), camera.height)
    assert isinstance(there, Camera) and (there.width, there.height) == (camera.width, camera.height)
    torch.testing.assert_close(there.pose, camera.pose, atol=1e-5, rtol=0)
    torch.testing.assert_close(there.lens[:4], camera.lens[:4], atol=1e-3, rtol=1e-5)
    assert len(view.cameras) == len(ball.nerf.scene.train)


# ---- in a browser -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def scene_of(browser):
    """The left part of the page, where no panel lies, as an array."""
    return np.asarray(browser.picture(), np.float32)[130:, :300]


def watched(call, look):
    """call() in this thread while look() runs in another; returns call's result and raises what look raises."""
    raised = []

    def looking():
        try:
            look()
        except BaseException as e:  # raised below, in the test's own thread
            raised.append(e)
            _thread.interrupt_main()
    thread = threading.Thread(target=looking)
    thread.start()
    result = call()
    thread.join()
    assert not raised, raised[0]
    return result


def click(browser, label):
    script = f"[...document.querySelectorAll('button')].find(b => b.textContent.trim() == '{label}')"
    browser.until(script), browser.run(f"{script}.click()")


def open_page(browser, port):
    """Open the page as soon as something listens there; returns it once it shows something, as an array."""
    for _ in range(600):
        with socket.socket() as trial:
            if not trial.connect_ex(("127.0.0.1", port)):
                break
        threading.Event().wait(0.05)
    browser.requests.clear()
    browser.goto(f"http://127.0.0.1:{port}")
    for _ in range(200):
        if (shown := scene_of(browser)).std() > 10:
            return shown
    raise AssertionError("the page stays blank")


def turn(browser, before):
    """Drag the scene until the page no longer shows `before`."""
    browser.mouse("mousePressed", 150, 200), browser.mouse("mouseMoved", 250, 200)
    browser.mouse("mouseReleased", 250, 200)
    for _ in range(100):
        if np.abs(scene_of(browser) - before).mean() > 2:
            return
    raise AssertionError("the page does not turn")


def test_the_page_shows_an_edit_turns_it_and_stops_it(ball, browser, small_runs, pipelines, tmp_path,
                                                      capsys, monkeypatch):
    """Not blank, another picture after a drag, nothing asked of others; "stop and keep" writes all files."""
    port = free_port()

    def look():
        turn(browser, open_page(browser, port))
        browser.until("document.body.innerText.includes('loss')")
        click(browser, "pause"), browser.until("document.body.innerText.includes('paused')")
        click(browser, "go on"), browser.until("!document.body.innerText.includes('paused')")
        click(browser, "stop and keep")
    flags = ["--mode", "nerf", "--scene", ball.folder, "--fitted", ball.folder.parent / "result.safetensors",
             "--source", "a", "--target", "b", "--model", pipelines["sd"], "--steps", "100000", "--refine", "0",
             "--device", "cpu", "--view", port, "--out", tmp_path / "out"]
    assert watched(lambda: run.main([*map(str, flags)]), look) == 130
    assert {"checkpoint.pt", "config.json", "result.safetensors", "sheet.png", "turntable.gif", "index.html"} <= {
        path.name for path in (tmp_path / "out").iterdir()}
    assert "the same command with --resume goes on" in capsys.readouterr().err
    own = (f"http://127.0.0.1:{port}/", f"blob:http://127.0.0.1:{port}/", "data:")
    assert not [address[:99] for address in browser.requests if not address.startswith(own)] and not browser.errors


def test_a_result_is_shown_without_an_edit(ball, browser, capsys):
    """Gaussians, which the browser itself draws and turns; "close" ends the command."""
    port = free_port()

    def look():
        turn(browser, open_page(browser, port))
        click(browser, "close")
    flags = ["--view", port, "--splats", ball.folder.parent / "result.ply", "--up", "z", "--device", "cpu"]
    assert watched(lambda: run.main([*map(str, flags)]), look) == 0
    assert f"view: http://127.0.0.1:{port}" in capsys.readouterr().out
