"""The judge of edits: a small contrastive model of pictures and captions that shares nothing with the prior.

An image tower (convolutions, 64 pixels a side) and a text tower (hashed words and trigrams) compute unit vectors. Their
cosine says how well a caption fits a picture, as in CLIP (Radford et al., arXiv 2103.00020). models/emoji/judge.py is
the training script.

    judge = load("models/emoji")
    judge.scores(before, after, "a pear", "a red apple")  # lists of PIL pictures -> {"named": 1.0, ...}
"""
import re
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from files.messages import one_line
from pipelines.captions import plain

SIDE, WIDTHS, DEPTHS = 64, (32, 64, 128, 192), (0, 1, 2, 1)  # pixels a side; channels and residual blocks of a stage
BUCKETS, WORD, EMBEDDING = 4096, 64, 128  # rows and width of the table of words, size of the shared space
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "grey", "black")
UNSAID = re.compile(r"^((an?|the) )?(emoji|picture|drawing|photo|image) of |\b(an?|the)\b")  # adds nothing to a caption


def features(caption):
    """A caption as its words and the trigrams of their letters: rows of the table [n], and their weights [n].

    Each has two rows (its crc32 with two prefixes), so that hardly any two collide in both. A word has weight 1,
    its trigrams share a weight of 1: an unknown word gets its meaning from its spelling, as far as possible.
    """
    words = re.findall("[a-z0-9]+", UNSAID.sub("", caption.lower().replace("gray", "grey")))
    trigrams = [f"<{w}>"[i:i + 3] for w in words for i in range(len(w))]
    rows = {}
    for texts, weight in (([f"={w}" for w in words], 1.0), (trigrams, 1 / max(len(trigrams), 1))):
        for row in (zlib.crc32((prefix + t).encode()) % BUCKETS for t in texts for prefix in "ab"):
            rows[row] = rows.get(row, 0) + weight
    rows = rows or {0: 1.0}
    return np.array([*rows]), np.array([*rows.values()], np.float32)


