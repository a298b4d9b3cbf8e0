r"""Train the embedded prior: a small text-to-image latent diffusion model on openly licensed emoji.

    npm install --prefix /tmp/icons @iconify-json/noto @iconify-json/twemoji @iconify-json/fluent-emoji \
        @iconify-json/fluent-emoji-flat @iconify-json/fxemoji @iconify-json/streamline-emojis \
        @iconify-json/emojione @iconify-json/noto-v1 @lobehub/fluent-emoji-3d emojilib
    pip install resvg_py
    python models/emoji/train.py --icons /tmp/icons/node_modules/@iconify-json

Renders the icons, trains the autoencoder, then the UNet together with its text encoder, writes a Stable Diffusion
pipeline next to this file, and draws samples.png with it. Every stage resumes from --work; --start DIR continues from
an existing pipeline; --stage instruct makes an InstructPix2Pix of it. The learning rate follows the minutes spent, so
the same command suits any machine.
"""
import argparse
import copy
import io
import json
import math
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import resvg_py
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

HERE = Path(__file__).resolve().parent
FULL = ["noto", "twemoji", "fluent-emoji-flat", "fluent-emoji"]  # their names are the vocabulary
SPELLED = ["fxemoji", "streamline-emojis"]  # cover part of it, with their own spellings
RENDERED = "fluent-emoji-3d"  # raster pictures, named by code points
TRAIN = [*FULL, *SPELLED, RENDERED]
HELD_OUT = ["emojione", "noto-v1"]  # never trained on; the styles of the example drawings
SIZE, RENDER, TOKENS = 64, 128, 20
# The colours of paints in emoji: first the vivid form, then another one that the sets use.
PAINTS = {"red": ["#e5302d", "#dd2e44"], "orange": ["#f7851b", "#f4900c"], "yellow": ["#ffcd2b", "#fdcb58"],
          "green": ["#3ea63a", "#78b159"], "blue": ["#2c7be0", "#55acee"], "purple": ["#8b42c8", "#aa8ed6"],
          "pink": ["#f88ac0", "#f4a3bb"], "brown": ["#85512e", "#795548"], "white": ["#f2f2f3", "#e6e7e8"],
          "grey": ["#969ca3", "#99aab5"], "black": ["#2f3136", "#3c4043"]}
OFTEN = {"brown": 4, "orange": 1.5, "red": 1.5}  # how much more frequent recoloured drawings of hard colours are
COLOURS = {*PAINTS, "gray", "golden", "gold", "silver", "light", "dark", "blond"}
# The nouns of captions.txt that imply their natural colour: "fox" implies orange, "umbrella" no colour.
GROWN = set("""
    ant, apple, avocado, baby chick, badger, banana, bat, bear, beaver, beetle, bell pepper, bird, bison,
    blossom, blowfish, blueberries, bouquet, broccoli, bug, butterfly, cactus, camel, carrot, cat, cat face,
    cherries, cherry blossom, chicken, chipmunk, clover, cow, cow face, crab, cricket, crocodile, cucumber,
    deer, dog, dog face, dolphin, donkey, dove, dragon, dragon face, duck, eagle, egg, eggplant, elephant, ewe,
    fish, flamingo, flower, fox, frog, goat, goose, gorilla, grapes, hamster, hedgehog, herb, hibiscus,
    hippopotamus, honeybee, horse, horse face, hot pepper, hyacinth, jellyfish, kangaroo, koala, lady beetle,
    leaf, lemon, lime, lion, lizard, llama, lobster, lotus, mammoth, mango, melon, monkey, monkey face, moose,
    mosquito, mouse, mouse face, mushroom, octopus, olive, onion, orca, otter, owl, ox, palm tree, parrot,
    peach, peacock, pear, pig, pig face, pineapple, poodle, potato, potted plant, rabbit, rabbit face, raccoon,
    ram, rat, rhinoceros, rooster, rose, sauropod, scorpion, seal, seedling, shamrock, shark, shrimp, skunk,
    sloth, snail, snake, spider, spouting whale, squid, strawberry, sunflower, swan, t rex, tangerine, tomato,
    tree, tropical fish, tulip, turkey, turtle, two hump camel, unicorn, water buffalo, whale, wolf, worm
    """.strip().replace(",\n   ", ",").split(", "))
# The names whose light parts are meant to be white, which sets shade in grey, blue or lilac.
PALE = set("""
    polar bear, panda, ghost, snowman, snowman without snow, dove, swan, goose, ewe, goat, rabbit, rabbit face, egg,
    cloud, tooth, bone, skull, skull and crossbones, unicorn, soccer ball, volleyball, baseball, lab coat, toilet,
    roll of paper, page facing up, rice ball, cooked rice, glass of milk, bathtub, martial arts uniform, white heart,
    white flower, llama, teacup without handle, running shirt, moon cake
    """.strip().replace(",\n   ", ",").split(", "))
PALE_OFTEN = 12  # how much more frequent they are than other names
WHITE = 0.975  # their lightness in OKLab
HANDED = re.compile("left|right|clock|thirty|letter|digit|keycap|button|input|symbol|sign|mark|moon|note|music|arrow|"
                    "[0-9]")  # drawings whose mirror images would be wrong


# ---- data ---------------------------------------------------------------------------------------------

NOT_WANTED = re.compile(r"flag-(?!in-hole)|.*skin-tone|.*-tone\d|.*-(medium-)?(light|dark)$|.*-medium$")


def write_vocabulary(icons):
    """Write captions.txt: every name of the training sets except flags and skin tones, with its synonyms.

    Synonyms are the sets' aliases and up to three keywords of emojilib that at most two emoji share; existing
    entries of the file are kept.
    """
    sheets = [json.loads(source(icons, s).read_text()) for s in FULL]
    counts = Counter(n for sheet in sheets for n in {*sheet["icons"], *sheet.get("aliases", {})})
    names = {n for sheet in sheets for n in sheet["icons"] if counts[n] == len(FULL) or not NOT_WANTED.match(n)}
    names = {n for n in names if not re.match("flag-(?!in-hole)|unknown-flag", n)}
    synonyms = {n: vocabulary().get(n, [n.replace("-", " ")])[1:] for n in names}
    for sheet in sheets:
        for alias, entry in sheet.get("aliases", {}).items():
            if entry["parent"] in names and alias not in names and not NOT_WANTED.match(alias):
                synonyms[entry["parent"]].append(alias.replace("-", " "))
    keywords = json.loads(source(icons, "emojilib").read_text())
    owners = Counter(k for words in keywords.values() for k in words)
    for style in ("noto", "twemoji"):
        for code, name in json.loads((Path(icons) / style / "chars.json").read_text()).items():
            words = keywords.get("".join(chr(int(c, 16)) for c in code.split("-")), [])
            words = [w.replace("_", " ").replace("-", " ").lower() for w in words
                     if owners[w] <= 2 and re.fullmatch("[A-Za-z][A-Za-z_ -]{3,}", w) and w not in names]
            synonyms.get(name, []).extend(words[:3])
    lines = ["# The vocabulary of the embedded prior: icon names of the training sets, synonyms after |.",
             "# COLOUR is one of " + " ".join(PAINTS)]
    for name in sorted(names):
        own = name.replace("-", " ")
        coloured = [w for w in synonyms[name] if "COLOUR" in w]
        plain = [own, *(w for w in synonyms[name] if w != own and w not in coloured)]
        lines.append(" | ".join([*list(dict.fromkeys(plain))[:6], *coloured]))
    (HERE / "captions.txt").write_text("\n".join(lines) + "\n")


def vocabulary():
    """captions.txt as {icon name: [caption, synonym, ...]}; a synonym "COLOUR noun" asks for recoloured drawings."""
    lines = [line.split("|") for line in (HERE / "captions.txt").read_text().splitlines() if line[:1] not in "#"]
    return {names[0].strip().replace(" ", "-"): [n.strip() for n in names] for names in lines}


def compact(name):
    """A name without the separators that sets use differently: "alarm-clock" becomes "alarmclock"."""
    return re.sub("[^a-z0-9]", "", name)


def hour(name):
    """ "clock8thirty" -> "eightthirty"; other names are unchanged."""
    hours = "one two three four five six seven eight nine ten eleven twelve".split()
    found = re.fullmatch(r"clock(1[0-2]|[1-9])(oclock|thirty)", name)
    return hours[int(found[1]) - 1] + found[2] if found else name


