"""The page to look at, made from the kept records and hostile texts, and opened in a real browser where there is one."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

KEPT = ROOT / "results/reference/amd_epyc_family_25_model_1_2_cores"
EVIL = "<script>alert(1)</script>|`\"'&"
NAMES = ("char_bigram", "char_transformer", "gpt2_x")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is here (Debian: apt install chromium)")


@pytest.fixture
def arguments(tmp_path: Path) -> list[object]:
    """Of `picogpt report page`: the kept records, of a text, prompt and sample that are code to a careless page."""
    given: list[object] = ["--summary", "summary.csv", "--set", "gpt2_media=gpt2_x", "--set", "first_dtype=float32"]
    summary = (KEPT / "summary.csv").read_text().replace("nothing is published", EVIL.replace('"', '""'))
    (tmp_path / "summary.csv").write_text(summary)
    for path in sorted(KEPT.glob("*.json")):
        record = json.loads(path.read_text())
        record["corpus"] |= {"name": EVIL} if record["corpus"] else {}
        if "prompts" in record["config"]:
            record["config"]["prompts"] = [EVIL] * len(record["config"]["prompts"])
        file = tmp_path / path.stem / "record.json"
        file.parent.mkdir()
        file.write_text(json.dumps(record))
        given += ["--record", file]
        if record.get("task", record.get("kind", "")).startswith("train"):
            rows = [
                {"epoch": n / 20, "train_loss": 4 - n / 20} | ({} if n % 5 else {"val_loss": 4.1 - n / 20})
                for n in range(41)
            ]
            metrics = file.with_name("metrics.jsonl")
            metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
            given += ["--metrics", metrics]
    for name in NAMES:
        for stem in (f"{name}_sample", f"{name}_untrained") if name != "gpt2_x" else (f"{name}_sample",):
            parts = [EVIL, "\n", "the ", "rest"]
            (tmp_path / f"{stem}.txt").write_text("".join(parts))
            (tmp_path / f"{stem}.json").write_text(
                json.dumps([{"tokens": parts, "probabilities": [0.0, 0.5, 0.03, 1.0]}])
            )
            given += ["--sample", tmp_path / f"{stem}.txt", "--probabilities", tmp_path / f"{stem}.json"]
    return [*given, "--hardware", "cpu", "--hardware", "a30", "--hardware", "h100x2"]


@pytest.fixture
def page(picogpt, arguments: list[object], tmp_path: Path) -> str:
    template = ROOT / "workflow/report/report.html.j2"
    run = picogpt("report", "page", "--template", template, *arguments, "--banner", EVIL, "--out", "report.html")
    assert run.status == 0, run.err
    return (tmp_path / "report.html").read_text()


def test_everything_from_outside_is_escaped_and_nothing_is_loaded(page: str):
    assert page.count("<script>") == 1
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;|`&#34;&#39;&amp;") > 20
    assert re.findall(r"(?:src|href)=|url\((?!#)|@import|https?://", page) == []
    assert len(page.encode()) < 3e6
    assert page.count('class="banner"') == 1 + page.count("<table") + page.count("<figure") == 9


def test_it_says_what_was_measured(page: str):
    text = re.sub(r"<[^>]+>", " ", page)
    for bits in ("3.587", "2.107", "2.575"):
        assert f" {bits} " in text
    assert 'class="p5" title="0%"' in page
    assert 'class="p3" title="3%"' in page
    assert len(re.findall(r"<figure ", page)) == 3
    for figure in re.findall(r"<svg [^>]+>", page):
        assert 'aria-label="Loss of train ' in figure


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '[{"tokens": ["a"], "probabilities": []}]', '[{"tokens": ["a"], "probabilities": [-1]}]', "x"],
)
def test_a_file_that_has_no_probabilities_is_named(picogpt, arguments: list[object], tmp_path: Path, content: str):
    (tmp_path / "wrong.json").write_text(content)
    template = ROOT / "workflow/report/report.html.j2"
    run = picogpt(
        "report", "page", "--template", template, *arguments, "--probabilities", "wrong.json", "--out", "a.html"
    )
    assert (run.status, "wrong.json was not written by `sample --probabilities`" in run.err) == (1, True)
    assert not (tmp_path / "a.html").exists()


TRY = """<script>
const told = [], rows = document.querySelector(".sortable").tBodies[0].rows;
const column = index => [...rows].map(row => row.cells[index].textContent).filter(text => text !== "–");
const heads = document.querySelectorAll(".sortable th");
for (const turn of [1, 2]) { heads[3].querySelector("button").click(); told.push([heads[3].ariaSort, column(3).map(Number)]) }
heads[1].querySelector("button").click(); told.push([heads[1].ariaSort, column(1)]);
const figure = document.querySelector(".curve"), slider = figure.querySelector("input");
slider.value = 0; slider.dispatchEvent(new Event("input")); told.push(figure.querySelector("output").textContent);
const box = figure.querySelector("svg").getBoundingClientRect();
figure.querySelector("svg").dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 50 }));
told.push(figure.querySelector("output").textContent, document.documentElement.scrollWidth - document.documentElement.clientWidth);
const result = document.createElement("pre"); result.id = "told"; result.textContent = JSON.stringify(told); document.body.replaceChildren(result);
</script>"""


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *options]
    home = f"--user-data-dir={page.parent / 'browser'}"
    return subprocess.run([*command, home, page.as_uri()], capture_output=True, text=True, timeout=300, check=True)


@needs_chromium
def test_in_a_browser_it_sorts_and_answers_without_an_error(page: str, tmp_path: Path):
    tried = tmp_path / "tried.html"
    tried.write_text(page.replace("</body>", TRY + "</body>"))
    run = browse(tried, "--window-size=400,900", "--dump-dom")
    assert "CONSOLE" not in run.stderr, run.stderr
    told = re.search(r'<pre id="told">(.*?)</pre>', run.stdout, re.DOTALL)
    assert told, run.stdout[-2000:]
    up, down, names, first, middle, beyond = json.loads(
        told[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    )
    assert (up[0], down[0], names[0]) == ("ascending", "descending", "ascending")
    assert len(up[1]) > 20
    assert up[1] == sorted(up[1])
    assert down[1] == up[1][::-1]
    assert names[1] == sorted(names[1])
    assert first == "epoch 0.00: training batches, smoothed 4.0000; validation 4.1000 (5.915 bits per byte)"
    assert middle.startswith("epoch 0.90: ")
    assert beyond == 0, "the page scrolls sideways"
