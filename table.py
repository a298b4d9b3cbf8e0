"""The table of `run.py --mode bench`: every edit of a list by every method, measured, and the pictures on one page.

    edits = read_edits(Path("examples/edits.txt"))
    make_table(edits, ["sds", "dds", "pds"], prior, maker, Path("out/edits"))

What it measures of an edit: how far it reads as the target (log-odds under the prior, CLIP), how near it stayed to the
source (PSNR, SSIM, LPIPS), seconds, memory. run.py hands over the `maker`, which makes the edits.
"""
import contextlib
import csv
import io
import json
import logging
import re
import resource
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import parallel
import pds
from edit import EDITABLE, EDITORS, MODES, SCENES, TITLES, prompts
from files import is_number, read_json
from pictures import frame_of, read_picture
from report import beside, memory_status, perceptual, psnr, sheet, to_tensor, write

Maker = namedtuple("Maker", "options complete settings fit edit")
Maker.__doc__ = """What makes the edits of the table, five functions:

    options(mode, file, source, target, fit) -> the options of one edit; `fit` begins the name of the file of a scene's fit
    complete(options, prior, name) -> the same with what the model and the method `name` decide
    settings(options, prior, name) -> everything that the result of completed options depends on, a dict for JSON
    fit(options): fit the scene and keep it in that file
    edit(prior, name, options, out): write the files of the edit to the folder `out`
"""

SIDE, THUMB, SCENE_THUMB = 256, 192, 160  # pixels a side: of what is measured, on a sheet, on the sheet of a scene
DECIMALS = {"log-odds": 2, "PSNR": 1, "SSIM": 3, "LPIPS": 3, "CLIP": 3, "dir": 3, "s": 1, "MB": 0}  # of the columns


# ---- the list -----------------------------------------------------------------------------------------

def read_edits(path, only=None):
    """A list of edits -> [(mode, file, source, target, folder)], the folder for its results.

    A line is `mode | file | source prompt | target prompt`, the file's path relative to the list; # begins a comment.
    only: keep the edits of these modes alone. Raises ValueError for the first wrong line, with its number, and where
    no edit is left.
    """
    found = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if not line.strip() or line.lstrip()[0] == "#":
            continue
        mode, file, source, target = parts if len(parts := [p.strip() for p in line.split("|")]) == 4 else [""] * 4
        place = path.parent / file
        folder = f"{mode}/{place.stem}-{re.sub(r'[^a-z0-9]+', '-', target.lower())}"
        wrong = ("need mode | file | source prompt | target prompt" if not (mode and file and source and target) else
                 f"mode {mode!r} is none of {', '.join(MODES)}" if mode not in MODES else
                 f"{place}: no such {'folder' if mode in SCENES else 'file'}"
                 if not (place.is_dir() if mode in SCENES else place.is_file()) else
                 f"its results would lie in {folder} with another edit's" if folder in (f for *_, f in found) else None)
        if wrong:
            raise ValueError(f"{path}, line {number}: {wrong}")
        found.append((mode, place, source, target, folder))
    found = [edit for edit in found if edit[0] in (only or MODES)]
    if not found:
        raise ValueError(f"{path}: no edit{' of mode ' + ', '.join(only) if only else ''} in it")
    return found


def names_of(mode, names):
    """The methods that a mode allows: the editors of pictures cannot work on a drawing."""
    return [name for name in names if mode in EDITABLE or name not in EDITORS]


# ---- the figures --------------------------------------------------------------------------------------

def pixels(picture, size=SIDE):
    """PIL picture -> [1,3,H,W] float64 in [0,1]; size: a Frame, or the pixels of the shorter side."""
    sides = frame_of(size).sides(*picture.size)
    return to_tensor(picture.convert("RGB").resize(sides, Image.LANCZOS))  # one of that size comes back as it is