def source(icons, name):
    """The path in a package that npm installed with the sets of `icons`: its folder of pictures, or its file."""
    modules = Path(icons).parent
    return {RENDERED: modules / "@lobehub" / RENDERED / "assets",
            "emojilib": modules / "emojilib/dist/emoji-en-US.json"}.get(name, Path(icons) / name / "icons.json")


def open_pictures(icons):
    """The renders of RENDERED that are in the vocabulary: names, RGBA uint8 [4,128,128] each."""
    vocab = vocabulary()
    def bare(code):
        return code.replace("-fe0f", "")  # a variation selector, which sets use inconsistently
    names = {bare(code): name for style in ("twemoji", "noto")
             for code, name in json.loads((Path(icons) / style / "chars.json").read_text()).items()}
    files = {names.get(bare(f.stem)): f for f in sorted(source(icons, RENDERED).glob("*.webp"))}
    kept = [name for name in files if name in vocab]
    return kept, [np.asarray(Image.open(files[name]).convert("RGBA").resize((RENDER, RENDER), Image.LANCZOS))
                  .transpose(2, 0, 1) for name in kept]


def draw_icons(icons, style):
    """The drawings of one set that are in the vocabulary: names, RGBA uint8 [4,128,128] each."""
    sheet, vocab = json.loads(source(icons, style).read_text()), vocabulary()
    spelling = {compact(c): n for n in reversed(vocab) for c in reversed(vocab[n])}
    kept, pictures = [], []
    for name in {**sheet["icons"], **sheet.get("aliases", {})}:
        icon = sheet["icons"].get(name) or sheet["icons"].get(sheet["aliases"][name]["parent"])
        if style in SPELLED:  # "alarmclock", "baby-2", "winking", "clock8thirty"
            guesses = compact(name), compact(name.rstrip("0123456789")), compact(name) + "face", hour(name)
            name = next((spelling[g] for g in guesses if g in spelling), None)
        if icon is None or name not in vocab:
            continue
        w, h = icon.get("width", sheet.get("width", 16)), icon.get("height", sheet.get("height", 16))
        svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
               f'viewBox="0 0 {w} {h}" width="{RENDER}" height="{RENDER}">{icon["body"]}</svg>')
        png = resvg_py.svg_to_bytes(svg_string=svg)
        picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        if picture.size == (RENDER, RENDER):
            kept.append(name)
            pictures.append(np.asarray(picture).transpose(2, 0, 1))
    return kept, pictures


def render_icons(icons, style, work):
    """The pictures of one set that are in the vocabulary: names [N], RGBA uint8 [N,4,128,128]; cached in work."""
    cache = work / f"{style}.npz"
    if not cache.exists():
        kept, pictures = open_pictures(icons) if style == RENDERED else draw_icons(icons, style)
        np.savez_compressed(cache, names=np.array(kept), pictures=np.stack(pictures))
    data = np.load(cache)
    return data["names"].tolist(), torch.from_numpy(data["pictures"])


def restyle(rgb, alpha, rng):
    """Premultiplied RGB [B,3,H,W] and alpha [B,1,H,W] in another style: a random tone curve and, each with probability
    1/4, details flattened by a 5 x 5 median, dark lines along inner edges, a dark outline."""
    b, u = len(rgb), lambda *shape: torch.rand(*shape, 1, 1, generator=rng)
    colour = (rgb / alpha.clamp(min=1e-3)).clamp(0, 1) ** ((u(b, 1) - 0.5) * 0.8).exp()
    some = (u(b, 1) < 0.25).view(b)
    patches = F.unfold(F.pad(colour[some], (2, 2, 2, 2), "replicate"), 5)
    colour[some] = patches.unflatten(1, (3, 25)).median(2).values.view_as(colour[some])
    grey = F.pad((colour * alpha + 1 - alpha).mean(1, keepdim=True), (1, 1, 1, 1), "replicate")
    across, down = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2], grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
    lines = (1.5 * (across.square() + down.square()).sqrt()).clamp(max=0.8)
    colour = colour * (1 - lines * (u(b, 1) < 0.25))
    wider = torch.where(u(b, 1) < 0.25, F.max_pool2d(alpha, 3, 1, 1), alpha)
    return colour * alpha + (wider - alpha) * u(b, 3) * 0.3, wider


def augment(rgba, rng, white=0.7, strength=1.0, shaded=0.15, warp=0.0, mirrored=None):
    """uint8 [B,4,128,128] -> RGB [B,3,64,64] in [0,1]: augmented drawings on flat backgrounds.

    Rotation by up to 15 degrees, scale, shift, a slight perspective, paler or stronger colours, all times `strength`; a
    share `shaded` is lit from one side; a share 1 - `white` of the backgrounds is a light colour. To imitate other
    styles, `warp` adds `restyle` and a smooth displacement of about `warp` half sides, and drawings are mirrored where
    `mirrored` [B] is true. Hues are kept, because a caption without a colour means the natural one.
    """
    b = len(rgba)
    def u(*shape):
        return torch.rand(*shape, generator=rng)
    angle = (u(b) + u(b) - 1) * math.radians(15) * strength  # triangular: small angles are more frequent
    scale = 1 / (1 + (u(b) * 0.24 - 0.16) * strength)
    shift = (u(b, 2) - 0.5) * 0.16 * strength
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, (b, 4, SIZE, SIZE), align_corners=False)
    tilt = (u(b, 1, 1, 2) - 0.5) * 0.3 * strength
    grid = grid / (1 + (grid * tilt).sum(-1, keepdim=True))
    if warp:
        bend = torch.randn(b, 2, 4, 4, generator=rng) * warp
        grid = grid + F.interpolate(bend, grid.shape[1:3], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    if mirrored is not None:
        grid = grid * torch.stack([1 - 2.0 * mirrored, torch.ones(b)], 1)[:, None, None]
    x = rgba.float() / 255
    x = torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], 1)  # premultiplied: transparent pixels must not bleed
    x = F.grid_sample(x, grid, align_corners=False)
    rgb, alpha = restyle(x[:, :3], x[:, 3:], rng) if warp else (x[:, :3], x[:, 3:])
    grey = rgb.mean(1, keepdim=True)
    rgb = grey + (rgb - grey) * (1 + (u(b, 1, 1, 1) - 0.6) * 0.5 * strength)
    rgb = (rgb * (1 + (u(b, 1, 1, 1) - 0.5) * 0.25 * strength)).clamp(min=0).minimum(alpha)
    direction = 2 * math.pi * u(b)  # light from one side, as in a render of a 3D scene
    light = (grid * torch.stack([direction.cos(), direction.sin()], 1)[:, None, None]).sum(-1)
    light = 1 - (u(b, 1, 1) * 0.35 * (1 + light) / 2 + u(b, 1, 1) * 0.2 * grid.square().sum(-1)).clamp(0, 0.6)
    light = torch.where(u(b, 1, 1) < shaded * min(strength, 1), light, torch.ones(()))
    background = torch.where(u(b, 1) < white, torch.ones(b, 3), 1 - u(b, 3) * u(b, 1) * 0.6)
    return rgb * light[:, None] + (1 - alpha) * background[:, :, None, None]


