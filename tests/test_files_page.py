"""files/page.py: index.html of a run and of a list of edits, its escaping, and what a browser shows of it."""
import base64
import html
import io
import re
import shlex
from html.parser import HTMLParser

import pytest
from browser import Chromium
from conftest import DRAWING, svg_text
from PIL import Image

import run
from files.page import edits_page, run_page

HOSTILE = '<script>document.title="hit"</script>"><img src=x onerror="document.title=1">\''
EVIL = svg_text('<script>document.title="hit"</script><image xlink:href="http://127.0.0.1:9/a.png" width="9" '
                'height="9"/><rect width="32" height="32" fill="#00f" onload="document.title=1"/>').encode()


def plain(colour, size=(40, 30)):
    return Image.new("RGB", size, colour)


def a_run(pairs, prompt="a face", frames=("red", "blue")):
    return run_page(prompt, f"{prompt}, green", "PDS", pairs, (32, 32), [plain(c, (32, 32)) for c in frames],
                    {"outside": "20 dB"}, {"input": f"{prompt}.svg", "steps": 3}, f"python run.py --svg '{prompt}.svg'")


def some_edits():
    def cell(colour, value):
        return f"out/{colour}/index.html", plain(colour), {"PSNR": f"{value}", "s": "1.5"}
    rows = [(f"edit {n}", HOSTILE, plain("white"), {"SDS": cell("red", value), HOSTILE: cell("lime", -value)})
            for n, value in enumerate((5, 12.5, -1))]
    return edits_page("3 edits", rows, {"SDS": {"PSNR": "5.5", "s": "1.5"}, HOSTILE: {"PSNR": "-5.5"}})


class Tags(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


@pytest.mark.parametrize("page", [a_run([(plain("red"), plain("lime"))], HOSTILE), a_run([(EVIL, EVIL)], HOSTILE),
                                  some_edits()], ids=["pictures", "drawings", "edits"])
def test_what_users_write_is_text(page):
    """One script and no handler, whatever prompts, names of files and drawings hold; nothing comes from elsewhere."""
    tags = Tags(page).found
    assert [tag for tag, _ in tags].count("script") == 1 and "object" not in [tag for tag, _ in tags]
    assert not [key for _, attributes in tags for key in attributes if key.startswith("on")]
    addresses = [attributes[key] for _, attributes in tags for key in ("src", "href") if key in attributes]
    assert addresses and all(address.startswith(("data:image/", "out/")) for address in addresses)
    assert "&lt;script&gt;document.title=" in page and "url(" not in page and "@import" not in page


def test_pictures_are_bounded_and_drawings_embedded_as_they_are():
    page = a_run([(plain("red", (3000, 2000)), plain("lime", (3000, 2000)))])
    found = [base64.b64decode(data) for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", page)]
    assert Image.open(io.BytesIO(found[0])).size == (1024, 683) and len(page) < 100_000
    page = a_run([(DRAWING.encode(), EVIL)])
    found = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)
    assert [base64.b64decode(data) for data in found] == [DRAWING.encode(), EVIL]


def test_a_run_writes_its_page(command, tmp_path):
    """With hostile names of the file and the prompt: the drawings as they are, the command that makes it again."""
    file = tmp_path / "<script>alert(1)\udcff.svg"
    file.write_text(DRAWING)
    assert command("--svg", file, "--target", HOSTILE) == 0
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    tags = Tags(page).found
    assert [tag for tag, _ in tags].count("script") == 1
    assert not [key for _, attributes in tags for key in attributes if key.startswith("on")]
    drawings = [base64.b64decode(data) for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]
    assert drawings == [DRAWING.encode(), (tmp_path / "out" / "result.svg").read_bytes()]
    assert f"--target {shlex.quote(HOSTILE)}" in html.unescape(page) and len(page) < 100_000
    assert run.parse(["--svg", "a.svg", "--resume", "--seed", "1"]).command == ["--svg", "a.svg", "--seed", "1"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("profile"), 900, 700)
    yield browser
    browser.close()


def opened(browser, text, tmp_path):
    """Open a page from disk."""
    (tmp_path / "index.html").write_text(text, encoding="utf-8")
    browser.requests.clear(), browser.errors.clear()
    browser.goto((tmp_path / "index.html").as_uri())


def colour(browser, selector, x, y=0.5):
    """The colour in the page at shares x, y of an element's width and height."""
    left, top, width, height = browser.box(selector)
    return browser.picture().getpixel((round(left + x * width), round(top + y * height)))


def near(a, b):
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) < 12


def test_a_page_compares_and_scrubs(browser, tmp_path):
    opened(browser, a_run([(plain("red", (32, 32)), plain("lime", (32, 32))),
                           (plain("blue", (32, 32)), plain("yellow", (32, 32)))]), tmp_path)
    assert near(colour(browser, ".compare", 0.25, 0.2), (255, 0, 0)) and near(
        colour(browser, ".compare", 0.75, 0.2), (0, 255, 0))
    browser.run("(c => (c.value = 90, c.oninput()))(document.querySelector('.compare input'))")
    assert near(colour(browser, ".compare", 0.75, 0.2), (255, 0, 0))
    assert near(colour(browser, ".steps", 0.5), (0, 0, 255))  # the last step
    for of, value in ((".turn", 1), (".steps", 0)):
        browser.run(f"(c => (c.value = {value}, c.oninput()))(document.querySelector('[data-of=\"{of}\"]'))")
    assert near(colour(browser, ".compare", 0.25, 0.2), (0, 0, 255)) and near(
        colour(browser, ".compare", 0.97, 0.2), (255, 255, 0))
    assert near(colour(browser, ".steps", 0.5), (255, 0, 0)) and not browser.errors


def test_the_divider_is_dragged(browser, tmp_path):
    opened(browser, a_run([(plain("red", (32, 32)), plain("lime", (32, 32)))]), tmp_path)
    x, y, w, h = browser.box(".compare")
    browser.mouse("mousePressed", x + w / 2, y + h / 2)
    browser.mouse("mouseMoved", x + w / 5, y + h / 2)
    browser.mouse("mouseReleased", x + w / 5, y + h / 2)
    assert near(colour(browser, ".compare", 0.35, 0.2), (0, 255, 0))


def test_hostile_input_runs_nothing_and_asks_for_nothing(browser, tmp_path):
    opened(browser, a_run([(EVIL, EVIL)], HOSTILE), tmp_path)
    assert near(colour(browser, ".compare", 0.25, 0.2), (0, 0, 255))  # the drawing is there
    assert browser.run("document.title").startswith(HOSTILE) and browser.run("document.images.length") == 4
    assert all(address.startswith(("file:", "data:")) for address in browser.requests) and not browser.errors


def test_edits_are_sorted_by_a_figure(browser, tmp_path):
    opened(browser, some_edits(), tmp_path)

    def order(method):
        browser.run(f"[...document.querySelectorAll('button')].find(b => b.dataset.by == {method!r} + '/PSNR').click()")
        return browser.run("[...document.querySelectorAll('tbody tr')].map(r => r.cells[0].firstChild.data).join()")
    assert order("SDS") == "edit 1,edit 0,edit 2" and order("SDS") == "edit 2,edit 0,edit 1"
    assert order(HOSTILE) == "edit 2,edit 0,edit 1"
    assert browser.run("document.images.length") == 9 and not browser.errors
