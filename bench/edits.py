"""The table of `run.py --mode bench`: every edit of a list by every method, measured, and the pictures on one page.

    edits = read_edits(Path("examples/edits.txt"))
    make_table(edits, ["sds", "dds", "pds"], prior, maker, Path("out/edits"))

What it measures of an edit: how far it reads as the target (log-odds under the prior, CLIP), how near it stayed to the
source (PSNR, SSIM, LPIPS), seconds, memory. run.py hands over the `maker`, which makes the edits.
"""
import csv
import io
import json
import re
import time
from collections import namedtuple

import numpy as np
from PIL import Image, ImageOps

from bench.figures import SCENE_THUMB, THUMB, Clip, figures, peak, restart_peak
from edit import EDITABLE, EDITORS, MODES, SCENES, TITLES, prompts
from files.pictures import read_picture
from files.reading import is_number, read_json
from files.sheets import beside, sheet
from files.writing import write
from image.figures import perceptual
from loop import parallel

Maker = namedtuple("Maker", "options complete settings fit edit")
Maker.__doc__ = """What makes the edits of the table, five functions:

    options(mode, file, source, target, fit) -> the options of one edit; `fit` begins the name of the file of a scene's fit
    complete(options, prior, name) -> the same with what the model and the method `name` decide
    settings(options, prior, name) -> everything that the result of completed options depends on, a dict for JSON
    fit(options): fit the scene and keep it in that file
    edit(prior, name, options, out): write the files of the edit to the folder `out`
"""
DECIMALS = {"log-odds": 2, "PSNR": 1, "SSIM": 3, "LPIPS": 3, "CLIP": 3, "dir": 3, "s": 1, "MB": 0}  # of the columns


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
