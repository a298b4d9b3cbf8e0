"""How well a prior knows colours: `python -m bench colours ICONS` and `python -m bench colours-pull ICONS`.

ICONS is the folder of icon sets that models/emoji/train.py takes; the drawings are those of its held-out styles,
recoloured by its functions. The probe classifies the colour of a drawing, one of eleven, by the diffusion classifier
(Li et al., arXiv 2303.16203). The pull test measures how far one denoising step moves a drawing in a wrong colour
towards the colour of its caption.
"""
import importlib.util
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from bench.judge import COLOURS
from bench.measure import table
from prior import Prior

# The drawings of the pull test: set and name, wrong colour, caption, right colour.
PULLED = [("noto-v1", "umbrella", "brown", "red umbrella", "red"), ("noto-v1", "bear", "grey", "polar bear", "white"),
          ("noto-v1", "bear", "slate", "polar bear", "white"), ("emojione", "fox", "turquoise", "fox", "orange"),
          ("noto-v1", "wolf", "turquoise", "fox", "orange"),
          ("emojione", "slightly-smiling-face", "purple", "slightly smiling face", "yellow"),
          ("emojione", "slightly-smiling-face", "purple", "smiling face with sunglasses", "yellow"),
          ("emojione", "slightly-smiling-face", "green", "smiling face with sunglasses", "yellow"),
          ("noto-v1", "t-shirt", "brown", "red t shirt", "red"), ("emojione", "red-apple", "pink", "red apple", "red")]
MORE = {"turquoise": (64, 192, 176), "slate": (124, 144, 170)}  # colours without a name in train.py


def load_trainer(path):
    """The prior's training script as a module; raises ValueError if it is missing."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; it is the training script of the prior")
    spec = importlib.util.spec_from_file_location("trainer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def held_out(trainer, args):
    """The drawings of the held-out styles: {style: (their names, RGBA uint8 [N,4,128,128])}."""
    args.work.mkdir(parents=True, exist_ok=True)
    return {style: trainer.render_icons(args.icons, style, args.work) for style in trainer.HELD_OUT}


def drawings(trainer, args):
    """Those of all held-out styles: their names, and RGBA uint8 [N,4,128,128]."""
    sets = held_out(trainer, args).values()
    return [name for names, _ in sets for name in names], torch.cat([rgba for _, rgba in sets])


def flat(trainer, rgba):
    """RGBA uint8 [4,128,128] -> RGB [1,3,64,64] in [0,1] on white, as in the prior's training without augmentation."""
    return trainer.augment(rgba[None], torch.Generator(), white=1.0, strength=0.0)


def painted(trainer, names, rgba, count, seed=0, colours=COLOURS):
    """`count` nouns in each of the colours, one drawing for each noun: [(picture [1,3,64,64], noun, colour)]."""
    vocab, found, seen = trainer.vocabulary(), [], set()
    nouns = {n: [c[7:] for c in vocab[n] if c.startswith("COLOUR ")] for n in names}
    able = [i for i, n in enumerate(names) if nouns[n]]
    for i in random.Random(seed).sample(able, len(able)):
        paint = trainer.dominant(rgba[i])
        if paint[3] > 0.3 and names[i] not in seen and len(seen) < count:
            seen.add(names[i])
            found += [(flat(trainer, trainer.recolour(rgba[i], colour, None, paint)), nouns[names[i]][0], colour)
                      for colour in colours]
    return found


def natural(trainer, names, rgba, count, seed=0, colours=COLOURS):
    """At most `count` drawings of each colour, as their sets draw them: [(picture [1,3,64,64], noun, colour)]."""
    vocab, picker, found, counts = trainer.vocabulary(), random.Random(seed), [], Counter()
    for i in picker.sample(range(len(names)), len(names)):
        nouns = [c[7:] for c in vocab[names[i]] if c.startswith("COLOUR ")]
        colour = trainer.colour_of(trainer.dominant(rgba[i])) if nouns else None
        if colour in colours and counts[colour] < count:
            counts[colour] += 1
            found.append((flat(trainer, rgba[i]), nouns[0], colour))
    return found


@torch.no_grad()
def errors(prior, picture, captions, t, noise):
    """[captions,noises] noise errors of one picture [1,3,H,W] at the timesteps t [noises] and noises [noises,C,h,w]."""
    x0, abar = prior.encode(picture), prior.abar[t].float().view(-1, 1, 1, 1)
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    parts = zip(*(prior.embed(caption) for caption in captions), strict=True)
    y = tuple(torch.cat(part).repeat_interleave(len(t), 0) for part in parts)
    eps = prior.eps(x_t.repeat(len(captions), 1, 1, 1), t.repeat(len(captions)), y)
    return (eps - noise.repeat(len(captions), 1, 1, 1)).square().mean((1, 2, 3)).view(len(captions), len(t))


