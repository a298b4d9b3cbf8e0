"""Train the judge of edits (bench/judge.py) on the captioned drawings that the prior learns from.

    npm install --prefix /tmp/icons @iconify-json/openmoji @iconify-json/fluent-emoji-high-contrast
    python models/emoji/judge.py --icons /tmp/icons/node_modules/@iconify-json

--icons is the folder that train.py takes, with two more sets. Writes judge.safetensors to this folder, resumes from
--work, and logs how many drawings of the held-out styles the judge names. Training starts from random weights, and its
augmentations differ from those of the prior: blur, posterisation, noise, hidden parts, backgrounds of any colour.
"""
import argparse
import copy
import importlib.util
import math
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from bench.judge import COLOURS, SIDE, Judge, bags, features  # noqa: E402  (the path comes first)

CACHED = 72  # pixels a side of the drawings kept in memory
MORE = ["openmoji", "fluent-emoji-high-contrast"]  # sets that the prior does not learn from: two more styles
SIDES = {0.0: SIDE // 2, 0.25: 3 * SIDE // 4, 0.42: SIDE}  # {share of the time: pixels a side}; small is fast


def load_trainer(path):
    """The prior's training script as a module: the sets, their captions, the recolouring."""
    spec = importlib.util.spec_from_file_location("train", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- data ---------------------------------------------------------------------------------------------

def small(rgba):
    """RGBA uint8 [N,4,128,128] -> premultiplied RGBA uint8 [N,4,CACHED,CACHED]."""
    parts = []
    for x in rgba.split(256):
        x = x.float() / 255
        x = F.interpolate(torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], 1), (CACHED, CACHED), mode="area")
        parts.append((x * 255).round().byte())
    return torch.cat(parts)


def load_items(trainer, args, held_out=False):
    """Small drawings [N,4,h,w] and the lists of their true captions, without drawings that have none."""
    cache = args.work / ("judge-held-out.pt" if held_out else "judge-train.pt")
    if not cache.exists():
        styles = trainer.HELD_OUT if held_out else [*trainer.TRAIN, *MORE]
        rgba, captions, *_ = trainer.items(args.icons, styles, args.sets, recoloured=not held_out)
        kept = [i for i, c in enumerate(captions) if c]
        torch.save((small(rgba[kept]), [captions[i] for i in kept]), cache)
    return torch.load(cache)


def painted(trainer, args, count=600):
    """Recoloured held-out drawings: small drawings, and (noun, colour) for each."""
    cache = args.work / "judge-painted.pt"
    if not cache.exists():
        rgba, captions, *_ = trainer.items(args.icons, trainer.HELD_OUT, args.sets, recoloured=False)
        vocab, picker, pictures, said = trainer.vocabulary(), random.Random(0), [], []
        nouns = [(i, c) for i, names in enumerate(captions) for c in vocab[names[0].replace(" ", "-")] if "COLOUR" in c]
        for i, caption in picker.sample(nouns, len(nouns)):
            found = trainer.dominant(rgba[i])
            if found[3] > 0.3 and len(said) < count:
                colour = COLOURS[len(said) % len(COLOURS)]
                pictures.append(trainer.recolour(rgba[i], colour, None, found))
                said.append((caption.replace("COLOUR ", ""), colour))
        torch.save((small(torch.stack(pictures)), said), cache)
    return torch.load(cache)


def chance(rng, share, count):
    """[count,1,1,1] of zeros and ones; `share` is the probability of a one."""
    return (torch.rand(count, 1, 1, 1, generator=rng) < share).float()