def to_lab(rgb):
    """sRGB [...,3] in [0,1] -> OKLab (Ottosson 2020), a perceptually uniform space with a lightness coordinate."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ LMS.T) @ LAB.T


def from_lab(lab):
    """OKLab -> sRGB; the chroma of a colour outside [0,1] is reduced until it fits."""
    def convert(share):
        lms = (lab * np.stack([np.ones_like(share), share, share], -1)) @ LAB_BACK.T
        return lms ** 3 @ LMS_BACK.T
    low, high = np.zeros(lab.shape[:-1]), np.ones(lab.shape[:-1])
    for i in range(7):
        share = (low + high) / 2 if i else high
        linear = convert(share)
        inside = ((linear > -2e-3) & (linear < 1.004)).all(-1)
        low, high = np.where(inside, share, low), np.where(inside, high, share)
    linear = convert(low).clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


LMS = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                [0.0883024619, 0.2817188376, 0.6299787005]])
LAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                [0.0259040371, 0.7827717662, -0.8086757660]])
LMS_BACK, LAB_BACK = np.linalg.inv(LMS), np.linalg.inv(LAB)
PAINTED = {name: to_lab(np.array([[int(p[i:i + 2], 16) / 255 for i in (1, 3, 5)] for p in paints]))
           for name, paints in PAINTS.items()}
def step_down(x, start, stop):
    return ((stop - x) / (stop - start)).clip(0, 1)  # from 1 at start to 0 at stop


def dominant(rgba):
    """The dominant paint of a picture [4,H,W]: the picture in OKLab [H,W,3], the mask of the paint [H,W] in [0,1], its
    mean colour, and its share of the opaque area.

    A paint is everything of one hue, within about 40 degrees, or all grey of one lightness if that is twice as large.
    """
    lab, opaque = to_lab(rgba[:3].permute(1, 2, 0).numpy() / 255.0), rgba[3].numpy() / 255.0
    chroma, hue = np.hypot(lab[..., 1], lab[..., 2]), np.arctan2(lab[..., 2], lab[..., 1])
    vivid = 1 - step_down(chroma, 0.035, 0.075)

    def peak(value, weight, bins, low, high, reach, wraps):
        """The value with the most weight within `reach` of it."""
        centres = low + (np.arange(bins) + 0.5) * (high - low) / bins
        count = np.histogram(value, bins, (low, high), weights=weight)[0]
        away = np.abs(centres[:, None] - centres)
        away = np.minimum(away, 2 * np.pi - away) if wraps else away
        return centres[(step_down(away, 0, reach) @ count).argmax()]
    main = peak(hue, opaque * vivid, 72, -np.pi, np.pi, 0.7, True)
    off = np.abs(np.angle(np.exp(1j * (hue - main))))
    coloured = vivid * step_down(off, 0.6, 0.85)
    light = peak(lab[..., 0], opaque * (1 - vivid), 40, 0, 1, 0.2, False)
    neutral = (1 - vivid) * step_down(np.abs(lab[..., 0] - light), 0.15, 0.25)
    def area(mask):
        return max((mask * opaque).sum(), 1e-6)
    def mean_of(mask):
        return (lab * (mask * opaque)[..., None]).sum((0, 1)) / area(mask)
    strong = np.hypot(*mean_of(coloured)[1:])  # pale pixels count if the paint itself is pale
    coloured = step_down(off, 0.6, 0.85) * (1 - step_down(chroma, 0.1 * strong, 0.3 * strong + 1e-6))
    mask = coloured if 2 * area(coloured) > area(neutral) else neutral
    mean = mean_of(mask)
    return lab, mask, mean, area(mask) / max(opaque.sum(), 1e-6)


def rim(alpha, width=4):
    """The opaque pixels within `width` of transparent ones, [H,W] in [0,1], from a picture's alpha, uint8 [H,W]."""
    alpha = alpha[None, None].float() / 255
    inner = -F.max_pool2d(F.pad(-alpha, [width] * 4), 2 * width + 1, 1)
    return (alpha - F.avg_pool2d(inner, 3, 1, 1)).clamp(0, 1)[0, 0].numpy()


def painted_over(rgba, lab, mask, new):
    """A picture [4,H,W] whose colours, `lab` [H,W,3] in OKLab, become `new` by the share `mask` [H,W]."""
    rgb = rgba[:3].permute(1, 2, 0).numpy().copy()
    some = (mask > 0) & (rgba[3].numpy() > 0)
    rgb[some] = (from_lab((lab + mask[..., None] * (new - lab))[some]) * 255).round().astype(np.uint8)
    return torch.cat([torch.from_numpy(rgb).permute(2, 0, 1), rgba[3:]])


def recolour(rgba, name, rng=None, found=None):
    """Recolour the dominant paint of an RGBA picture [4,H,W]: its mean becomes the colour `name`, lighter and darker
    parts keep their proportion; other colours, outlines and highlights are unchanged.

    rng: a numpy generator that draws and jitters one of the colour's paints; None: the vivid one. found: of `dominant`.
    """
    lab, mask, mean, _ = found or dominant(rgba)
    paint = PAINTED[name][0].copy()
    if rng is not None:
        paint = PAINTED[name][int(rng.random() < 0.35)] + rng.normal(0, [0.02, 0.008, 0.008])
    paint[0] = min(paint[0], 0.985)
    light, old = lab[..., 0].clip(0, 1), mean[0].clip(0.05, 1)
    power = 0.7 if paint[0] > old else 1.0  # shades on light paints are paler
    darker = paint[0] * (light / old).clip(0, 1) ** power
    lighter = 1 - (1 - paint[0]) * ((1 - light) / max(1 - old, 1e-3)).clip(0, 1)
    lighter = lighter if old < 0.9 else np.minimum(paint[0] * light / old, 0.99)  # white parts are not highlights
    new_light = np.where(light < old, darker, lighter)
    chroma, hue = np.hypot(lab[..., 1], lab[..., 2]), np.arctan2(lab[..., 2], lab[..., 1])
    old_chroma, old_hue = np.hypot(*mean[1:]), np.arctan2(mean[2], mean[1])
    ratio, turn = np.ones_like(chroma), np.zeros_like(chroma)
    if old_chroma > 0.05:
        ratio = (chroma / old_chroma).clip(0, 1.3)
        turn = 0.5 * np.angle(np.exp(1j * (hue - old_hue)))
    to = np.arctan2(paint[2], paint[1]) + turn
    new_chroma = np.hypot(*paint[1:]) * ratio
    if name == "white":  # the sets shade the rim of white objects, which would vanish on a white page
        new_light = new_light - 0.13 * rim(rgba[3])
    new = np.stack([new_light, new_chroma * np.cos(to), new_chroma * np.sin(to)], -1)
    return painted_over(rgba, lab, mask, new)


def whitened(rgba):
    """An RGBA picture [4,H,W] with its light greys made white, their mean at a lightness of WHITE, and with a shaded
    rim that shows on a white page; None if less than a tenth of it is light grey."""
    lab, opaque = to_lab(rgba[:3].permute(1, 2, 0).numpy() / 255.0), rgba[3].numpy() / 255.0
    mask = (1 - step_down(lab[..., 0], 0.68, 0.78)) * step_down(np.hypot(lab[..., 1], lab[..., 2]), 0.06, 0.09)
    share = (mask * opaque).sum() / max(opaque.sum(), 1)
    if share < 0.1:
        return None
    mean = (lab[..., 0] * mask * opaque).sum() / (mask * opaque).sum()
    light = (WHITE * (lab[..., 0] / mean).clip(0, 1) ** 0.7).clip(0, 0.985) - 0.1 * rim(rgba[3])
    new = np.stack([light, 0.1 * lab[..., 1], 0.1 * lab[..., 2]], -1)
    return painted_over(rgba, lab, mask, new)


def colour_of(found):
    """The name of a picture's dominant colour, from the result of `dominant`; None if no name fits well."""
    _, _, mean, share = found
    if share < (0.45 if np.hypot(*mean[1:]) > 0.05 else 0.65):
        return None
    def far(name):
        return (np.square((PAINTED[name] - mean) * [0.7, 1, 1]).sum(1) ** 0.5).min()
    first, second = sorted(PAINTED, key=far)[:2]
    fits = (np.hypot(*mean[1:]) < 0.03) == (first in ("white", "grey", "black"))
    return first if fits and far(first) < 0.08 and far(second) > 1.3 * far(first) else None


class Drawings(NamedTuple):
    """Captioned pictures: RGBA uint8 [N,4,128,128]; N lists of captions, empty if none is true; the captions that imply
    or name the colour; and N numbers, equal for the same drawing in several colours."""
    rgba: torch.Tensor
    captions: list
    telling: list
    drawing: list