def ssim(a, b):
    """Structural similarity of two pictures [1,3,H,W] in [0,1] (Wang et al. 2004), 1 where they are the same.

    A Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01 and K2 = 0.03; the mean over the three channels and all
    places where the whole window fits.
    """
    line = (-(torch.arange(11, dtype=a.dtype, device=a.device) - 5).square() / (2 * 1.5 ** 2)).exp()
    window, conv = (line / line.sum()).expand(3, 1, 1, 11), torch.nn.functional.conv2d

    def local(x):  # along the rows, then along the columns
        return conv(conv(x, window, groups=3), window.mT, groups=3)
    mean_a, mean_b, c1, c2 = local(a), local(b), 0.01 ** 2, 0.03 ** 2
    var_a, var_b, both = local(a * a) - mean_a ** 2, local(b * b) - mean_b ** 2, local(a * b) - mean_a * mean_b
    share = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))
    return share.mean().item()


@torch.no_grad()
def log_odds(prior, x0, y_tgt, y_src, noises=8):
    """log p(y_tgt | x0) - log p(y_src | x0) of a latent x0 [1,C,h,w] with the usual uniform weights in place of the
    bound's: the diffusion classifier (Li et al., arXiv 2303.16203). Above 0 the picture reads as the target.

    The mean of |noise - eps(x_t, y_src)|^2 - |noise - eps(x_t, y_tgt)|^2, sums over the latent at guidance 1, over
    the same pairs of noise and timestep (0.2 T to 0.9 T) for every picture: what they share cancels.
    """
    T, generator = len(prior.abar), torch.Generator().manual_seed(0)
    t = torch.linspace(0.2 * T, 0.9 * T, noises).round().long().to(x0.device)
    noise = torch.randn(noises, *x0.shape[1:], generator=generator).to(x0)
    many = x0.expand(noises, -1, -1, -1)
    guidance, prior.guidance = prior.guidance, 1.0
    eps_tgt, eps_src = pds.predict(prior, t, noise, (many, y_tgt), (many, y_src))
    prior.guidance = guidance
    return ((noise - eps_src).square() - (noise - eps_tgt).square()).sum((1, 2, 3)).mean().item()


class Clip:
    """A CLIP model loaded by transformers; name: a directory or hub id. Raises ValueError where there is none."""

    def __init__(self, name, device):
        from transformers import CLIPModel, CLIPProcessor
        quiet = logging.getLogger("huggingface_hub")
        level, _ = quiet.level, quiet.setLevel(logging.CRITICAL)
        try:
            model, info = CLIPModel.from_pretrained(name, output_loading_info=True)
            self.processor = CLIPProcessor.from_pretrained(name)
        except Exception as e:  # as in prior.py: the libraries below have an error each, all meaning the same
            where = "damaged, or no CLIP" if Path(name).exists() else "no such directory, and no CLIP on the hub"
            raise ValueError(f"{name}: {where}: {(str(e).strip() or type(e).__name__).splitlines()[0][:200]}") from e
        finally:
            quiet.setLevel(level)
        if info["missing_keys"]:  # transformers would go on with random weights
            raise ValueError(f"{name}: damaged, or no CLIP: {len(info['missing_keys'])} of its weights are missing")
        self.name, self.device, self.model = name, device, model.eval().to(device)

    @torch.no_grad()
    def scores(self, before, after, source, target):
        """CLIP score and directional score of an edit, means over its pictures; before, after: lists of PIL pictures.

        The first is the cosine of the picture after and the target; the second that of the two changes, after - before
        and target - source (Gal et al., StyleGAN-NADA, arXiv 2108.00946), all embeddings normalised.
        """
        inputs = self.processor(text=[source, target], images=[*before, *after], return_tensors="pt", padding=True,
                                truncation=True)
        out, cosine = self.model(**inputs.to(self.device)), torch.nn.functional.cosine_similarity
        was, now = out.image_embeds.chunk(2)
        y_src, y_tgt = out.text_embeds.chunk(2)
        return cosine(now, y_tgt).mean().item(), cosine(now - was, y_tgt - y_src).mean().item()


