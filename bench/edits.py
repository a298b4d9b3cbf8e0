"""`python -m bench edits`: every edit of a list by every method, in one table, with a sheet of pictures for each mode.

    python -m bench edits --list examples/edits.txt --compare sds dds pds --modes svg image [options of run.py]

An edit is measured by how well it reads as the target and how close it stays to the source, by its seconds and its
memory. Reading: the log-odds of the prior that made it; by the judge, which shares no weights with it, whether the
target is among its top 5 (`named`) and the cosine between the changes of pictures and captions (`turn`); with --clip,
CLIP's scores. Identity: PSNR, SSIM, the IoU of the silhouettes, and LPIPS if it is installed. Each mode runs with the
model's own settings unless an option says otherwise. --seeds N makes every edit from N seeds and prints, below each
mean, the standard deviation of the means of the seeds.
"""
import csv
import io
import json
import math
import re
import time

import numpy as np
from PIL import Image, ImageOps

import options
import run
from bench.figures import SCENE_THUMB, THUMB, Clip, figures, peak, restart_peak
from edit import COMPARED, EDITABLE, MODES, SCENES
from files.page import edits_page
from files.pictures import read_picture
from files.reading import is_number, read_json
from files.sheets import beside, sheet, thumbnail
from files.writing import write
from image.editors import EDITORS, TITLES
from image.figures import perceptual
from loop import parallel

DECIMALS = {"log-odds": 2, "named": 2, "turn": 3, "PSNR": 1, "SSIM": 3, "IoU": 3, "LPIPS": 3, "CLIP": 3, "dir": 3,
            "s": 1, "MB": 0}  # of the columns