def items(icons, styles, work, recoloured=True):
    """The captioned pictures of the vocabulary, as Drawings.

    recoloured: add each drawing of a noun that comes in any colour in four other colours, and every other drawing in
        two colours without a true caption; add a caption with the colour to a drawing whose colour has a name. What is
        in PALE is whitened, and the set's own picture of it has no true caption.
    """
    cache = work / f"coloured-{'-'.join(styles)}.pt"
    if recoloured and cache.exists():
        return Drawings(*torch.load(cache))
    pictures, captions, telling, drawing, vocab, rng = [], [], [], [], vocabulary(), np.random.default_rng(0)
    for style in styles:
        for name, rgba in zip(*render_icons(icons, style, work), strict=False):
            plain = [c for c in vocab[name] if "COLOUR" not in c]
            pictures.append(rgba)
            captions.append(plain)
            telling.append(plain)
            drawing.append(drawing[-1] + 1 if drawing else 0)
            if not recoloured:
                continue
            white = whitened(rgba) if plain[0] in PALE else None
            pictures[-1] = rgba if white is None else white
            found = dominant(pictures[-1])
            own, nouns = colour_of(found), [c.replace("COLOUR ", "") for c in vocab[name] if "COLOUR" in c]
            named = COLOURS.intersection(" ".join(plain).split())
            if own and (not named or own in plain[0].split()):
                captions[-1] = list(
                    dict.fromkeys(
                        [
                            *plain,
                            *(f"{own} {n}" for n in nouns if n not in plain or not named),
                            *([] if named else [f"{own} {plain[0]}"]),
                        ]
                    )
                )
            if nouns and nouns[0] not in GROWN:
                telling[-1] = [c for c in captions[-1] if own and own in c.split()]
            shown = pictures[-1]
            if white is not None:  # the set's own picture is one in a wrong colour
                pictures.append(rgba)
                captions.append([])
                telling.append([])
                drawing.append(drawing[-1])
            if found[3] < 0.3 or named and not nouns:
                continue
            for colour in rng.choice([c for c in PAINTS if c != own], 4 if nouns else 2, replace=False).tolist():
                pictures.append(recolour(shown, colour, rng, found))
                captions.append([c for n in nouns[:1] for c in (f"{colour} {n}", *([] if n in GROWN else [n]))])
                telling.append(captions[-1][:1])
                drawing.append(drawing[-1])
    result = Drawings(torch.stack(pictures), captions, telling, drawing)
    if recoloured:
        torch.save(tuple(result), cache)
    return result


# ---- the two models -----------------------------------------------------------------------------------

