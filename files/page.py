"""index.html of a run and of a list of edits: one file that opens from disk, shows everything and loads nothing.

    write(out / "index.html", run_page("red apple", "green apple", "PDS", pairs, frames, figures, settings, command))
    write(out / "index.html", edits_page("10 edits", rows))

Everything that a user has written is escaped. A drawing is embedded as the picture of an <img>, where browsers run no
scripts and load nothing; the page's policy allows its own script and pictures in data URIs alone.
"""
import base64
import hashlib
import html
import io
from pathlib import Path
from string import Template

from PIL import Image

HERE = Path(__file__).resolve().parent
LONGEST = 1024  # pixels of the longer side of a picture


def run_page(source, target, title, pairs, shape, frames, figures, settings, command):
    """The page of one run, a str.

    Args:
        source, target: the prompts; title: of the method.
        pairs: (before, after) of one or more views, in the order of a turn; each a PIL picture or an SVG's bytes.
        shape: (width, height) of them all, up to a factor.
        frames: of the progress, PIL pictures.
        figures, settings: {name: value}.
        command: that makes it again.
    """
    befores, afters = zip(*pairs, strict=True)
    turn = f'<label>turn {_slider(".turn", len(pairs))}</label>' if len(pairs) > 1 else ""
    body = f"""<h1>{_text(source)} <i>&rarr;</i> {_text(target)}</h1>
<p class="lead">{_text(title)}</p>
<div class="grid"><section><h2>Before and after</h2>
<div class="frame compare" style="--cut: 50%; aspect-ratio: {shape[0]} / {shape[1]}">
<div class="layer turn">{_series(befores, "before")}</div><div class="layer after turn">{_series(afters, "after")}</div>
<span class="bar"></span>
<span class="tag" style="left: 8px">before</span><span class="tag" style="right: 8px">after</span>
<input type="range" min="0" max="100" step="0.1" value="50" aria-label="divider between before and after"></div>
{turn}<p class="hint">Drag the divider. Double-click, or hold Ctrl and scroll, to zoom.</p></section>
<div><section><h2>Progress</h2><div class="frame" style="aspect-ratio: {frames[0].width} / {frames[0].height}">
<div class="layer steps">{_series(frames, "progress", on=-1)}</div></div>
<label>start {_slider(".steps", len(frames), len(frames) - 1)} end</label></section>
<section><h2>Figures</h2>{_facts(figures)}</section></div></div>
<div class="foot"><section><h2>Make it again</h2><pre>{_text(command)}</pre></section>
<details><summary>Settings</summary>{_facts(settings)}</details></div>"""
    return _page(f"{source} to {target}, {title}", body)


def edits_page(title, rows, means):
    """The page of a list of edits by several methods, a str.

    Args:
        rows: of (source, target, PIL picture before, {method: (link, PIL picture after, {figure: text})}).
        means: {method: {figure: text}}, for the head of the table.
    """
    methods = list(dict.fromkeys(name for *_, cells in rows for name in cells))
    head = "".join(f"<th>{_text(name)}<br>" + "".join(
        f'<button data-by="{_text(name)}/{_text(figure)}">{_text(figure)} {_text(means[name][figure])}</button>'
        for figure in means[name]) + "</th>"
        for name in methods)
    lines = []
    for source, target, before, cells in rows:
        line = f'<td class="name">{_text(source)}<small>&rarr; {_text(target)}</small></td><td>{_image(before)}</td>'
        for name in methods:
            link, after, own = cells.get(name, (None, None, {}))
            shown = f'<a href="{_text(link)}">{_image(after)}</a>' if after else ""
            numbers = "".join(
                f'<span>{_text(figure)}</span><b data-figure="{_text(name)}/{_text(figure)}" '
                f'data-value="{_text(value)}">{_text(value)}</b>' for figure, value in own.items())
            line += f'<td><div class="edit">{shown}<div class="figures">{numbers}</div></div></td>'
        lines.append(f"<tr>{line}</tr>")
    body = f"""<h1>{_text(title)}</h1>
<p class="lead">Click on a figure to sort by it, on a picture for its own page.</p>
<div class="scroll"><table class="edits"><thead><tr><th></th><th>source</th>{head}</tr></thead>
<tbody>{"".join(lines)}</tbody></table></div>"""
    return _page(title, body, "wide")


def _page(title, body, width=""):
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=_text(title), body=body, width=width, script=script, hash=f"sha256-{digest}")


def _text(value):
    return html.escape(str(value).encode("utf-8", "replace").decode())  # a name of a file need not be UTF-8


def _facts(values):
    """{name: value} as a table."""
    return '<table class="facts">' + "".join(
        f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in values.items()) + "</table>"


def _slider(of, count, at=0):
    """A slider through the pictures of the series that the selector `of` finds."""
    return f'<input type="range" min="0" max="{count - 1}" value="{at}" data-of="{of}" aria-label="{of[1:]}">'


def _series(pictures, name, on=0):
    """Pictures one over the other, of which the one numbered `on` is shown."""
    return "".join(_image(picture, name, picture is pictures[on]) for picture in pictures)


def _image(picture, name="", on=False):
    """A PIL picture, or the bytes of an SVG, as an <img> with its data."""
    if isinstance(picture, bytes):
        kind, data = "svg+xml", picture
    else:
        whole = io.BytesIO()
        picture = picture.convert("RGB")
        picture.thumbnail((LONGEST, LONGEST), Image.LANCZOS)
        picture.save(whole, "JPEG", quality=88, subsampling=0)
        kind, data = "jpeg", whole.getvalue()
    data = base64.b64encode(data).decode()
    return f'<img{" class=on" if on else ""} alt="{_text(name)}" src="data:image/{kind};base64,{data}">'