def figures(prior, before, after, args, lpips=None, clip=None):
    """The figures of an edit, {column: figure}; before, after: lists of PIL pictures, over which the mean is taken; args:
    its completed options."""
    y_src, y_tgt = map(prior.embed, prompts(args))

    def odds(picture):
        with torch.no_grad():
            return log_odds(prior, prior.encode(pixels(picture, args.frame)), y_tgt, y_src)
    pairs = [(pixels(a), pixels(b)) for a, b in zip(before, after)]
    row = {"before": np.mean([odds(p) for p in before]), "log-odds": np.mean([odds(p) for p in after]),
           "PSNR": np.mean([psnr(a, b) for a, b in pairs]), "SSIM": np.mean([ssim(a, b) for a, b in pairs])}
    if lpips:
        row["LPIPS"] = np.mean([lpips(a, b).item() for a, b in pairs])
    if clip:
        row["CLIP"], row["dir"] = clip.scores(before, after, args.source, args.target)
        row["clip"] = clip.name
    return {k: v if k == "clip" else float(v) for k, v in row.items()}


def restart_peak(device):
    """Reset the peak of memory, where that can be done: on a CUDA device and on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device):
    """Peak memory in MB since restart_peak: of the CUDA device, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    if Path("/proc/self/status").exists():
        return memory_status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


# ---- the table ----------------------------------------------------------------------------------------