def half_precision(device):
    """Autocast to bfloat16, except on a CPU without instructions for it, where it is 15 times slower than float32."""
    return torch.autocast(device.type, torch.bfloat16,
                          enabled=device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def planar_group_norm(model):
    """Run every GroupNorm on contiguous planes, several times faster than channels-last in bfloat16 on a CPU."""
    for m in model.modules():
        if isinstance(m, torch.nn.GroupNorm):
            m.forward = lambda x, m=m: torch.nn.GroupNorm.forward(m, x.contiguous()).contiguous(
                memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)


def schedule(spent, minutes, peak, warmup=0.02):
    """Learning rate after `spent` of `minutes`: a short linear warm-up, then half a cosine to zero."""
    u = min(spent / minutes, 1.0)
    return peak * (u / warmup if u < warmup else 0.5 * (1 + math.cos(math.pi * (u - warmup) / (1 - warmup))))


def draw_timesteps(scheduler, batch, rng):
    """[batch] stratified timesteps with probabilities proportional to min-SNR weights (Hang et al., arXiv 2303.09556).

    Steps with little noise depend little on the caption; to draw them less often is cheaper than to weight them down.
    """
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    share = (snr.clamp(max=5) / snr).cumsum(0)
    even = (torch.arange(batch) + torch.rand(batch, generator=rng)) / batch
    return torch.searchsorted(share / share[-1], even).clamp(max=len(share) - 1)


class Velocity:
    """Distils a diffusion model into a flow: the errors of a student that predicts the velocity.

    At the noise levels of the diffusion model the student learns its teacher's velocity (eps - x) / (1 - sigma), which
    lacks the variance of single pictures; at higher ones, the velocity of the picture itself, noise - x0.
    """

    def __init__(self, unet, text, scheduler):
        """unet, text: the teacher, of which a copy is kept; scheduler: its noise schedule."""
        self.unet, self.text = (copy.deepcopy(m).eval().requires_grad_(False) for m in (unet, text))
        signal, noise = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
        self.sigmas, self.scale = noise / (signal + noise), signal + noise  # x_t is scale times x_sigma

    def errors_of(self, unet, text, x0, ids, noise, t, beyond=0.1):
        """[B] squared errors of the velocity for latents x0 [B,C,h,w] at the teacher's timesteps t [B]; a share
        `beyond` of the rows gets evenly spaced noise levels above the teacher's."""
        sigma, count = self.sigmas.to(t.device)[t], round(beyond * len(t))
        last = self.sigmas[-1]
        sigma[:count] = last + (1 - last) * (torch.arange(count, device=t.device) + 0.5) / max(count, 1)
        rows, known = sigma.view(-1, 1, 1, 1), (torch.arange(len(t), device=t.device) >= count).view(-1, 1, 1, 1)
        x = (1 - rows) * x0 + rows * noise
        with half_precision(x.device):
            with torch.no_grad():
                meant = self.unet(self.scale.to(t.device)[t].view(-1, 1, 1, 1) * x, t, self.text(ids)[0]).sample
            got = unet(x, 1000 * sigma, text(ids)[0]).sample
        wanted = torch.where(known, (meant.float() - x) / (1 - rows), noise - x0)
        return (got.float() - wanted).square().mean((1, 2, 3))


def shares(captions):
    """[N] sampling weights of the pictures: equal for all names, however few sets have them; 0.3 for recoloured
    drawings, which are many and easy, times the factor in OFTEN."""
    counts, names = Counter(c[0] for c in captions if c), {n[0] for n in vocabulary().values()}

    def wanted(name):
        return PALE_OFTEN if name in PALE else 1.0 if name in names else 0.3 * OFTEN.get(name.split()[0], 1)
    return torch.tensor([wanted(c[0]) / counts[c[0]] if c else 0.0 for c in captions])


def nearest(colour, count=4):
    """The `count` colours whose vivid paints are nearest to that of `colour` in OKLab, lightness weighing 0.7."""
    def far(other):
        return np.square((PAINTED[other][0] - PAINTED[colour][0]) * [0.7, 1, 1]).sum()
    return sorted(PAINTED, key=far)[1:count + 1]


def alike(names):
    """{name: the other names that share a word with it, or else all others}; for "red car", cars in other colours."""
    owners, nouns = {}, {}
    for name in names:
        for word in name.split():
            owners.setdefault(word, set()).add(name)
        if name.split()[0] in PAINTS:
            nouns.setdefault(name.partition(" ")[2], set()).add(name)
    like = {name: sorted(set().union(*(owners[w] for w in name.split())) - {name}) for name in set(names)}
    for name in like:
        same = nouns.get(name.partition(" ")[2], set()) - {name} if name.split()[0] in PAINTS else ()
        if len(same) > 3:  # colours that are hard to tell apart three times as often as the others
            close = [n for n in sorted(same) if n.split()[0] in nearest(name.split()[0])]
            like[name] = [*sorted(same), *close, *close]
    return {name: near or sorted(set(names) - {name}) for name, near in like.items()}


def contrast(right, wrong, width=0.015):
    """[B] softplus of the difference between the noise errors with right captions [B] and with wrong ones [B]; its
    slope rises from 0, where the right error is clearly smaller, to 1, where the wrong one is."""
    return width * F.softplus((right - wrong) / width)


def set_dropout(unet, rate):
    """Set the dropout of the residual blocks."""
    for name, m in unet.named_modules():
        if name.endswith(".dropout"):
            m.p = rate


class Run:
    """A resumable training run: models, optimiser, minutes spent; checkpoints are written atomically."""

    def __init__(self, path, modules, peak, minutes):
        self.path, self.modules, self.peak, self.minutes = path, modules, peak, minutes
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.ema = {k: copy.deepcopy(m).requires_grad_(False).eval() for k, m in modules.items()}
        for m in modules.values():
            planar_group_norm(m)
        self.step, self.spent, self.clock, self.saved = 0, 0.0, time.time(), 0.0
        self.best = math.inf, None  # lowest held-out loss so far, and its averages
        if path.exists():
            state = torch.load(path)
            for k, m in modules.items():
                m.load_state_dict(state["modules"][k])
                self.ema[k].load_state_dict(state["ema"][k])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, self.spent, self.best = state["step"], state["spent"], state["best"]
            self.saved = self.spent

    def update(self, loss, decay=0.999):
        for group in self.optimiser.param_groups:
            group["lr"] = schedule(self.spent, self.minutes, self.peak)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        decay = min(decay, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for k, m in self.modules.items():
                average = [p for p in self.ema[k].parameters()]
                torch._foreach_lerp_(average, list(m.parameters()), 1 - decay)
        self.step += 1
        now = time.time()
        self.spent, self.clock = self.spent + (now - self.clock) / 60, now
        return self.spent < self.minutes

    def train(self, batch_loss, held_out_loss, export, log, share=1.0):
        """Minimise batch_loss() until the minutes are spent; save and export every five minutes and at the end.

        At the end the averages are mixed: `share` of the last ones and the rest of those with the lowest held-out loss,
        possibly the initial ones. The mixture generalises to other styles and keeps most of the gained sharpness.
        """
        name, mean = self.path.stem, 0.0
        if not self.step:
            self.consider(held_out_loss, log)
        self.clock = time.time()
        more = self.spent < self.minutes
        while more:
            loss = batch_loss()
            more = self.update(loss)
            mean += 0.01 * (loss.item() - mean) if mean else loss.item()
            if self.step % 200 == 0 or not more:
                log(f"{name} step {self.step} {self.spent:.1f} min loss {mean:.4f}")
            if self.spent - self.saved > 5 or not more:
                self.consider(held_out_loss, log)
                self.save()
                if not more:
                    self.mix(share)
                export()

    @torch.no_grad()
    def consider(self, held_out_loss, log):
        """Measure the averages, and keep a copy if their loss is the lowest so far."""
        held_out = held_out_loss(*self.ema.values()).item()
        log(f"{self.path.stem} step {self.step} {self.spent:.1f} min held-out loss {held_out:.4f}")
        if held_out < self.best[0]:
            self.best = held_out, copy.deepcopy({k: m.state_dict() for k, m in self.ema.items()})

    @torch.no_grad()
    def mix(self, share):
        """Mix the averages with those of the lowest held-out loss."""
        for k, m in self.ema.items():
            for name, value in m.state_dict().items():
                if value.is_floating_point():
                    value.lerp_(self.best[1][k][name], 1 - share)

    def save(self):
        state = dict(modules={k: m.state_dict() for k, m in self.modules.items()},
                     ema={k: m.state_dict() for k, m in self.ema.items()},
                     optimiser=self.optimiser.state_dict(), step=self.step, spent=self.spent, best=self.best)
        torch.save(state, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").replace(self.path)
        self.saved = self.spent


def train_vae(args, device, log):
    """Train an AutoencoderKL, f = 4, on all drawings of the training styles."""
    vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
                        block_out_channels=[16, 32, 64], layers_per_block=1, norm_num_groups=8, latent_channels=4,
                        sample_size=SIZE, mid_block_add_attention=False).to(device, memory_format=torch.channels_last)
    if args.start:
        vae = AutoencoderKL.from_pretrained(args.start, subfolder="vae", torch_dtype=torch.float32)
        return vae.to(device, memory_format=torch.channels_last).eval()
    run = Run(args.work / "vae.pt", {"vae": vae}, 2e-3, args.vae_minutes)
    if run.spent < args.vae_minutes:
        rgba = torch.cat([render_icons(args.icons, s, args.work)[1] for s in TRAIN])
        held = torch.cat([render_icons(args.icons, s, args.work)[1][::12] for s in HELD_OUT])
        rng = torch.Generator().manual_seed(run.step)
        more, mean, run.clock = True, 0.0, time.time()
        while more:
            x = augment(rgba[torch.randint(len(rgba), (24,), generator=rng)], rng, white=0.5, strength=1.5)
            x = (x * 2 - 1).to(device, memory_format=torch.channels_last)
            with half_precision(device):
                posterior = vae.encode(x).latent_dist
                z = posterior.mean + torch.randn_like(posterior.mean) * posterior.std.clamp(min=0.03)
                y = vae.decode(z).sample
            y, d = y.float(), y.float() - x
            edges = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
            loss = d.abs().mean() + 2 * d.square().mean() + 0.5 * edges + 1e-4 * posterior.kl().mean() / z[0].numel()
            more = run.update(loss)
            mean += 0.02 * (loss.item() - mean) if mean else loss.item()
            if run.step % 500 == 0 or not more:
                x = augment(held, torch.Generator().manual_seed(0), white=1.0, strength=0.0).to(device)
                with torch.no_grad():
                    y = run.ema["vae"].decode(run.ema["vae"].encode(x * 2 - 1).latent_dist.mean).sample / 2 + 0.5
                psnr = -10 * (y.clamp(0, 1) - x).square().mean((1, 2, 3)).log10()
                log(f"vae step {run.step} {run.spent:.1f} min loss {mean:.4f} held-out PSNR {psnr.mean():.2f} dB")
            if run.spent - run.saved > 3 or not more:
                run.save()
    return run.ema["vae"].eval()


def make_tokenizer(captions, work):
    """Byte-level BPE in CLIP's layout with all 256 byte symbols, trained on the captions; cached in work."""
    folder = work / "tokenizer"
    if (folder / "merges.txt").exists():  # training again would break ties in another order
        return CLIPTokenizerFast.from_pretrained(folder, model_max_length=TOKENS)
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=3000, min_frequency=1, end_of_word_suffix="</w>",
                                  initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" "))
              for m in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = alphabet + [a + "</w>" for a in alphabet] + ["".join(m) for m in merges]
    symbols = list(dict.fromkeys(symbols)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    return CLIPTokenizerFast.from_pretrained(folder, model_max_length=TOKENS)


PREFIXES = ["", "", "", "a ", "an ", "an emoji of ", "a picture of ", "a picture of a ", "a drawing of a ", "the "]


def phrase(names, picker):
    """A random phrasing of a caption: the name with probability 0.7, else a synonym; often with a prefix."""
    name = names[0] if len(names) == 1 or picker.random() < 0.7 else picker.choice(names[1:])
    return picker.choice(PREFIXES) + name


@torch.no_grad()
def held_out_batch(args, vae, tokenizer, count=256):
    """A fixed batch of `count` drawings of the held-out styles: scaled latents, token ids, noises, timesteps."""
    rgba, captions, *_ = items(args.icons, HELD_OUT, args.work, recoloured=False)
    rng = torch.Generator().manual_seed(5)
    some = torch.randperm(len(rgba), generator=rng)[:count].tolist()
    pictures = [augment(rgba[i:i + 1], rng, white=1.0, strength=0.0).to(vae.device) * 2 - 1 for i in some]
    x0 = torch.cat([vae.encode(p).latent_dist.mean for p in pictures]) * vae.config.scaling_factor
    ids = tokenizer([captions[i][0] for i in some], padding="max_length", max_length=TOKENS, truncation=True,
                    return_tensors="pt").input_ids
    noise, t = torch.randn(x0.shape, generator=rng), torch.linspace(20, 980, count).long()
    return x0, *(x.to(vae.device) for x in (ids, noise, t))


def train_unet(args, device, vae, log):
    """Train UNet and text encoder together: epsilon prediction on Stable Diffusion's schedule, 10 % empty captions.

    With --flow they start from the weights of --start and learn the velocity of flow matching instead.
    """
    rgba, captions, telling, drawing = items(args.icons, TRAIN, args.work)
    if args.start:  # new captions are spelled with the tokens of its text encoder
        tokenizer = CLIPTokenizerFast.from_pretrained(args.start, subfolder="tokenizer")
    else:
        tokenizer = make_tokenizer([p + c for names in captions for c in names for p in PREFIXES], args.work)
    def ids_of(c):
        return torch.tensor(tokenizer(c, padding="max_length", max_length=TOKENS, truncation=True).input_ids)
    tokens = {c: ids_of(c) for c in {""}.union(p + c for names in captions for c in names for p in PREFIXES)}
    versions = {}  # the pictures of each drawing, the original colour first
    for i, k in enumerate(drawing):
        versions.setdefault(k, []).append(i)
    mirrorable = torch.tensor([not HANDED.search(" ".join(captions[versions[k][0]])) for k in drawing])
    def encode(x):
        return vae.encode((x * 2 - 1).to(device, memory_format=torch.channels_last)).latent_dist.mean
    @torch.no_grad()
    def latents_of(rows, plain, seed):
        """Scaled latents [B,C,h,w] of the augmented pictures `rows` [B]. Where `plain` [B] the augmentation is weak, to
        keep the look of the sets. Equal seeds augment equal positions alike."""
        x0 = torch.empty(len(rows), 4, SIZE // 4, SIZE // 4)
        mirrored = mirrorable[rows[~plain]] & (torch.arange((~plain).sum()) % 5 < 2)
        for some, change in ((plain, dict(white=0.9, strength=0.3)), (~plain, dict(warp=0.05, mirrored=mirrored))):
            if some.any():
                x0[some] = (
                    encode(augment(rgba[rows[some]], torch.Generator().manual_seed(seed), **change)).float().cpu()
                )
        return (x0 * scaling).to(device, memory_format=torch.channels_last)

    scaling = vae.config.scaling_factor
    if not args.start:
        some = torch.randperm(len(rgba), generator=torch.Generator().manual_seed(1))[:2048]
        with torch.no_grad():
            latents = [encode(augment(rgba[i], torch.Generator().manual_seed(0))) for i in some.split(64)]
        scaling = 1 / torch.cat(latents).std().item()
    vae.register_to_config(scaling_factor=scaling)
    log(f"{len(rgba)} pictures, {len({c for n in captions for c in n})} captions, vocabulary {len(tokenizer)}, "
        f"latent scaling {scaling:.4f}")

    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=TOKENS, projection_dim=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).to(device)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=[64, 128, 160],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16,
        # the pooled caption is added to the timestep embedding, because a net this small learns slowly from
        # cross-attention alone
        addition_embed_type="text", addition_embed_type_num_heads=4).to(device, memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # the fused kernel is slower in bfloat16 on a CPU
    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
                              beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    if args.start:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(args.start, subfolder="unet").state_dict())
        text.load_state_dict(CLIPTextModel.from_pretrained(args.start, subfolder="text_encoder").state_dict())
    flow = Velocity(unet, text, scheduler) if args.flow else None
    rate = args.rate or (4e-4 if args.start else 1e-3)
    run = Run(args.work / "unet.pt", {"unet": unet, "text": text}, rate, args.minutes)
    run.ema["unet"].set_attn_processor(AttnProcessor())
    log(f"unet {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M, text "
        f"{sum(p.numel() for p in text.parameters()) / 1e6:.2f} M")

    def errors_of(unet, text, x0, ids, noise, t, meant=None):
        """[B] squared errors; meant: the target latents if not x0; where they differ the weight is min(1, 1 / SNR)."""
        if flow:
            return flow.errors_of(unet, text, x0, ids, noise, t)
        with half_precision(device):
            states = text(ids)[0]
            pred = unet(scheduler.add_noise(x0, noise, t), t, states).sample
        if meant is None:
            return (pred.float() - noise).square().mean((1, 2, 3))  # [B]
        abar = scheduler.alphas_cumprod.to(t.device)[t].view(-1, 1, 1, 1)
        ratio = (abar / (1 - abar)).sqrt()
        error = (pred.float() - noise - ratio * (x0 - meant)).square().mean((1, 2, 3))
        other = (x0 != meant).flatten(1).any(1)
        return torch.where(other, error / ratio.view(-1).square().clamp(min=1), error)

    held = held_out_batch(args, vae, tokenizer)

    def export():
        pipe = StableDiffusionPipeline(vae=vae, text_encoder=run.ema["text"], tokenizer=tokenizer,
                                       unet=run.ema["unet"], safety_checker=None,
                                       scheduler=FlowMatchEulerDiscreteScheduler() if flow else scheduler,
                                       feature_extractor=None, requires_safety_checker=False)
        half = StableDiffusionPipeline(**{k: copy.deepcopy(v) for k, v in pipe.components.items()},
                                       requires_safety_checker=False)
        half.to(dtype=torch.float16)
        half.save_pretrained(args.out, safe_serialization=True)
        readable_by_transformers_4(args.out)
        own = json.loads((HERE / "pds.json").read_text())
        if flow:  # edited at the noise levels of the diffusion model
            def share(t):
                return round(flow.sigmas[round(1000 * t)].item(), 3)
            own |= {"t_min": share(0.1), "t_max": share(0.98)}
        (args.out / "pds.json").write_text(json.dumps(own, indent=1) + "\n")
        (args.out / "captions.txt").write_text((HERE / "captions.txt").read_text())

    weights, names = shares(captions), sorted({c[0] for c in captions if c})
    painted = [v for v in versions.values() if len(v) > 1 and any(telling[i] for i in v)]
    pulled = [PALE_OFTEN if {*captions[v[0]]} & PALE else 1 for v in painted]
    like = alike(names)
    rng = torch.Generator().manual_seed(100 + run.step)
    picker = random.Random(run.step)

    def repaint(count):
        """`count` drawings in a wrong colour: latents x, the target latents of the prediction, captions, timesteps."""
        right = []
        for v in picker.choices(painted, pulled, k=count):
            able = [i for i in v if telling[i]]
            right += picker.choices(able, [OFTEN.get(telling[i][0].split()[0], 1) for i in able])
        right = torch.tensor(right)
        wrong = torch.tensor([picker.choice([i for i in versions[drawing[k]] if i != k]) for k in right.tolist()])
        now = torch.stack([tokens[picker.choice(PREFIXES) + picker.choice(telling[k])] for k in right.tolist()]).to(
            device
        )
        seed, plain = picker.randrange(1 << 30), torch.rand(count, generator=rng) < 0.7
        x, y = (latents_of(rows, plain, seed) for rows in (wrong, right))
        t = 200 + 750 * (torch.arange(count) + torch.rand(count, generator=rng)) / count
        # at low noise the colour is visible and an error in it is costly, so the target moves with the noise level
        share = ((t - 200) / 250).clamp(max=1).to(device).view(-1, 1, 1, 1)
        return x, torch.lerp(x, y, share), now, t.long().to(device)

    def batch_loss():
        done, size, others = run.spent / args.minutes, args.batch, 0 if flow else args.repaint
        # falls to 0 at three quarters of the run; until then the contrastive term acts
        early = 0 if flow else max(0, 1 - done / 0.75)
        set_dropout(unet, 0.1 * early)
        rows = torch.multinomial(weights, size, replacement=True, generator=rng)
        plain = torch.rand(size, generator=rng) < 0.4 + 0.2 * done  # weaker augmentation towards the end
        x0 = latents_of(rows, plain, picker.randrange(1 << 30))
        words = ["" if picker.random() < 0.1 else phrase(captions[i], picker) for i in rows.tolist()]
        ids = torch.stack([tokens[w] for w in words]).to(device)
        t = draw_timesteps(scheduler, size, rng).to(device)
        x, meant = x0, x0  # the noised latents, and the targets of the prediction
        if early:
            # repeat every fourth picture with another caption, a similar one with probability 0.5 (0.8 with a colour)
            def near(name):
                return picker.random() < (0.8 if name.split()[0] in PAINTS else 0.5)

            foreign = [
                picker.choice(like[c] if near(c) else names) for c in (captions[i][0] for i in rows[::4].tolist())
            ]
            # not wrong: any caption beside the empty one, and another name of the same picture
            really = torch.tensor([w != "" and o not in captions[i]
                                   for w, o, i in zip(words[::4], foreign, rows[::4].tolist(), strict=False)])
            x, meant, t = (torch.cat([v, v[::4]]) for v in (x, meant, t))
            ids = torch.cat([ids, torch.stack([tokens[w] for w in foreign]).to(device)])
        noise = torch.randn(x0.shape, generator=rng).to(device)
        noise = torch.cat([noise, noise[::4]]) if early else noise
        if others:
            again = repaint(others)
            x, meant, ids, t = (torch.cat(pair) for pair in zip((x, meant, ids, t), again, strict=False))
            noise = torch.cat([noise, torch.randn(again[0].shape, generator=rng).to(device)])
        errors = errors_of(unet, text, x, ids, noise, t, meant if others else None)
        loss = errors[:size].mean()
        if early:
            wrong = errors[size:size + len(really)]
            loss = loss + contrast(errors[:size:4], wrong)[really.to(device)].sum() / size
        if others:
            loss = loss + args.repaint_weight * (1 - 0.6 * done) * errors[-others:].mean()
        return loss

    run.train(batch_loss, lambda *ema: errors_of(*ema, *held).mean(), export, log, share=args.keep)


