"""A scene in the browser while it is edited, and after: viser's server and page (an optional package), our pictures.

    with Viewer(8080) as view:                     # http://127.0.0.1:8080
        view.show(nerf)
        while not stopped:
            ...                                    # a step of the edit
            stopped = view.between("pds", step, steps, loss, interrupt)
        view.stay("done")

The browser draws Gaussians, with their colours for the camera that moved last. This process draws NeRFs, depth, and
source next to result between two steps: coarsely while a camera moves, finely while it rests. That takes at most SHARE
of the edit's time. The scene is only read, so that an edit takes the same steps with and without a page.
"""
import contextlib
import copy
import io
import math
import socket
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from files.pictures import to_uint8
from scene.cameras import Camera, sides
from scene.gaussians import ATTRIBUTES
from scene.representation import depth_picture

SHARE, LONGEST = 0.06, 0.1  # share of an edit's time; seconds for a picture between steps, at rest for a part of it
COARSE, FINE = 64, 512  # height in pixels of a picture while the camera moves, and after a while without that
PACE, GRACE = 0.25, 5.0  # seconds between two updates of text and Gaussians; without a page, until `stay` returns
HALF = 10.0  # half side of the box of interest on the page, where variances of Gaussians are float16
FRUSTA, THUMB = 150, 64  # the most cameras that are shown, and pixels of the shorter side of their photographs
FLIP = np.diag([1.0, -1.0, -1.0])  # from OpenGL's camera axes to OpenCV's, and back
NOW, SOURCE, BOTH = "now", "source", "side by side"


class Page:
    """One open page: `at`, its camera as nine floats (wxyz, position, fov, aspect), and the picture that it shows:
    of which camera and controls, of which step, at which height in pixels, and when it was drawn."""

    def __init__(self):
        self.at, self.look, self.step, self.height, self.drawn = None, None, 0, COARSE, 0.0

    def next(self, look, speed, longest):
        """The height for the next picture: twice the last one's as long as `speed`, seconds per square pixel, allows
        it in `longest` seconds; COARSE for another `look`."""
        height = min(2 * self.height, FINE) if look == self.look else COARSE
        while height > COARSE and speed * height ** 2 * self.at[-1] > longest:
            height //= 2
        return height


