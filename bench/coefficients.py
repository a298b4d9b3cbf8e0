"""`python -m bench coefficients`: psi(t) and chi(t) of Stable Diffusion's schedule and of flow matching, as a chart."""
import math

import torch
from PIL import Image, ImageDraw, ImageFont

from files.writing import write
from pds import pds_coefficients
from pipelines.flow import Flow, sigmas_of
from pipelines.networks import STABLE_DIFFUSION_ABAR

SCHEDULES = (("Stable Diffusion", STABLE_DIFFUSION_ABAR, "#d9480f"),
             ("flow, no shift", Flow(sigmas_of()).abar, "#2f5fd0"),
             ("flow, shift 3 (SD3)", Flow(sigmas_of(shift=3.0)).abar, "#2b8a3e"))
WIDE, HIGH, SCALE, LOW, TOP = 900, 380, 2, 1e-3, 20.0  # pixels, supersampling, ends of the logarithmic axis


def coefficients(args):
    """Write the chart to args.out and print the values at a few timesteps."""
    page = Image.new("RGB", (WIDE * SCALE, HIGH * SCALE), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14 * SCALE)

    def place(panel, t, value):
        share = math.log(value / LOW) / math.log(TOP / LOW)
        return SCALE * (60 + 440 * panel + t / 1000 * 370), SCALE * (HIGH - 50 - share * (HIGH - 90))

    def text(at, what, colour="black", anchor="mm"):
        draw.text(at, what, fill=colour, font=font, anchor=anchor)

    for panel, name in enumerate(("psi(t): the pull back to the source", "chi(t): the push along the prompts")):
        for value in (1e-3, 1e-2, 1e-1, 1, 10):
            draw.line([place(panel, 0, value), place(panel, 1000, value)], fill="#dddddd", width=SCALE)
            text((place(panel, 0, value)[0] - 6 * SCALE, place(panel, 0, value)[1]), f"{value:g}", anchor="rm")
        for t in range(0, 1001, 200):
            text((place(panel, t, LOW)[0], SCALE * (HIGH - 34)), f"{t}")
        text((place(panel, 500, LOW)[0], SCALE * (HIGH - 12)), "timestep t")
        text((place(panel, 500, LOW)[0], SCALE * 16), name)
    for row, (title, abar, colour) in enumerate(SCHEDULES):
        t = torch.arange(20, 981, 2)
        for panel, values in enumerate(pds_coefficients(abar, t, t - 2)):
            points = [place(panel, *point) for point in zip(t.tolist(), values.tolist(), strict=True)]
            draw.line(points, fill=colour, width=3 * SCALE)
        text((SCALE * 330, SCALE * (48 + 20 * row)), title, colour, "lm")
        some = pds_coefficients(abar, torch.tensor([20, 100, 500, 980]), torch.tensor([18, 98, 498, 978]))
        print(f"{title:<20} at t = 20, 100, 500, 980: "
              + "; ".join(f"{name} {', '.join(f'{v:.2g}' for v in values)}" for name, values in
                          zip(("psi", "chi"), (c.tolist() for c in some), strict=True)))
    write(args.out, page.resize((WIDE, HIGH), Image.LANCZOS))