# ---- InstructPix2Pix: the same UNet with eight channels -------------------------------------------------

INSTRUCTIONS = ["make it a ", "make it a ", "turn it into a ", "make it ", ""]
TUNED = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks.2", "conv_norm_out",
         "conv_out")


def readable_by_transformers_4(folder):
    """Restore the names in a saved pipeline that transformers 5 changed: text encoder's keys, tokenizer's class.

    transformers 4 would otherwise silently initialise the text encoder at random; both versions read the old names.
    """
    path, index = folder / "text_encoder" / "model.safetensors", folder / "model_index.json"
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    index.write_text(index.read_text().replace('"CLIPTokenizer"', '"CLIPTokenizerFast"'))


def widen(unet):
    """Double the channels of conv_in, with zero weights, for the latent of the picture that is edited."""
    old = unet.conv_in
    new = torch.nn.Conv2d(2 * old.in_channels, old.out_channels, old.kernel_size, padding=old.padding)
    with torch.no_grad():
        new.weight.zero_()[:, :old.in_channels] = old.weight
        new.bias.copy_(old.bias)
    unet.conv_in = new.to(old.weight.device, old.weight.dtype)
    unet.register_to_config(in_channels=2 * old.in_channels)
    return unet


@torch.no_grad()
def add_editor(folder, unet, text):
    """Add to the weights of another prior what the editor in `folder` learned beyond the prior there."""
    before, tuned = StableDiffusionPipeline.from_pretrained(folder), load_file(folder / "instruct.safetensors")
    for part, module, old in (("unet", unet, widen(before.unet)), ("text_encoder", text, before.text_encoder)):
        old, new = old.state_dict(), module.state_dict()
        for name in old:
            if f"{part}.{name}" in tuned:
                new[name] += tuned[f"{part}.{name}"].float() - old[name].float()