def read_edits(path, only=None):
    """The edits in a list: [(mode, file, source, target, folder)], where folder is for the results.

    A line reads `mode | file | source prompt | target prompt`, with the path relative to the list; # starts a comment.
    only: keep these modes. Raises ValueError for the first wrong line, with its number, and if no edit is left.
    """
    found = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if not line.strip() or line.lstrip()[0] == "#":
            continue
        mode, file, source, target = parts if len(parts := [p.strip() for p in line.split("|")]) == 4 else [""] * 4
        place = path.parent / file
        folder = f"{mode}/{place.stem}-{re.sub(r'[^a-z0-9]+', '-', target.lower())}"
        wrong = ("need mode | file | source prompt | target prompt" if not (mode and file and source and target) else
                 f"mode {mode!r} is not one of {', '.join(MODES)}" if mode not in MODES else
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
    """The methods that a mode allows: editors of pictures cannot edit a drawing."""
    return [name for name in names if mode in EDITABLE or name not in EDITORS]


def edits(args):
    """Make every edit by every method and write table.csv and a sheet for each mode to the folder --out.

    Several processes of torchrun share the edits, and the first one writes the table. An edit that an earlier run made
    with the same settings is reused.

    Raises:
        ValueError, OSError: bad input. FloatingPointError: a loss is no longer finite; the message names the edit.
    """
    first = options.parse(args.run, strict=False)
    first.device = parallel.start(first.device)
    listed, prior, out = read_edits(args.list, args.modes), run.load_prior(first), args.out
    clip, lpips, rows = Clip(args.clip, prior.device) if args.clip else None, perceptual(), []
    for mode, file, source, target, folder in listed[parallel.rank()::parallel.world()]:
        own = options_of(mode, file, source, target, (out / folder).parent / f"{file.stem}-{mode}", args.run)
        own.device = first.device
        for name in names_of(mode, dict.fromkeys(args.compare or COMPARED)):
            for own.seed in range(first.seed, first.seed + args.seeds):
                try:
                    with parallel.alone():
                        row = edit_row(prior, name, own, place_of(out / folder / name, own.seed, first), lpips, clip)
                except FloatingPointError as e:
                    raise FloatingPointError(f"{folder}: {e}") from e
                rows.append({"mode": mode, "file": file.name, "source": source, "target": target, "loss": name,
                             "folder": folder, "seed": own.seed} | row)
    folders = [folder for *_, folder in listed]
    rows = sorted(parallel.gathered(rows), key=lambda row: folders.index(row["folder"]))
    if parallel.rank() == 0:
        columns = [c for c in DECIMALS if c not in ("LPIPS", "CLIP", "dir") or (lpips if c == "LPIPS" else clip)]
        write_table(rows, columns, out)


def place_of(folder, seed, first):
    """The folder of an edit: the method's for the seed in the options `first`, one next to it for each further seed."""
    return folder if seed == first.seed else folder.with_name(f"{folder.name}-seed{seed}")


def spread(rows, column):
    """The standard deviation over the seeds of the mean of a column of rows; NaN for a single seed."""
    means = [np.mean([row[column] for row in rows if row["seed"] == seed]) for seed in {row["seed"] for row in rows}]
    return float(np.std(means, ddof=1)) if len(means) > 1 else math.nan


def options_of(mode, file, source, target, fit, flags):
    """The options of one edit of a list; fit: the start of the name of the file that keeps a scene's fit."""
    flag = next(flag for flag, means in options.INPUTS.items() if means == mode or mode == "splat" and flag == "scene")
    own = options.parse(["--mode", mode, f"--{flag}", str(file), "--source", source, "--target", target, *flags],
                        strict=False)
    own.fit = fit
    return own


def write_table(rows, columns, out):
    """Print the means, and write table.csv and the sheets of all modes to the folder `out`."""
    print_edits(rows, columns)
    with io.StringIO(newline="") as text:
        several = len({row["seed"] for row in rows}) > 1
        header = ["mode", "file", "source", "target", "loss", *["seed"] * several, "before", *columns]
        writer = csv.DictWriter(text, header, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        write(out / "table.csv", text.getvalue())
    write(out / "index.html", page_of([row for row in rows if row["seed"] == rows[0]["seed"]], columns, out))
    print(f"done: {out / 'index.html'}")
    for mode in dict.fromkeys(row["mode"] for row in rows):
        shown = [row for row in rows if (row["mode"], row["seed"]) == (mode, rows[0]["seed"])]
        write(out / f"{mode}.png", edits_sheet(shown, out))
        print(f"done: {out / f'{mode}.png'}")


def page_of(rows, columns, out):
    """index.html of the edits in the folder `out`, a str: a line per edit, a column per method, see files/page.py."""
    def values(some):
        return {column: f"{np.mean([row[column] for row in some]):.{DECIMALS[column]}f}" for column in columns}

    def first(folder, row, file):  # of a scene's sides
        return thumbnail(pictures_of(out / folder / row["loss"] / file, row["mode"])[0], THUMB)
    lines, names = [], dict.fromkeys(row["loss"] for row in rows)
    for folder in dict.fromkeys(row["folder"] for row in rows):
        own = [row for row in rows if row["folder"] == folder]
        cells = {TITLES[row["loss"]]: (f"{folder}/{row['loss']}/index.html", first(folder, row, "result.png"),
                                       values([row])) for row in own}
        lines.append((own[0]["source"], own[0]["target"], first(folder, own[0], "source.png"), cells))
    means = {TITLES[name]: values([row for row in rows if row["loss"] == name]) for name in names}
    return edits_page(f"{len(lines)} edit{'s' * (len(lines) > 1)} by {', '.join(means)}", lines, means)


def edit_row(prior, name, args, out, lpips, clip):
    """The figures of one edit, {column: figure}; it is made in `out` unless the same settings made it there before."""
    whole = options.complete(args, prior, name)
    config = json.loads(json.dumps(options.settings(whole, prior, name)))
    done, row = out / "config.json", {}
    if (out / "row.json").exists() and done.exists():
        old = read_json(done, hint="; delete it to repeat the edit")
        alike = {"versions", "threads", "fit"} | ({"points"} if config["points"] is None else set())  # may differ
        same = all(old.get(k) == config.get(k) for k in old.keys() | config.keys() if k not in alike)
        row = read_row(out / "row.json") if same else {}
    if not row:
        (out / "row.json").unlink(missing_ok=True)  # an interruption must not leave another run's figures here
        if args.mode in SCENES:
            run.fit(args)  # kept in args.fit, so that its seconds are not counted as the edit's
        print(out)
        restart_peak(prior.device)
        started = time.perf_counter()
        run.run_one(prior, name, args, out)
        row = {"s": time.perf_counter() - started, "MB": peak(prior.device)}
    lacking = "named" not in row or lpips and "LPIPS" not in row or clip and row.get("clip") != clip.name
    if lacking:
        before, after = (pictures_of(out / file, args.mode) for file in ("source.png", "result.png"))
        row |= figures(prior, before, after, whole, lpips, clip)
        write(out / "row.json", json.dumps(row, indent=1) + "\n")
    return row


def read_row(path):
    """The figures that edit_row has written; raises ValueError if the file holds anything else."""
    hint = "; delete it to make the edit anew"
    row = read_json(path, hint=hint)
    wanted = {"s", "MB", "before", "log-odds", "PSNR", "SSIM"}
    wrong = wanted - row.keys() or {key for key, value in row.items() if key != "clip" and not is_number(value)}
    if wrong:
        raise ValueError(f"{path}: no figures of an edit: {', '.join(sorted(wrong))} missing or wrong{hint}")
    return row


def pictures_of(path, mode):
    """The pictures in an edit's file, on white: one, or the squares side by side of a scene. Raises ValueError."""
    page = read_picture(path, downscale=1, upright=False).convert("RGBA")
    page = Image.alpha_composite(Image.new("RGBA", page.size, "white"), page).convert("RGB")
    if mode not in SCENES:
        return [page]
    return [page.crop((x, 0, x + page.height, page.height)) for x in range(0, page.width, page.height)]


def print_edits(rows, columns):
    """Print the means over the edits of each mode, a line per method; above them the log-odds of the sources."""
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
            if loss != "source" and len({row["seed"] for row in group}) > 1:
                rest = "".join(f" {spread(group, c):>7.{DECIMALS[c]}f}" for c in columns[1:])
                print(f"{'':<6} {'+-':<7} {'':>5} {spread(group, 'log-odds'):>9.2f} {'':>6}{rest}")


def edits_sheet(rows, out):
    """One page with the edits of a mode: the source and each method side by side, or one above the other for scenes."""
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
        pages.append([*zip(names, prompts, pictures, strict=False)] if scenes else
                     (" ", f"{prompts[0]}: {', '.join(names[1:])} to {prompts[1]}", [p for p, in pictures]))
    if scenes:
        return beside([sheet(page) for page in pages])
    if len(pages) > 1 and len(pages) % 2:
        pages.append((" ", "", [Image.new("RGB", (size, size), "white")] * len(pages[0][2])))
    half = -(-len(pages) // 2)
    return beside([sheet(part) for part in (pages[:half], pages[half:]) if part])