def make_table(edits, names, prior, maker, out, clip=None):
    """Make every edit by every method and write table.csv and a sheet for each mode to the folder `out`. Of several
    processes each makes its share of the edits, and the first one writes the table.

    An edit that is there already from the same settings is not made again.

    Args:
        edits: what read_edits returns.
        names: the methods, keys of edit.TITLES.
        clip: a CLIP directory or hub id, None: without its columns.
    Raises:
        ValueError, OSError: bad input. FloatingPointError: a loss is no longer finite; it names the edit.
    """
    clip, lpips, rows = Clip(clip, prior.device) if clip else None, perceptual(), []
    for mode, file, source, target, folder in edits[parallel.rank()::parallel.world()]:
        fit = (out / folder).parent / f"{file.stem}-{mode}"
        options = maker.options(mode, file, source, target, fit)
        for name in names_of(mode, names):
            try:
                with parallel.alone():
                    row = edit_row(prior, name, options, maker, out / folder / name, lpips, clip)
            except FloatingPointError as e:
                raise FloatingPointError(f"{folder}: {e}") from e
            rows.append({"mode": mode, "file": file.name, "source": source, "target": target, "loss": name,
                         "folder": folder} | row)
    folders = [folder for *_, folder in edits]
    rows = sorted(parallel.gathered(rows), key=lambda row: folders.index(row["folder"]))
    if parallel.rank():
        return
    columns = [c for c in DECIMALS if c not in ("LPIPS", "CLIP", "dir") or (lpips if c == "LPIPS" else clip)]
    print_edits(rows, columns)
    with io.StringIO(newline="") as text:
        header = ["mode", "file", "source", "target", "loss", "before", *columns]
        writer = csv.DictWriter(text, header, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        write(out / "table.csv", text.getvalue())
    for mode in dict.fromkeys(row["mode"] for row in rows):
        write(out / f"{mode}.png", edits_sheet([row for row in rows if row["mode"] == mode], out))
        print(f"done: {out / f'{mode}.png'}")


def edit_row(prior, name, options, maker, out, lpips, clip):
    """The figures of one edit, {column: figure}; it is made in `out`, unless the same settings made it there before."""
    whole = maker.complete(options, prior, name)
    config = json.loads(json.dumps(maker.settings(whole, prior, name)))
    done, row = out / "config.json", {}
    if (out / "row.json").exists() and done.exists():
        old = read_json(done, hint="; delete it to make the edit anew")
        alike = {"versions", "threads", "fit"} | ({"points"} if config["points"] is None else set())  # make none another
        same = all(old.get(k) == config.get(k) for k in old.keys() | config.keys() if k not in alike)
        row = read_row(out / "row.json") if same else {}
    if not row:
        (out / "row.json").unlink(missing_ok=True)  # an interruption must not leave the figures of another run here
        if options.mode in SCENES:
            maker.fit(options)  # kept in options.fit, so that its seconds are not the edit's
        print(out)
        restart_peak(prior.device)
        started = time.perf_counter()
        maker.edit(prior, name, options, out)
        row = {"s": time.perf_counter() - started, "MB": peak(prior.device)}
    lacking = "before" not in row or lpips and "LPIPS" not in row or clip and row.get("clip") != clip.name
    if lacking:
        before, after = (pictures_of(out / file, options.mode) for file in ("source.png", "result.png"))
        row |= figures(prior, before, after, whole, lpips, clip)
        write(out / "row.json", json.dumps(row, indent=1) + "\n")
    return row


def read_row(path):
    """The figures that edit_row has written; raises ValueError, one line, where they are no figures of an edit."""
    hint = "; delete it to make the edit anew"
    row = read_json(path, hint=hint)
    wanted = {"s", "MB", "before", "log-odds", "PSNR", "SSIM"}
    wrong = wanted - row.keys() or {key for key, value in row.items() if key != "clip" and not is_number(value)}
    if wrong:
        raise ValueError(f"{path}: no figures of an edit: {', '.join(sorted(wrong))} missing or wrong{hint}")
    return row


def pictures_of(path, mode):
    """The picture of an edit in a file, on white; of a scene the squares that stand side by side. Raises ValueError."""
    page = read_picture(path, downscale=1, upright=False).convert("RGBA")
    page = Image.alpha_composite(Image.new("RGBA", page.size, "white"), page).convert("RGB")
    if mode not in SCENES:
        return [page]
    return [page.crop((x, 0, x + page.height, page.height)) for x in range(0, page.width, page.height)]


def print_edits(rows, columns):
    """Print the means over the edits of each mode, a line for each method; above them the log-odds of the sources."""
    first = f"{'mode':<6} {'loss':<7} {'edits':>5} {'log-odds':>9} {'read':>6}"
    print("\n" + first + "".join(f" {c:>7}" for c in columns[1:]))
    for mode in dict.fromkeys(row["mode"] for row in rows):
        own = [row for row in rows if row["mode"] == mode]
        for loss in ["source", *dict.fromkeys(row["loss"] for row in own)]:
            group = [row for row in own if row["loss"] == (own[0]["loss"] if loss == "source" else loss)]
            odds = [row["before" if loss == "source" else "log-odds"] for row in group]
            rest = "" if loss == "source" else "".join(
                f" {np.mean([row[c] for row in group]):>7.{DECIMALS[c]}f}" for c in columns[1:])
            read = f"{sum(x > 0 for x in odds)}/{len(odds)}"
            print(f"{mode:<6} {loss:<7} {len(group):>5} {np.mean(odds):>9.2f} {read:>6}{rest}")


def edits_sheet(rows, out):
    """One page of the edits of a mode: the source and each method side by side; of scenes, one under another."""
    pages, mode = [], rows[0]["mode"]
    scenes = mode in SCENES
    size = SCENE_THUMB if scenes else THUMB
    for folder in dict.fromkeys(row["folder"] for row in rows):
        own = [row for row in rows if row["folder"] == folder]
        files = [out / folder / own[0]["loss"] / "source.png"] + [out / folder / r["loss"] / "result.png" for r in own]
        pictures = [[ImageOps.pad(p, (size, size), Image.LANCZOS, "white") for p in pictures_of(file, mode)]
                    for file in files]
        names = ["source"] + [TITLES[row["loss"]] for row in own]
        prompts = [own[0]["source"]] + [own[0]["target"]] * len(own)
        pages.append([*zip(names, prompts, pictures)] if scenes else
                     (" ", f"{prompts[0]}: {', '.join(names[1:])} to {prompts[1]}", [p for p, in pictures]))
    if scenes:
        return beside([sheet(page) for page in pages])
    if len(pages) > 1 and len(pages) % 2:
        pages.append((" ", "", [Image.new("RGB", (size, size), "white")] * len(pages[0][2])))
    half = -(-len(pages) // 2)
    return beside([sheet(part) for part in (pages[:half], pages[half:]) if part])