def pair_sets(icons, styles, work, recoloured=True):
    """For each style: its pictures, their captions, the pictures of each word, and the recolourable ones."""
    sets, vocab = [], vocabulary()
    for style in styles:
        rgba, captions, *_ = items(icons, [style], work, recoloured=False)
        words, paint = {}, []
        for i, names in enumerate(captions):
            for word in names[0].split():
                words.setdefault(word, []).append(i)
            paint += [(i, c) for c in vocab[names[0].replace(" ", "-")] if "COLOUR" in c] if recoloured else []
        sets.append((rgba, captions, words, paint))
    return sets


def draw_pairs(sets, count, rng):
    """`count` pairs of drawings of the same style: RGBA source and target [N,4,128,128], and a list of instructions.

    Half of the sources share a word with the target (face, cat, heart, ...), a quarter are arbitrary drawings, a
    quarter are the same drawing in its own or another colour. Style, position and background are preserved.
    """
    picker, source, target, instructions = random.Random(int(torch.randint(1 << 30, (), generator=rng))), [], [], []
    for _ in range(count):
        rgba, captions, words, paint = picker.choice(sets)
        kind, i = picker.random(), picker.randrange(len(rgba))
        if kind < 0.25 and paint:
            i, caption = picker.choice(paint)
            colour = picker.choice(list(PAINTS))
            source.append(rgba[i] if picker.random() < 0.5 else recolour(rgba[i], picker.choice(list(PAINTS))))
            target.append(recolour(rgba[i], colour))
            instructions.append(picker.choice(["make it a ", "make it "]) + caption.replace("COLOUR", colour)
                                if picker.random() < 0.7 else f"make it {colour}")
        else:
            like = words[picker.choice(captions[i][0].split())] if kind < 0.75 else range(len(rgba))
            source.append(rgba[picker.choice(like)])
            target.append(rgba[i])
            name = captions[i][0] if picker.random() < 0.7 else picker.choice(captions[i])
            instructions.append(picker.choice(INSTRUCTIONS) + name)
    return torch.stack(source), torch.stack(target), instructions


