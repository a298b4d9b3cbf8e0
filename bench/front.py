"""`python -m bench front`: alignment with the prompt against preservation of the source, for each method.

PDS runs at several weights K of its identity term, with smooth and with free points, where K holds colours as much as
points, and once at its own settings, as SDS, DDS and other coefficients do. Writes front.png (the chart), front.csv
(its numbers) and along.png (one drawing at each K).
"""
import csv
import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import options
import run
from bench.edits import edit_row, options_of, pictures_of, place_of, read_edits, spread
from files.sheets import sheet
from files.writing import write
from image.figures import perceptual
from loop import parallel

IDENTITIES = (1, 0.5, 0.25, 0)
WHOLE = ("--colour-identity", "1")  # K weighs all of the term, as in the paper
PAPER = ("--smooth", "0", "--no-steady", "--opacities")  # free points, plain Adam
COLOURS = ("#d9480f", "#2f5fd0", "#2b8a3e", "#c2255c", "#0b7285", "#111111", "#862e9c", "#e8a008", "#7a5c3e")
FIGURES = ("PSNR", "SSIM", "log-odds", "named", "turn", "IoU")  # see bench/edits.py


def methods():
    """The chart's lines: {title: [(label, loss, flags)]}, one point for each label."""
    def series(*flags):
        return [(f"{k:g}", "pds", ["--identity", f"{k:g}", *flags]) for k in IDENTITIES]
    return {"PDS, smooth field, by K": series(*WHOLE), "PDS, free points, by K": series(*PAPER),
            "PDS, the default": [("", "pds", [])],
            "SDS": [("", "sds", [])], "DDS": [("", "dds", [])],
            "PDS, psi = 0 (consistent)": [("", "pds", ["--coefficients", "consistent"])],
            "DreamCatalyst": [("", "pds", ["--coefficients", "dreamcatalyst"])],
            "IDS": [("", "ids", [])], "SSD": [("", "ssd", [])]}


def front(args):
    """Edit every drawing of a list by every method in the folder --out; an edit that an earlier run made with the same
    settings is reused. With --seeds N every point is a mean over N seeds, with their standard deviation as a cross."""
    first = options.parse(args.run, strict=False)
    first.device = parallel.start(first.device)
    listed, prior, out = read_edits(args.list, ["svg"]), run.load_prior(first), args.out
    lpips, lines, along = perceptual(), {}, []
    for title, points in methods().items():
        for label, name, flags in points:
            rows = []
            for mode, file, source, target, folder in listed:
                place = out / folder / "-".join(filter(None, (title.split(",")[0].lower(), *flags))).replace("/", "")
                for seed in range(first.seed, first.seed + args.seeds):
                    own = options_of(mode, file, source, target, None, [*args.run, *flags, "--seed", str(seed)])
                    row = edit_row(prior, name, own, place_of(place, seed, first), lpips, None)
                    rows.append(row | {"seed": seed})
                if title.startswith("PDS, smooth") and folder == listed[0][-1]:
                    before, after = (pictures_of(place / f"{what}.png", mode) for what in ("source", "result"))
                    along += [("source", source, before)] * (not along) + [(f"K = {label}", target, after)]
            mean = {key: float(np.mean([row[key] for row in rows])) for key in FIGURES}
            off = {key: spread(rows, key) for key in FIGURES if args.seeds > 1}
            lines.setdefault(title, []).append((label, mean | {"read": sum(row["log-odds"] > 0 for row in rows)}, off))
            print(f"{title:<28} {label:>5} " + "  ".join(
                f"{k} {v:.3g}" + (f" +- {off[k]:.2g}" if off else "") for k, v in mean.items()), flush=True)
    write_front(lines, len(listed) * args.seeds, out)
    write(out / "along.png", sheet(along))
    print(f"done: {out / 'front.png'}")


def write_front(lines, count, out):
    """Write front.csv and front.png.

    lines: {title: [(label, means over `count` edits, their standard deviations over the seeds or {} for one seed)]}.
    """
    with io.StringIO(newline="") as text:
        writer = csv.writer(text, lineterminator="\n")
        several = any(off for points in lines.values() for *_, off in points)
        writer.writerow(["method", "K", *FIGURES[:3], "read", "edits", *FIGURES[3:],
                         *(f"{key} +-" for key in FIGURES if several)])
        for title, points in lines.items():
            for label, mean, off in points:
                values = [f"{number:.6g}" for number in (*(mean[key] for key in FIGURES), *off.values())]
                writer.writerow([title, label, *values[:3], mean["read"], count, *values[3:]])
        write(out / "front.csv", text.getvalue())
    axes = ("PSNR", "log-odds")
    write(out / "front.png", chart({title: [(label, *(mean[key] for key in axes), *(off.get(key, 0) for key in axes))
                                            for label, mean, off in points] for title, points in lines.items()}))


def chart(lines, width=900, height=560, scale=2):
    """lines {title: [(label, x, y, deviation of x, of y)]} -> a PIL picture: identity to the right, alignment up."""
    page = Image.new("RGB", (width * scale, height * scale), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14 * scale)
    xs, ys = ([point[axis] for points in lines.values() for point in points] for axis in (1, 2))
    (left, right), (low, high) = ((min(v) - 0.06 * (max(v) - min(v) + 1), max(v) + 0.06 * (max(v) - min(v) + 1))
                                  for v in (xs, ys))

    def place(x, y):
        return (scale * (70 + (x - left) / (right - left) * (width - 100)),
                scale * (height - 60 - (y - low) / (high - low) * (height - 90)))

    def text(at, what, colour="black", anchor="mm"):
        draw.text(at, what, fill=colour, font=font, anchor=anchor)
    for x in range(int(np.ceil(left)), int(right) + 1):
        draw.line([place(x, low), place(x, high)], fill="#eeeeee", width=scale)
        text((place(x, low)[0], scale * (height - 44)), f"{x}")
    for y in range(int(np.ceil(low / 5)) * 5, int(high) + 1, 5):
        draw.line([place(left, y), place(right, y)], fill="#eeeeee", width=scale)
        text((scale * 50, place(left, y)[1]), f"{y}")
    text((scale * width / 2, scale * (height - 18)), "identity: PSNR to the source, dB")
    text((scale * 12, scale * 14), "alignment: log-odds of target against source", anchor="lm")
    for number, ((title, points), colour) in enumerate(zip(lines.items(), COLOURS, strict=False)):
        places = [place(x, y) for _, x, y, *_ in points]
        for _, x, y, dx, dy in points:
            draw.line([place(x - dx, y), place(x + dx, y)], fill=colour, width=scale)
            draw.line([place(x, y - dy), place(x, y + dy)], fill=colour, width=scale)
        if len(places) > 1:
            draw.line(places, fill=colour, width=3 * scale)
        for (x, y), (label, *_) in zip(places, points, strict=False):
            draw.ellipse([x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale], fill=colour)
            text((x + 9 * scale, y - 9 * scale), label, colour, "lm")
        text((scale * (width - 260), scale * (44 + 20 * number)), title, colour, "lm")
    return page.resize((width, height), Image.LANCZOS)