def place(drawings, mirrored, rng, strength, side):
    """Premultiplied RGBA uint8 [B,4,h,w] -> float [B,4,side,side]: rotated, stretched, sheared, tilted and bent."""
    b, u = len(drawings), lambda *shape: torch.rand(*shape, generator=rng) * 2 - 1
    angle = (u(b) + u(b)) / 2 * math.radians(35) * strength
    scale = torch.exp(-(u(b) * 0.22 - 0.06) * strength)
    stretch, shear = torch.exp(u(b) * 0.15 * strength), u(b) * 0.2 * strength
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = u(b, 2) * 0.12 * strength[:, None]
    theta = torch.stack([torch.stack([cos * stretch, -sin + shear, shift[:, 0]], 1),
                         torch.stack([sin, cos / stretch, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, (b, 4, side, side), align_corners=False)
    grid = grid / (1 + (grid * u(b, 1, 1, 2) * 0.2 * strength.view(-1, 1, 1, 1)).sum(-1, keepdim=True))
    bend = torch.randn(b, 2, 5, 5, generator=rng) * 0.08 * strength.view(-1, 1, 1, 1)
    grid = grid + F.interpolate(bend, (side, side), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    grid = grid * torch.stack([1 - 2.0 * mirrored, torch.ones(b)], 1)[:, None, None]
    x = drawings.float() / 255
    x = F.interpolate(x, (side * CACHED // SIDE,) * 2, mode="area") if side < SIDE else x
    return F.grid_sample(x, grid, align_corners=False)


def tone(x, rng, strength):
    """Vary the style of RGBA drawings: contrast, saturation, colour cast, thicker outlines, smoothed details."""
    b, u = len(x), lambda *shape: (torch.rand(*shape, 1, 1, generator=rng) * 2 - 1) * strength.view(-1, 1, 1, 1)
    rgb, alpha = x[:, :3], x[:, 3:]
    rgb = (rgb / alpha.clamp(min=1e-3)).clamp(0, 1) ** (0.6 * u(b, 1) + 0.15 * u(b, 3)).exp()
    some = chance(rng, 0.15, b).view(b) > 0
    if some.any():  # a morphological closing removes dark lines
        rgb[some] = -F.max_pool2d(-F.max_pool2d(rgb[some], 3, 1, 1), 3, 1, 1)
    grey = rgb.mean(1, keepdim=True)
    rgb = grey + (rgb - grey) * (0.95 + 0.3 * u(b, 1)) + 0.05 * u(b, 3)
    middle = (rgb * alpha).sum((2, 3), keepdim=True) / alpha.sum((2, 3), keepdim=True).clamp(min=1)
    rgb = (middle + (rgb - middle) * (1 + 0.25 * u(b, 1)) + 0.08 * u(b, 1)).clamp(0, 1)
    ink, wider, edges = torch.rand(b, 3, 1, 1, generator=rng) * 0.35, alpha.clone(), torch.zeros_like(alpha)
    around, inside = (chance(rng, 0.25, b).view(b) > 0 for _ in range(2))
    wider[around] = F.max_pool2d(alpha[around], 3, 1, 1)
    edges[inside] = 0.8 * (alpha[inside] + F.max_pool2d(-alpha[inside], 3, 1, 1)).clamp(0, 1)
    return (rgb * (1 - edges) + ink * edges) * alpha + ink * (wider - alpha), wider


def spoil(x, rng):
    """Blur, posterise, add noise to or hide a part of some of the pictures [B,3,side,side]."""
    b, side, u = len(x), x.shape[-1], lambda *shape: torch.rand(*shape, generator=rng)
    some = u(b) < 0.2
    blurred = F.pad(x[some], (1, 1, 1, 1), "replicate")
    blurred = (blurred[..., 2:] + blurred[..., 1:-1] + blurred[..., :-2]) / 3
    x[some] = (blurred[..., 2:, :] + blurred[..., 1:-1, :] + blurred[..., :-2, :]) / 3
    some = u(b) < 0.06
    levels = 2 + (6 * u(len(x[some]), 1, 1, 1)).round()
    x[some] = (x[some] * levels).round() / levels
    some = u(b) < 0.15
    x[some] += torch.randn(x[some].shape, generator=rng) * 0.1 * u(len(x[some]), 1, 1, 1)
    line, centre, half = torch.linspace(0, 1, side), u(b, 2, 1), 0.05 + 0.17 * u(b, 2, 1)
    within = ((line - centre).abs() < half).float()  # [B,2,side]
    hidden = (within[:, 0, :, None] * within[:, 1, None, :])[:, None] * chance(rng, 0.4, b)
    return (x * (1 - hidden) + u(b, 3, 1, 1) * hidden).clamp(0, 1)


def distort(drawings, mirrored, rng, side=SIDE):
    """Premultiplied RGBA uint8 [B,4,h,w] -> RGB [B,3,side,side] in [0,1]: all augmentations at random strengths."""
    b = len(drawings)
    strength = torch.rand(b, generator=rng).sqrt()
    rgb, alpha = tone(place(drawings, mirrored, rng, strength, side), rng, strength)
    plain = 1 - torch.rand(b, 3, 1, 1, generator=rng) * torch.rand(b, 1, 1, 1, generator=rng)
    background = torch.where(chance(rng, 0.65, b) > 0, torch.ones(()), plain)
    return spoil(rgb + (1 - alpha) * background, rng)


def plain(drawings, side=SIDE):
    """Small drawings on white without augmentation: [B,3,side,side]."""
    x = F.interpolate(drawings.float() / 255, (side, side), mode="bilinear", antialias=True)
    return (x[:, :3] + 1 - x[:, 3:]).clamp(0, 1)


# ---- captions -----------------------------------------------------------------------------------------

class Captions:
    """All captions, and for each drawing the rows of captions that are true of it and of those that may be."""

    def __init__(self, vocab, captions):
        nouns = {names[0]: [c.replace("COLOUR ", "") for c in names if "COLOUR" in c] for names in vocab.values()}
        said = {c for names in vocab.values() for c in names if "COLOUR" not in c}
        said |= {f"{colour} {n}" for some in nouns.values() for n in some for colour in COLOURS}
        self.texts = sorted(said.union(*captions))
        self.row = {c: i for i, c in enumerate(self.texts)}
        self.true = [[self.row[c] for c in names] for names in captions]
        self.open = []  # possibly true captions, such as "red car" for a car whose colour is not named
        for names in captions:
            some = [] if any(c.split()[0] in COLOURS for c in names) else nouns.get(names[0], [])
            self.open.append([self.row[f"{colour} {n}"] for n in some for colour in COLOURS])
        self.names = torch.tensor([self.row[name] for name in nouns])
        self.others = torch.tensor(sorted({*range(len(self.texts))}.difference(self.names.tolist())))
        self.features = [features(text) for text in self.texts]
        counts = Counter(names[0] for names in captions)
        self.shares = torch.tensor([(1.0 if names[0] in nouns else 0.1) / counts[names[0]] for names in captions])

    def targets(self, drawings, picker, rng, others=1200):
        """The captions of a batch: rows [N] of all names, of the targets and of some `others`; the position [B] of each
        drawing's target among them, its name with probability 0.6; a mask [B,N] of captions that do not count."""
        wanted = [self.true[i][0] if picker.random() < 0.6 else picker.choice(self.true[i]) for i in drawings]
        alike = [self.row[f"{colour} {self.texts[w].partition(' ')[2]}"] for w in wanted for colour in COLOURS
                 if self.texts[w].split()[0] in COLOURS and f"{colour} {self.texts[w].partition(' ')[2]}" in self.row]
        some = self.others[torch.randperm(len(self.others), generator=rng)[:others]]
        rows = torch.cat([self.names, some, torch.tensor(wanted + alike)]).unique()
        mask = torch.zeros(len(drawings), len(self.texts), dtype=torch.bool)
        for k, i in enumerate(drawings):
            mask[k, self.true[i] + self.open[i]] = True
            mask[k, wanted[k]] = False
        return rows, torch.searchsorted(rows, torch.tensor(wanted)), mask[:, rows]


def groups(vocab):
    """The names of the vocabulary, each with its plain synonyms."""
    return [[c for c in names if "COLOUR" not in c] for names in vocab.values()]


# ---- training -----------------------------------------------------------------------------------------

def mix_styles(x, rng):
    """Feature maps [B,C,h,w], half of them with means and deviations mixed with those of another picture, which changes
    the style of a drawing (MixStyle, Zhou et al., arXiv 2104.02008)."""
    mean, std = (f.detach() for f in (x.mean((2, 3), keepdim=True), (x.var((2, 3), keepdim=True) + 1e-5).sqrt()))
    other = torch.randperm(len(x), generator=rng)
    share = (chance(rng, 0.5, len(x)) * torch.rand(len(x), 1, 1, 1, generator=rng) * 0.5).to(x.dtype)
    return (x - mean) / std * std.lerp(std[other], share) + mean.lerp(mean[other], share)


class Run:
    """The training run: judge, its moving average, optimiser, processor minutes; checkpoints are written atomically."""

    def __init__(self, path, minutes, peak):
        torch.manual_seed(0)
        self.path, self.minutes, self.peak = path, minutes, peak
        self.judge = Judge().to(memory_format=torch.channels_last)
        decayed = [p for p in self.judge.parameters() if p.ndim > 1]
        others = [p for p in self.judge.parameters() if p.ndim < 2]
        self.optimiser = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=peak,
                                           betas=(0.9, 0.98), weight_decay=0.2)
        self.ema = copy.deepcopy(self.judge).eval().requires_grad_(False)
        self.step, self.spent, self.saved, self.clock = 0, 0.0, 0.0, time.process_time()
        if path.exists():
            state = torch.load(path)
            self.judge.load_state_dict(state["judge"])
            self.ema.load_state_dict(state["ema"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, self.spent = state["step"], state["spent"]
            self.saved = self.spent

    def update(self, loss, decay=0.998):
        done = min(self.spent / self.minutes, 1)
        rate = self.peak * min(done / 0.03, 0.5 * (1 + math.cos(math.pi * done)))
        for group in self.optimiser.param_groups:
            group["lr"] = max(rate, 1e-6)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.judge.parameters(), 1.0)
        self.optimiser.step()
        decay = min(decay, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            self.judge.scale.clamp_(max=math.log(30))
            for old, new in zip(self.ema.state_dict().values(), self.judge.state_dict().values(), strict=True):
                old.lerp_(new, 1 - decay) if old.is_floating_point() else old.copy_(new)
        self.step += 1
        now = time.process_time()
        self.spent, self.clock = self.spent + (now - self.clock) / 60, now

    def save(self):
        state = dict(judge=self.judge.state_dict(), ema=self.ema.state_dict(), optimiser=self.optimiser.state_dict(),
                     step=self.step, spent=self.spent)
        torch.save(state, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").replace(self.path)
        self.saved = self.spent


def train(trainer, args, log):
    drawings, captions = load_items(trainer, args)
    said = Captions(trainer.vocabulary(), captions)
    mirrorable = torch.tensor([not trainer.HANDED.search(" ".join(names)) for names in captions])
    run = Run(args.work / "judge.pt", args.minutes, 2e-3)
    count = sum(p.numel() for p in run.judge.parameters())
    log(f"{len(drawings)} drawings, {len(said.texts)} captions, {count / 1e6:.2f} M parameters")
    rng, picker, mean = torch.Generator().manual_seed(run.step), random.Random(run.step), 0.0
    for stage in run.judge.stages[:2]:
        stage.register_forward_hook(lambda module, _, out: mix_styles(out, rng) if module.training else None)
    run.judge.train()
    run.clock = time.process_time()
    while run.spent < args.minutes:
        rows = torch.multinomial(said.shares, args.batch, replacement=True, generator=rng)
        side = [size for start, size in SIDES.items() if run.spent >= start * args.minutes][-1]
        x = distort(drawings[rows], mirrorable[rows] & (torch.rand(args.batch, generator=rng) < 0.4), rng, side)
        texts, wanted, hidden = said.targets(rows.tolist(), picker, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            seen = run.judge.look(x)
        read = run.judge.embed(*bags([said.features[i] for i in texts.tolist()]))
        logits = run.judge.scale.exp() * seen.float() @ read.T
        loss = F.cross_entropy(logits.masked_fill(hidden, -1e4), wanted)
        run.update(loss)
        mean += 0.02 * (loss.item() - mean) if mean else loss.item()
        if run.step % 100 == 0:
            log(f"step {run.step} {run.spent:.1f} min loss {mean:.3f} scale {run.judge.scale.exp().item():.1f}")
        if run.spent - run.saved > 6 or run.spent >= args.minutes:
            run.save()
            measure(trainer, args, run.ema, log, side)
    settle(run.ema, drawings, said, log)
    measure(trainer, args, run.ema, log)
    return run.ema


def settle(judge, drawings, said, log, steps=1500, rate=1e-3):
    """Fit the text tower alone to the sum of its vectors and the mean vectors of the plain training drawings of each
    caption, because the centre of a class names new drawings better than the vector of its caption."""
    seen = see_all(judge, drawings)
    rows = torch.tensor([row for true in said.true for row in true])
    owners = torch.tensor([i for i, true in enumerate(said.true) for _ in true])
    with torch.no_grad():
        own = judge.read(said.texts)
        wanted = F.normalize(own + F.normalize(torch.zeros_like(own).index_add_(0, rows, seen[owners]), dim=1), dim=1)
    weights = [p.requires_grad_() for part in (judge.table, judge.words) for p in part.parameters()]
    optimiser, rng = torch.optim.Adam(weights, lr=rate), torch.Generator().manual_seed(0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
        some = torch.cat([said.names, said.others[torch.randperm(len(said.others), generator=rng)[:1200]]])
        read = judge.embed(*bags([said.features[i] for i in some.tolist()]))
        loss = 1 - (read * wanted[some]).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    judge.requires_grad_(False)
    log(f"  text tower settled, {loss.item():.4f} from the centres (cosine)")


# ---- figures ------------------------------------------------------------------------------------------

@torch.no_grad()
def see_all(judge, drawings, side=SIDE):
    """Small drawings without augmentation, at `side` pixels -> unit vectors [N,D]."""
    return torch.cat([judge.look(plain(x, side)) for x in drawings.split(128)])


@torch.no_grad()
def measure(trainer, args, judge, log, side=SIDE):
    """Log top-1 and top-5 among all names and the accuracy of colours on the held-out styles."""
    drawings, captions = load_items(trainer, args, held_out=True)
    names = [group[0] for group in groups(trainer.vocabulary())]
    own = torch.tensor([[names.index(c[0])] for c in captions])
    scores = see_all(judge, drawings, side) @ judge.read(names).T
    rank = (scores > scores.gather(1, own)).sum(1)
    first = len(trainer.render_icons(args.icons, trainer.HELD_OUT[0], args.sets)[0])
    for style, some in zip([*trainer.HELD_OUT, "both"], (rank[:first], rank[first:], rank), strict=True):
        log(f"  {style}: top-1 {(some < 1).float().mean():.1%}, top-5 {(some < 5).float().mean():.1%} of {len(some)} "
            f"among {len(names)} names, {side} pixels")
    pictures, said = painted(trainer, args)
    texts = judge.read([f"{colour} {noun}" for noun, _ in said for colour in COLOURS]).unflatten(0, (len(said), -1))
    cosines = (see_all(judge, pictures, side)[:, None] * texts).sum(-1)
    right = cosines.argmax(1) == torch.tensor([COLOURS.index(colour) for _, colour in said])
    each = sorted((right[i::len(COLOURS)].float().mean().item(), name) for i, name in enumerate(COLOURS))
    least = ", ".join(f"{name} {share:.0%}" for share, name in each[:3])
    log(f"  colours: {right.float().mean():.1%} of {len(said)}, lowest for {least}")


@torch.no_grad()
def margins(trainer, args, judge):
    """The cosine of each held-out drawing with its own name minus that with another name: [N,2], for a random name and
    for a name that shares a word."""
    drawings, captions = load_items(trainer, args, held_out=True)
    names, picker = sorted({c[0] for c in captions}), random.Random(0)
    like = trainer.alike(names)
    others = [(picker.choice([n for n in names if n != c[0]]), picker.choice(like[c[0]])) for c in captions]
    seen = see_all(judge, drawings)
    own = (seen * judge.read([c[0] for c in captions])).sum(1)
    return torch.stack([own - (seen * judge.read(list(other))).sum(1) for other in zip(*others, strict=True)], 1)


def fit_scale(margins):
    """The maximum-likelihood scale of margins [N]: sigmoid(scale * margin) is the probability of the right name."""
    scales = torch.logspace(0, 2, 200)
    return scales[F.softplus(-margins.view(-1, 1) * scales).mean(0).argmin()].item()


def calibration(margins, scale):
    """For margins [N]: the share above 0, the mean probability of the preferred name, and the expected calibration
    error over ten bins of that probability from 0.5 to 1."""
    sure, right = (scale * margins.abs()).sigmoid(), (margins > 0).float()
    bins = ((sure - 0.5) * 20).long().clamp(max=9)
    error = sum((right[bins == k].mean() - sure[bins == k].mean()).abs() * (bins == k).float().mean()
                for k in bins.unique())
    return right.mean().item(), sure.mean().item(), error.item()


def calibrate(trainer, args, judge, log):
    """Fit `scale` to pairs of names of the first held-out style; log the calibration of `prefers` on the second."""
    found = margins(trainer, args, judge)
    first = len(trainer.render_icons(args.icons, trainer.HELD_OUT[0], args.sets)[0])
    scale = fit_scale(found[:first].flatten())
    judge.scale.data.fill_(math.log(scale))
    for kind, some in zip(("any name", "a name that shares a word", "both"), (
            found[first:, 0], found[first:, 1], found[first:].flatten()), strict=True):
        right, sure, error = calibration(some, scale)
        log(f"  pairs of {trainer.HELD_OUT[1]} with {kind}: right {right:.1%}, mean probability {sure:.1%}, "
            f"calibration error {error:.3f}, scale {scale:.1f}")


def export(judge, path):
    """Write the judge in float16."""
    state = {k: v.half().contiguous() for k, v in judge.state_dict().items() if v.is_floating_point()}
    save_file(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--icons", required=True, help="folder that holds noto/icons.json, twemoji/icons.json, ...")
    p.add_argument("--work", type=Path, default=HERE / "work", help="checkpoint, caches and the log")
    p.add_argument("--sets", type=Path, help="where train.py cached the rendered sets (default: --work)")
    p.add_argument("--trainer", type=Path, default=HERE / "train.py", help="the prior's training script")
    p.add_argument("--out", type=Path, default=HERE, help="where judge.safetensors is written")
    p.add_argument("--minutes", type=float, default=110, help="training time, of the processor")
    p.add_argument("--batch", type=int, default=96, help="drawings in a step")
    p.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = p.parse_args()
    args.sets = args.sets or args.work
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)

    def log(line):
        print(line, flush=True)
        with open(args.work / "judge-log.txt", "a") as f:
            f.write(line + "\n")
    trainer = load_trainer(args.trainer)
    judge = train(trainer, args, log)
    calibrate(trainer, args, judge, log)
    export(judge, args.out / "judge.safetensors")


if __name__ == "__main__":
    main()