def train_instruct(args, device, log):
    """Tune the pipeline in --out to an InstructPix2Pix (Brooks et al., arXiv 2211.09800): the UNet's encoder half and
    the text encoder. Writes the tensors that differ to instruct.safetensors, and instruct.png: held-out pairs, each as
    source, edit and target."""
    pipe = StableDiffusionPipeline.from_pretrained(args.out).to(dtype=torch.float32)
    vae, tokenizer, scheduler = pipe.vae.to(device).eval(), pipe.tokenizer, pipe.scheduler
    unet = widen(pipe.unet).to(device, memory_format=torch.channels_last)
    text = pipe.text_encoder.to(device)
    if args.start:
        add_editor(args.start, unet, text)
    unet.set_attn_processor(AttnProcessor())
    for name, p in unet.named_parameters():
        p.requires_grad_(name.startswith(TUNED))
    scaling = vae.config.scaling_factor
    def ids_of(w):
        return torch.tensor(tokenizer(w, padding="max_length", max_length=TOKENS, truncation=True).input_ids)

    @torch.no_grad()
    def encode(source, target, seed):  # the same augmentation for both
        pairs = []
        for x in (source, target):
            x = augment(x, torch.Generator().manual_seed(seed)) * 2 - 1
            with half_precision(device):
                pairs.append(vae.encode(x.to(device)).latent_dist.mean.half().cpu())
        return torch.stack(pairs, 1)

    cache = args.work / "pairs.pt"
    if not cache.exists():
        sets, rng, latents, words = pair_sets(args.icons, TRAIN, args.work), torch.Generator().manual_seed(1), [], []
        for chunk in range(-(-args.pairs // 512)):
            source, target, said = draw_pairs(sets, 512, rng)
            latents += [encode(source[i:i + 64], target[i:i + 64], chunk * 512 + i) for i in range(0, 512, 64)]
            words += said
        torch.save((torch.cat(latents), words), cache)
    latents, words = torch.load(cache)
    ids = ids_of(words)
    source, target, said = draw_pairs(pair_sets(args.icons, HELD_OUT, args.work, False), 256,
                                     torch.Generator().manual_seed(2))
    held, held_ids = encode(source, target, 0).float().to(device), ids_of(said).to(device)
    held_noise = torch.randn(held[:, 0].shape, generator=torch.Generator().manual_seed(3)).to(device)
    held_t = torch.linspace(20, 980, len(held)).long().to(device)

    run = Run(args.work / "instruct.pt", {"unet": unet, "text": text}, 5e-4, args.minutes)
    run.ema["unet"].set_attn_processor(AttnProcessor())

    def loss_of(unet, text, pairs, ids, noise, t):
        image, x0 = pairs[:, 0], pairs[:, 1] * scaling  # the image's latent is not scaled, as in the paper's code
        with half_precision(device):
            x = torch.cat([scheduler.add_noise(x0, noise, t), image], 1).contiguous(memory_format=torch.channels_last)
            return (unet(x, t, text(ids)[0]).sample.float() - noise).square().mean()

    def export():
        before = StableDiffusionPipeline.from_pretrained(args.out)
        old = {f"unet.{k}": v for k, v in before.unet.state_dict().items()}
        def text_key(k):
            return f"text_encoder.{k.removeprefix('text_model.')}"
        old |= {text_key(k): v for k, v in before.text_encoder.state_dict().items()}
        new = {f"unet.{k}": v for k, v in run.ema["unet"].state_dict().items()}
        new |= {text_key(k): v for k, v in run.ema["text"].state_dict().items()}
        def same(k):
            return new[k].shape == old[k].shape and new[k].equal(old[k].float())
        part = args.out / "instruct.safetensors.part"
        save_file({k: v.half().contiguous() for k, v in new.items() if not same(k)}, part)
        part.replace(args.out / "instruct.safetensors")

    null = ids_of("").to(device)
    rng = torch.Generator().manual_seed(100 + run.step)

    def batch_loss():
        rows = torch.randint(len(latents), (args.batch,), generator=rng)
        pairs, now = latents[rows].float().to(device), ids[rows].to(device)
        # 5 % without text, 5 % without picture, 5 % without both
        drop = torch.rand(args.batch, generator=rng).to(device)
        now = torch.where((drop < 0.1)[:, None], null, now)
        pairs[:, 0] *= ((drop < 0.05) | (drop > 0.15))[:, None, None, None].float()
        t = draw_timesteps(scheduler, args.batch, rng).to(device)
        noise = torch.randn(pairs[:, 0].shape, generator=rng).to(device)
        return loss_of(unet, text, pairs, now, noise, t)

    run.train(batch_loss, lambda *ema: loss_of(*ema, held, held_ids, held_noise, held_t), export, log)

    pipe = StableDiffusionInstructPix2PixPipeline(vae=vae, text_encoder=run.ema["text"], tokenizer=tokenizer,
                                                  unet=run.ema["unet"], scheduler=scheduler, safety_checker=None,
                                                  feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    def plain(x):
        return augment(x[:32], torch.Generator(), white=1.0, strength=0.0)
    pictures = []
    for before, after, words in zip(plain(source), plain(target), said, strict=False):
        edited = pipe(words, before[None], num_inference_steps=20, guidance_scale=7.5, image_guidance_scale=1.5,
                      generator=torch.Generator().manual_seed(0), output_type="pt").images[0]
        row = (torch.cat([before, edited.cpu().float(), after], 2).permute(1, 2, 0) * 255).round().byte().numpy()
        pictures.append(Image.fromarray(row).resize((3 * 96, 96), Image.BICUBIC))
    labelled(pictures, said[:len(pictures)], args.out / "instruct.png", 4)


# ---- samples and figures ----------------------------------------------------------------------------------

def sample_sheet(pipe, captions, path, guidance=7.5, perturbed=1.5, seed=0, columns=8):
    """DDIM samples with their captions below, from one seed and without selection.

    In addition to classifier-free guidance, perturbed-attention guidance (arXiv 2403.17377) of strength `perturbed`,
    away from the prediction with self-attention replaced by the identity, gives cleaner outlines.
    """
    pipe = StableDiffusionPAGPipeline.from_pipe(pipe, pag_applied_layers=["down", "up"])
    pipe.set_progress_bar_config(disable=True)
    rng, pictures = torch.Generator().manual_seed(seed), []
    for i in range(0, len(captions), 8):
        pictures += pipe(captions[i:i + 8], num_inference_steps=30, guidance_scale=guidance, pag_scale=perturbed,
                         generator=rng, height=SIZE, width=SIZE).images
    labelled([p.resize((128, 128), Image.BICUBIC) for p in pictures], captions, path, columns)


def labelled(pictures, captions, path, columns):
    """Lay out pictures of equal size in rows, with their captions below."""
    wide, high = pictures[0].width + 12, pictures[0].height + 24
    sheet = Image.new("RGB", (columns * wide, -(-len(captions) // columns) * high), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=False)):
        x, y = i % columns * wide + 6, i // columns * high + 4
        sheet.paste(picture, (x, y))
        draw.text((x, y + picture.height + 2), caption[:picture.width * 24 // 128], fill="black")
    sheet.save(path)


@torch.no_grad()
def classify(pipe, pictures, captions, count=200, others=15, noises=8):
    """The share of pictures [N,3,64,64] whose own caption, among `others` + 1, has the smallest noise error.

    A diffusion classifier (Li et al., arXiv 2303.16203): the same `noises` noises, at timesteps from 200 to 900, for
    every caption; the other captions are drawn at random, once for each picture.
    """
    rng, picker = torch.Generator().manual_seed(5), random.Random(0)
    names = sorted(set(captions))
    noise = torch.randn(noises, 4, SIZE // 4, SIZE // 4, generator=rng)
    t = torch.linspace(200, 900, noises).long()
    abar = pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    dtype = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    unet, hits = copy.deepcopy(pipe.unet).to(dtype, memory_format=torch.channels_last), 0
    chosen = torch.randperm(len(pictures), generator=rng)[:count].tolist()
    for i in chosen:
        x0 = pipe.vae.encode(pictures[i:i + 1] * 2 - 1).latent_dist.mean * pipe.vae.config.scaling_factor
        each = [captions[i], *picker.sample([n for n in names if n != captions[i]], others)]
        states = torch.cat([pipe.encode_prompt(c, "cpu", 1, False)[0] for c in each]).repeat_interleave(noises, 0)
        x_t = (abar.sqrt() * x0 + (1 - abar).sqrt() * noise).repeat(len(each), 1, 1, 1)
        eps = unet(x_t.to(dtype), t.repeat(len(each)), states.to(dtype)).sample.float()
        error = (eps - noise.repeat(len(each), 1, 1, 1)).square().mean((1, 2, 3)).view(len(each), noises).mean(1)
        hits += error.argmin().item() == 0
    return hits / len(chosen)


def measure(args, log):
    """Log the model card's figures of the pipeline in --out, and draw samples.png."""
    pipe = StableDiffusionPipeline.from_pretrained(args.out).to(dtype=torch.float32)
    pictures, captions, *_ = items(args.icons, HELD_OUT, args.work, recoloured=False)
    pictures = torch.cat([augment(p, torch.Generator(), white=1.0, strength=0.0) for p in pictures.split(64)])
    with torch.no_grad():
        again = torch.cat([pipe.vae(p * 2 - 1).sample for p in pictures[::12].split(64)]) / 2 + 0.5
    psnr = -10 * (again.clamp(0, 1) - pictures[::12]).square().mean((1, 2, 3)).log10()
    log(f"autoencoder on the held-out styles: {psnr.mean():.2f} dB mean PSNR over {len(psnr)} drawings")
    x0, ids, noise, t = held_out_batch(args, pipe.vae, pipe.tokenizer)
    with torch.no_grad():
        eps = pipe.unet(pipe.scheduler.add_noise(x0, noise, t), t, pipe.text_encoder(ids)[0]).sample
    log(f"loss of the UNet on the held-out styles: {(eps - noise).square().mean():.4f} over {len(t)} drawings")
    count = min(args.drawings, len(pictures))
    accuracy = classify(pipe, pictures, [c[0] for c in captions], count)
    log(f"diffusion classifier on the held-out styles, 16 captions, 8 noises, {count} drawings: {accuracy:.1%}, "
        f"standard error {math.sqrt(accuracy * (1 - accuracy) / count):.1%}")
    sizes = {p: p.stat().st_size / 1e6 for p in args.out.rglob("*") if p.is_file() and "work" not in p.parts}
    own = sum(size for p, size in sizes.items() if p.stem != "instruct")
    log(f"on disk: {own:.1f} MB, instruct.* {sum(sizes.values()) - own:.1f} MB")
    names = sorted(c[0] for c in vocabulary().values())
    sample_sheet(pipe, random.Random(args.seed).sample(names, 64), args.out / "samples.png")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--icons", required=True, help="folder that holds noto/icons.json, twemoji/icons.json, ...")
    p.add_argument("--work", type=Path, default=HERE / "work", help="checkpoints, caches and the log")
    p.add_argument("--out", type=Path, default=HERE, help="where the pipeline is written")
    p.add_argument(
        "--start",
        type=Path,
        help="start from this pipeline and keep its autoencoder; instruct: start from what its editor learned",
    )
    p.add_argument("--flow", action="store_true", help="tune the UNet of --start to the velocity of flow matching")
    p.add_argument("--vae-minutes", type=float, default=17, help="training time of the autoencoder")
    p.add_argument("--minutes", type=float, default=95, help="training time of UNet and text encoder")
    p.add_argument("--rate", type=float, help="peak learning rate of the UNet; 1e-3, or 4e-4 with --start")
    p.add_argument("--batch", type=int, default=96, help="pictures in a UNet step")
    p.add_argument("--threads", type=int, default=2, help="CPU threads")
    p.add_argument("--drawings", type=int, default=200, help="measure: held-out drawings for the classifier")
    p.add_argument("--seed", type=int, default=0, help="measure: seed of the choice of 64 captions")
    p.add_argument(
        "--repaint",
        type=int,
        default=32,
        help="additional pictures in a UNet step that are led from a wrong colour to that of their caption",
    )
    p.add_argument("--repaint-weight", type=float, default=0.5, help="weight of their loss")
    p.add_argument(
        "--keep",
        type=float,
        default=0.6,
        help="share of the last averages in the result; the rest are those with the lowest held-out loss, with "
        "--start usually its own",
    )
    p.add_argument("--pairs", type=int, default=60000, help="instruct: pairs of drawings")
    p.add_argument(
        "--stage",
        choices=["vocabulary", "vae", "all", "instruct", "measure"],
        default="all",
        help="`vae` stops after the autoencoder; `vocabulary` only writes captions.txt, `instruct` only tunes the "
        "pipeline in --out to edit pictures, `measure` only prints its figures",
    )
    args = p.parse_args()
    if args.drawings < 1:
        p.error("--drawings must be at least 1")
    needed = [source(args.icons, s) for s in [*TRAIN, *HELD_OUT] if not (args.work / f"{s}.npz").exists()]
    needed += [args.start / "model_index.json"] if args.start else []
    needed += [source(args.icons, "emojilib")] if args.stage == "vocabulary" else []
    missing = [str(path) for path in needed if not path.exists()]
    if args.flow and not args.start:
        p.error("--flow needs --start, the pipeline to tune")
    if missing:
        p.error(f"{missing[0]}: no such file" + (f"; {len(missing) - 1} more are missing" if missing[1:] else ""))
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.stage == "vocabulary":
        return write_vocabulary(args.icons)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.work.mkdir(parents=True, exist_ok=True)

    def log(line):
        print(line, flush=True)
        with open(args.work / "log.txt", "a") as f:
            f.write(line + "\n")

    if args.stage == "measure":
        return measure(args, log)
    if args.stage == "instruct":
        return train_instruct(args, device, log)
    vae = train_vae(args, device, log)
    if args.stage == "vae":
        return
    train_unet(args, device, vae, log)
    if not args.flow:  # diffusers has no pipeline to sample a flow matching UNet
        measure(args, log)


if __name__ == "__main__":
    main()