def hits(prior, items, noises=8, low=4, colours=COLOURS):
    """Whether the diffusion classifier finds the colour of each item among `colours`, [N,2] bool: at `noises` timesteps
    from 200 to 900, and at t = 300 alone with the first `low` noises. The prior must have guidance 1."""
    shape = prior.encode(items[0][0]).shape[1:]
    noise = torch.randn(max(noises, low), *shape, generator=torch.Generator().manual_seed(5))
    t = torch.cat([torch.linspace(200, 900, noises).long(), torch.full((low,), 300)])
    noise, found = torch.cat([noise[:noises], noise[:low]]), []
    for picture, noun, colour in items:
        error = errors(prior, picture, [f"{c} {noun}" for c in colours], t, noise)
        own = colours.index(colour)
        found.append([error[:, :noises].sum(1).argmin() == own, error[:, noises:].sum(1).argmin() == own])
    return torch.tensor(found)


def colours(args):
    """The colour probe on recoloured and on original drawings; returns the number of bars missed."""
    fast = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None  # elsewhere far slower than float32
    trainer, prior = load_trainer(args.trainer), load_prior(args.model, fast).at(1.0)
    names, rgba = drawings(trainer, args)
    missed, among = 0, args.among
    for title, items, bar in (
            (f"{args.nouns} nouns in {len(among)} colours",
             painted(trainer, names, rgba, args.nouns, colours=among), 0.95),
            ("drawings in their original colours", natural(trainer, names, rgba, args.natural, colours=among), None)):
        if not items:
            continue
        found = hits(prior, items, args.noises, colours=among).double()
        rows = [(f"which of {len(among)} colours, {len(items)} drawings", f"{found[:, 0].mean():.1%}",
                 f">= {bar:.0%}" if bar else "", found[:, 0].mean().item() >= bar if bar else None),
                ("at t = 300", f"{found[:, 1].mean():.1%}", "", None)]
        for colour in among:
            own = torch.tensor([c == colour for *_, c in items])
            if own.any():
                rows.append((f"{colour} ({own.sum()})", "{:.0%}, {:.0%}".format(*found[own].mean(0)), "", None))
        missed += table(f"{args.model}: {title}", rows)
    return missed


def load_prior(model, dtype=None):
    """The prior without its list of captions, so that it does not warn of unknown ones."""
    prior = Prior.from_pretrained(model, dtype=dtype)
    prior.captions = []
    return prior


@torch.no_grad()
def shares(prior, trainer, rgba, wrong, caption, right, noises, steps=(350, 500)):
    """How far one denoising step at guidance 8 moves a wrong colour towards the right one, a share for each t.

    The change of the mean colour of the painted region, in the decoded prediction of x0, is projected onto the
    difference between the right and the wrong colour and averaged over `noises` noises. 0: unchanged, 1: the right one.
    """
    paint = trainer.dominant(rgba)
    mask = torch.nn.functional.interpolate(torch.from_numpy(paint[1] * rgba[3].numpy() / 255)[None, None].float(),
                                           (prior.size, prior.size), mode="area")

    def mean(picture):  # [B,3,H,W] -> [B,3]
        return (picture * mask).sum((2, 3)) / mask.sum()
    first, last = (flat(trainer, trainer.recolour(rgba, colour, None, paint)) for colour in (wrong, right))
    x0, way, found = prior.encode(first), (mean(last) - mean(first))[0], []
    noise = torch.randn(noises, *x0.shape[1:], generator=torch.Generator().manual_seed(0))
    guided, y = prior.at(8.0), prior.embed(caption)
    for t in steps:
        abar = prior.abar[t].float()
        eps = guided.eps(abar.sqrt() * x0 + (1 - abar).sqrt() * noise, torch.full((noises,), t), y)
        gone = mean(prior.decode(x0 + (1 / abar - 1).sqrt() * (noise - eps))) - mean(first)
        found.append((gone @ way / way.square().sum()).mean().item())
    return found


def pull(args):
    """The pull test on ten drawings in wrong colours; returns the number of bars missed."""
    trainer, prior = load_trainer(args.trainer), load_prior(args.model)
    trainer.PAINTED.update({name: trainer.to_lab(np.array([rgb]) / 255) for name, rgb in MORE.items()})
    sets = held_out(trainer, args)
    found = [shares(prior, trainer, rgba[names.index(name)], wrong, caption, right, args.noises)
             for style, name, wrong, caption, right in PULLED for names, rgba in [sets[style]]]
    rows = [(f"{wrong} {name} as {caption}", "{:.2f}, {:.2f}".format(*share), "", None)
            for (_, name, wrong, caption, _), share in zip(PULLED, found, strict=True)]
    means = np.mean(found, 0)
    rows += [(f"mean at t = {t}", f"{mean:.3f}", f">= {bar}", bool(mean >= bar))
             for t, mean, bar in zip((350, 500), means, (0.45, 0.6), strict=True)]
    return table(f"{args.model}: share of the way back to the captioned colour, t = 350 and 500", rows)
