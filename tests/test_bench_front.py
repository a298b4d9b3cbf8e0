"""bench/front.py: alignment against identity for each method; the chart, its numbers, one drawing at several K."""
import csv
import types

import pytest
from PIL import Image

import run
from bench import front
from bench.__main__ import main as measure
from bench.front import IDENTITIES, PAPER, WHOLE, methods


def test_every_method_is_run_at_its_own_settings_and_drawn(tmp_path, monkeypatch, capsys):
    asked = []

    def edit_row(prior, name, options, out, lpips, clip):
        asked.append((name, options))
        out.mkdir(parents=True)
        for file, grey in (("source", 10), ("result", 200)):
            Image.new("RGB", (64, 64), (grey,) * 3).save(out / f"{file}.png")
        k = float(options[options.index("--identity") + 1]) if "--identity" in options else 0.3
        seed = int(options[-1])
        return {"PSNR": 8 + 5 * k + seed, "SSIM": 0.5, "log-odds": 20 - 15 * k - 6 * (options[0] == "heart.svg"),
                "named": 1.0, "turn": 0.2, "IoU": 0.75}
    monkeypatch.setattr(front, "edit_row", edit_row)
    monkeypatch.setattr(front, "options_of", lambda mode, file, source, target, fit, flags: [file.name, *flags])
    monkeypatch.setattr(run, "load_prior", lambda args: types.SimpleNamespace(defaults={"guidance": {"dds": 3}}))
    for name in ("face", "heart"):
        (tmp_path / f"{name}.svg").write_text("<svg/>")
    (tmp_path / "list.txt").write_text("svg | face.svg | a | b\nimage | face.svg | a | c\nsvg | heart.svg | a | b\n")
    assert measure(["front", "--list", str(tmp_path / "list.txt"), "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "front.csv").open()))
    assert len(rows) == 2 * len(IDENTITIES) + 7 and {row["edits"] for row in rows} == {"2"}
    assert {(row["named"], row["turn"], row["IoU"]) for row in rows} == {("1", "0.2", "0.75")}
    assert not any("+-" in column for column in rows[0])
    first = rows[0]
    assert (first["method"], first["K"], float(first["PSNR"]), float(first["log-odds"])) == (
        "PDS, smooth field, by K", "1", 13, pytest.approx(2)) and first["read"] == "1"
    free = [flags for name, flags in asked if "--smooth" in flags]
    assert len(free) == 2 * len(IDENTITIES) and all(set(PAPER) <= set(flags) for flags in free)
    whole = [flags for _, flags in asked if "--colour-identity" in flags]
    assert len(whole) == 2 * len(IDENTITIES) and all(set(WHOLE) <= set(flags) for flags in whole)
    assert sum("dreamcatalyst" in flags for _, flags in asked) == 2
    names = [name for name, _ in asked]
    assert [names.count(name) for name in ("sds", "dds", "ids", "ssd")] == [2] * 4
    assert f"done: {tmp_path / 'front.png'}" in capsys.readouterr().out
    chart = Image.open(tmp_path / "front.png")
    colours = {colour for _, colour in chart.convert("RGB").getcolors(1 << 20)}
    assert chart.size == (900, 560) and {(0xd9, 0x48, 0x0f), (0x2f, 0x5f, 0xd0)} <= colours
    along = Image.open(tmp_path / "along.png")
    assert along.width > 64 * (1 + len(IDENTITIES)) and along.getpixel((20, 20)) == (10, 10, 10)


    # several seeds: means and standard deviations, as figures and as crosses
    assert measure(["front", "--list", str(tmp_path / "list.txt"), "--out", str(tmp_path / "more"), "--seeds", "3",
                    "--seed", "4"]) == 0
    first = next(csv.DictReader((tmp_path / "more" / "front.csv").open()))
    assert (float(first["PSNR"]), float(first["PSNR +-"]), float(first["log-odds +-"])) == (18, 1, 0)
    assert first["edits"] == "6" and [options[-1] for _, options in asked[-6:]] == ["4", "5", "6"] * 2
    assert "PSNR 18 +- 1" in capsys.readouterr().out
    assert Image.open(tmp_path / "more" / "front.png").tobytes() != chart.tobytes()


def test_the_flags_of_the_chart_are_those_of_the_command_line():
    for points in methods().values():
        for _, name, flags in points:
            assert run.parse(["--mode", "svg", "--loss", name, *flags]).loss == name