class Block(nn.Module):
    """A residual block: two 3 x 3 convolutions with batch normalisation."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x):
        return F.relu(x + self.norms[1](self.second(F.relu(self.norms[0](self.first(x))))))


class Judge(nn.Module):
    """Both towers. names: lists of synonymous captions, the name first; they compete with the target of an edit."""

    def __init__(self, names=()):
        super().__init__()
        stages, last = [], 3
        for i, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
            size = 3 if i else 5
            down = nn.Conv2d(last, width, size, 2, size // 2, bias=False)
            stages.append(nn.Sequential(down, nn.BatchNorm2d(width), nn.ReLU(), *(Block(width) for _ in range(depth))))
            last = width
        self.stages, self.head = nn.Sequential(*stages), nn.Sequential(nn.Dropout(0.15), nn.Linear(last, EMBEDDING))
        self.table = nn.EmbeddingBag(BUCKETS, WORD, mode="sum")
        self.words = nn.Sequential(nn.LayerNorm(WORD), nn.Linear(WORD, 2 * WORD), nn.GELU(),
                                   nn.Linear(2 * WORD, EMBEDDING))
        self.scale = nn.Parameter(torch.tensor(2.7))  # logits are its exponential times the cosines
        self.names = [list(group) for group in names]

    def see(self, pictures):
        """Pictures [B,3,H,W] in [0,1] -> unit vectors [B,D]."""
        if pictures.shape[-2:] != (SIDE, SIDE):
            pictures = F.interpolate(pictures, (SIDE, SIDE), mode="area")
        return self.look(pictures)

    def look(self, pictures):
        """Like `see`, but without resizing the pictures."""
        x = (pictures * 2 - 1).contiguous(memory_format=torch.channels_last)
        return F.normalize(self.head(self.stages(x).mean((2, 3))).float(), dim=1)

    def read(self, captions):
        """N captions -> unit vectors [N,D]."""
        return self.embed(*bags([features(c) for c in captions]))

    def embed(self, rows, weights, starts):
        """The output of `bags` -> unit vectors [N,D]."""
        return F.normalize(self.words(self.table(rows, starts, per_sample_weights=weights)), dim=1)

    @torch.no_grad()
    def reads_as(self, pictures, target, count=5):
        """Whether `target` is among the `count` best names in the vocabulary for each picture, [B] bool.

        A synonym counts as its name. A target that names a colour ("red umbrella") must also beat the same words with
        every other one of COLOURS.
        """
        seen, wanted = self.see(pictures), plain(target)
        others = [group for group in self.names if wanted not in group]
        scores = seen @ self.read([target, *(group[0] for group in others)]).T
        found = (scores[:, 1:] > scores[:, :1]).sum(1) < count
        words = wanted.replace("gray", "grey").split()
        own = next((i for i, word in enumerate(words) if word in COLOURS), None)
        if own is not None:
            painted = seen @ self.read([" ".join([*words[:own], c, *words[own + 1:]]) for c in COLOURS]).T
            found &= painted.argmax(1) == COLOURS.index(words[own])
        return found

    @torch.no_grad()
    def prefers(self, pictures, target, source):
        """The probability [B] that pictures show `target` rather than `source`; `scale` is calibrated for this."""
        y_tgt, y_src = self.read([target, source])
        return (self.scale.exp() * (self.see(pictures) @ (y_tgt - y_src))).sigmoid()

    @torch.no_grad()
    def scores(self, before, after, source, target):
        """Figures of an edit, means over its pictures; before, after: lists of PIL pictures.

        named: the share of the pictures that `reads_as` accepts. direction: the cosine of the changes of pictures and
        captions (Gal et al., StyleGAN-NADA, arXiv 2108.00946), 0 without a change. before, after: the probability of
        the target by `prefers`, of the source pictures and of the edited ones.
        """
        was, now = (torch.cat([tensor_of(p) for p in pictures]) for pictures in (before, after))
        y_src, y_tgt = self.read([source, target])
        change = F.cosine_similarity(self.see(now) - self.see(was), y_tgt - y_src)
        return {"named": self.reads_as(now, target).float().mean().item(), "direction": change.mean().item(),
                "before": self.prefers(was, target, source).mean().item(),
                "after": self.prefers(now, target, source).mean().item()}


def tensor_of(picture):
    """PIL picture -> [1,3,SIDE,SIDE] in [0,1] on white."""
    picture = picture.convert("RGBA")
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture)
    small = np.asarray(page.convert("RGB").resize((SIDE, SIDE), Image.BOX), np.float32)
    return torch.from_numpy(small.transpose(2, 0, 1)[None]) / 255


def load(folder):
    """Load the judge from judge.safetensors and captions.txt in a folder; raises ValueError in one line."""
    path, listed = Path(folder) / "judge.safetensors", Path(folder) / "captions.txt"
    missing = [str(file) for file in (path, listed) if not file.is_file()]
    if missing:
        raise ValueError(f"{missing[0]}: no such file; a judge is judge.safetensors and captions.txt")
    try:
        lines = [line for line in listed.read_text(encoding="utf-8").splitlines() if line[:1] not in "#"]
        judge = Judge([[plain(c) for c in line.split("|") if "COLOUR" not in c] for line in lines])
        state = load_file(path)
        wrong = [name for name, value in judge.state_dict().items() if value.is_floating_point()
                 and (name not in state or state[name].shape != value.shape or not state[name].isfinite().all())]
        if wrong or not lines:
            raise ValueError(f"{wrong[0]} is missing, or of another shape, or not finite" if wrong else "no captions")
        judge.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    except (OSError, ValueError, SafetensorError) as e:
        raise ValueError(f"{path}: no readable judge: {one_line(e, 100)}") from e
    return judge.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def bags(found):
    """The `features` of N captions for nn.EmbeddingBag: rows of the table, their weights, the start of each caption."""
    rows, weights = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*found, strict=True))
    return rows, weights, torch.from_numpy(np.cumsum([0, *(len(r) for r, _ in found)])[:-1])