class Viewer:
    """The pages of one process; `show` gives them a scene.

    Attributes:
        paused, stopped: what the buttons say.
        room: seconds of drawing that the edit has earned; below zero while a picture is still to be earned.
    """
    clock = staticmethod(time.perf_counter)

    def __init__(self, port, host="127.0.0.1"):
        """Raises ValueError if viser is missing or too old, OSError if the port is taken or the host is not ours."""
        try:
            import viser
            assert hasattr(viser.GaussianSplatHandle, "set_gaussians")
        except (ImportError, AssertionError) as e:
            raise ValueError("--view needs the package viser: pip install -U viser") from e
        self.rotation = viser.transforms.SO3
        _check_free(host, port)  # viser would silently take the next free port
        with contextlib.redirect_stdout(io.StringIO()):
            self.server = viser.ViserServer(host, port, label="PDS", verbose=False)
        self.server.request_share_url = lambda *_: None  # otherwise any page could open a public tunnel
        self.scene = self.source = self.splats = None
        self.paused = self.stopped = False
        self.interrupt = SimpleNamespace(seen=False)
        self.pages, self.cameras, self.controls, self.step, self.sent = {}, [], 0, 0, None
        self.room, self.speed, self.told, self.left = LONGEST, 0.0, -math.inf, self.clock()
        self._controls()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.redirect_stdout(io.StringIO()):
            self.server.stop()

    def _controls(self):
        gui = self.server.gui
        gui.configure_theme(show_logo=False, show_share_button=False, brand_color=(47, 95, 208))
        self.text, self.bar = gui.add_markdown("The scene is being loaded."), gui.add_progress_bar(0)
        self.which = gui.add_dropdown("show", (NOW, SOURCE, BOTH), initial_value=NOW)
        self.divider = gui.add_slider("divider", 0.0, 1.0, 0.01, 0.5, visible=False)
        self.depth = gui.add_checkbox("depth", False)
        self.frusta = gui.add_checkbox("cameras", True, hint="the photographs; click one to see its view")
        self.pause, self.stop = gui.add_button("pause", visible=False), gui.add_button("stop and keep", visible=False)

        def paused(_):
            self.paused = not self.paused
            self.pause.label = "go on" if self.paused else "pause"

        def stopped(_):
            self.stopped = True

        def changed(_):
            self.controls, self.divider.visible = self.controls + 1, self.which.value == BOTH
            for camera in self.cameras:
                camera.visible = self.frusta.value
        self.pause.on_click(paused)
        self.stop.on_click(stopped)
        for control in (self.which, self.divider, self.depth, self.frusta):
            control.on_update(changed)

    # ---- what the edit calls

    def show(self, scene, edited=True):
        """Show a Representation; edited: it is about to be edited, and its state now is the source."""
        self.scene, self.source = scene, copy.deepcopy(scene) if edited else scene
        self.zoom, self.centre = HALF / scene.scene.half, scene.scene.centre.double().numpy()
        self.eye, views = sides(scene, 1, FINE)[0], scene.scene.train
        self.server.scene.set_up_direction(tuple(np.mean([view.camera.pose[:, 1].numpy() for view in views], 0)))
        start = self.server.initial_camera
        start.position, start.look_at, start.fov = 0.85 * self._place(self.eye)[1], (0.0, 0.0, 0.0), math.radians(50)
        for old in (*self.cameras, *filter(None, [self.splats])):
            old.remove()
        self.cameras = [self._frustum(i) for i in range(0, len(views), -(-len(views) // FRUSTA))]
        self.splats = self.sent = None
        if all(hasattr(scene, name) for name in ATTRIBUTES):
            self.splats = self.server.scene.add_gaussian_splats("/gaussians", *self._gaussians())
        self.bar.visible = self.which.visible = self.pause.visible = self.stop.visible = edited
        self.pages, self.step, self.speed, self.left = {}, self.step + 1, 0.0, self.clock()

    def between(self, stage, step, steps, loss, interrupt):
        """After a step, draw as much as time allows, and wait while a page has paused the edit.

        Args:
            stage, step, steps, loss: for the page. interrupt: a DelayedInterrupt, which ends a pause.
        Returns:
            Whether a page has requested to stop.
        """
        self.interrupt, start, text = interrupt, self.clock(), f"**{stage}**, step {step} of {steps}, loss {loss:.4g}"
        self.room = min(LONGEST, self.room + SHARE * (start - self.left))
        self.step += 1
        self._draw(text, 100 * step / steps, self.room > 0, LONGEST)
        self.room -= self.clock() - start
        if self.paused:
            self.told = -math.inf  # so that the page says so at once
        while self.paused and not (self.stopped or interrupt.seen):
            self._draw(f"{text}: paused", 100 * step / steps)
            time.sleep(0.02)
        self.left = self.clock()
        return self.stopped

    def stay(self, text, always=False):
        """Show the scene until Ctrl-C, until "close", or, unless `always`, until no page is open."""
        self.stopped = self.paused = self.pause.visible = False
        self.stop.label, self.stop.visible, last = "close", True, self.clock()
        with contextlib.suppress(KeyboardInterrupt):
            while not self.stopped and (always or self.clock() - last < GRACE):
                last = self.clock() if self.server.get_clients() else last
                self._draw(text, 100)
                time.sleep(0.02)

    # ---- what the pages show

    @torch.no_grad()
    def _draw(self, text, percent, allowed=True, longest=math.inf):
        """Update the text and the Gaussians every PACE, and the picture of one page, in about `longest` seconds."""
        clients, now = self.server.get_clients(), self.clock()
        self.pages = {number: self.pages.get(number) or Page() for number in clients}
        for number, page in self.pages.items():
            if (at := _camera_of(clients[number])) != page.at:
                page.at, self.eye = at, self._camera(at, COARSE)
        if not allowed:
            return
        drawn = self.splats is None or self.which.value == BOTH or self.depth.value
        if now - self.told > PACE:
            self.told, self.text.content, self.bar.value = now, text, percent
            wanted = (self.step, self.controls, *self.eye.pose.flatten().tolist())
            if self.splats and clients and self.sent != wanted:
                self.sent, self.splats.visible = wanted, not drawn
                self.splats.set_gaussians(*self._gaussians())
        stale = []
        for number, page in self.pages.items():
            look = (page.at, self.controls) if drawn else "blank"
            height = page.next(look, self.speed, longest)
            if look != page.look or drawn and (self.step != page.step or height > page.height):
                stale.append((page.drawn, number, look, height))
        if stale:
            _, number, look, height = min(stale)
            self._send(self.pages[number], clients[number], look, height)

    def _send(self, page, client, look, height):
        """Send a page its backdrop behind frusta and Gaussians: a picture, or the scene's background."""
        page.drawn, page.look, page.step, page.height = self.clock(), look, self.step, height
        if look == "blank":
            pixels = to_uint8(self.scene.background[:, None, None].expand(3, 2, 2)).cpu().numpy()
        else:
            state = self._state(client)
            pixels = self._look(self._camera(page.at, height), lambda: height > COARSE and self._state(client) != state)
        if pixels is not None:
            with warnings.catch_warnings():  # about a page that has just been closed
                warnings.simplefilter("ignore")
                client.scene.set_background_image(pixels, "jpeg", jpeg_quality=90)

    def _state(self, client):
        """All that makes a picture that is being drawn useless once it changes."""
        return _camera_of(client), self.controls, self.paused, self.stopped, self.interrupt.seen

    def _look(self, camera, late):
        """The picture of a Camera, uint8 [H,W,3]: of the source, of the scene now, or of both with a divider; None if
        late() comes true while it is drawn, strip by strip of LONGEST seconds."""
        both, cut = self.which.value == BOTH, min(max(round(self.divider.value * camera.width), 1), camera.width - 1)
        parts = [(self.source if self.which.value == SOURCE else self.scene, camera)]
        if both:
            parts = [(self.source, replace(camera, width=cut)),
                     (self.scene, replace(camera.shifted(cut, 0), width=camera.width - cut))]
        rows, strips, start = max(1, int(LONGEST / max(self.speed * camera.width, 1e-9))), [], self.clock()
        for top in range(0, camera.height, rows):
            high = min(rows, camera.height - top)
            if top and late():
                return None
            cells = [(scene, replace(part.shifted(0, top), height=high)) for scene, part in parts]
            strips.append(torch.cat([scene.depth(c) if self.depth.value else scene.render(c) for scene, c in cells], 3))
        self.speed = (self.clock() - start) / (camera.height * camera.width)
        picture = torch.cat(strips, 2)
        pixels = to_uint8((depth_picture(picture) if self.depth.value else picture)[0]).cpu().numpy()
        if both:
            pixels[:, cut] = 128
        return pixels

    def _gaussians(self):
        """Centres [N,3], covariances [N,3,3], colours [N,3] and opacities [N,1] for the page."""
        scene = self.source if self.which.value == SOURCE else self.scene
        with torch.no_grad():
            centres, scales = scene.means - scene.centre, scene.log_scales.exp() * self.zoom
            values = (centres * self.zoom, scales, scene.colours(self.eye).clamp(0, 1), scene.opacities.sigmoid())
            centres, scales, colours, opacities = (value.cpu().numpy() for value in values)
            axes = self.rotation(scene.quaternions.cpu().double().numpy()).normalize().as_matrix() * scales[:, None]
        covariances = (axes @ axes.swapaxes(1, 2)).clip(-6e4, 6e4)  # float16 ends at 65504
        return centres, covariances, colours, opacities[:, None]

    def _frustum(self, i):
        """Add training camera i with its photograph; a click moves the page's camera there."""
        camera, photograph = self.scene.camera(i), to_uint8(self.scene.photograph(i, THUMB)[0]).cpu().numpy()
        wxyz, position = self._place(camera)
        frustum = self.server.scene.add_camera_frustum(
            f"/cameras/{i}", 2 * math.atan(camera.height / 2 / camera.lens[1]), camera.width / camera.height,
            scale=0.06 * HALF, thickness=0.003 * HALF, color=(120, 120, 120), image=photograph, format="jpeg",
            wxyz=wxyz, position=position, visible=self.frusta.value)

        @frustum.on_click
        def _(event):
            with event.client.atomic():
                event.client.camera.wxyz, event.client.camera.position = wxyz, position
        return frustum

    def _place(self, camera):
        """wxyz and position on the page of a Camera."""
        pose = camera.pose.double().numpy()
        return self.rotation.from_matrix(pose[:, :3] @ FLIP).wxyz, (pose[:, 3] - self.centre) * self.zoom

    def _camera(self, at, height):
        """The Camera of a page, see Page, for a picture of this height."""
        axes, fov, aspect = self.rotation(np.array(at[:4])).as_matrix() @ FLIP, at[7], min(max(at[8], 0.25), 4)
        pose = np.concatenate((axes, (np.array(at[4:7]) / self.zoom + self.centre)[:, None]), 1)
        width, focal = round(height * aspect), height / 2 / math.tan(fov / 2)
        return Camera(torch.from_numpy(pose).float(), (focal, focal, width / 2, height / 2, *[0.0] * 6), width, height)


def _camera_of(client):
    """The camera of a page, see Page."""
    camera = client.camera
    return (*camera.wxyz, *camera.position, camera.fov, camera.image_width / max(camera.image_height, 1))


def _check_free(host, port):
    """Raise OSError if nothing can listen there."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as e:
        raise OSError(f"--view: cannot listen on {host}:{port}: {e.strerror}; --view PORT chooses another port") from e
