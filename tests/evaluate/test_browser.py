"""Pages in a real browser: nothing is wrong with them, they fit into a phone, and they follow the colour scheme."""

import html
import re
import shutil
import subprocess

import pytest
import torch

from flowalign.evaluate.records import Evaluation, Record
from flowalign.evaluate.report import Table
from flowalign.evaluation_report import write_evaluation

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE, DESK = 390, 1280
KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here")


def photographs(num, size, seed):
    """Images with as much detail as photographs have or more: amplitudes fall with the frequency."""
    frequency = torch.fft.fftfreq(size)
    radius = (frequency[:, None].square() + frequency.square()).sqrt().clamp(min=1 / size)
    noise = torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(seed))
    shared = torch.fft.ifft2(torch.fft.fft2(noise[:, :1]) / radius).real
    tint = torch.fft.ifft2(torch.fft.fft2(noise) / radius**1.5).real
    return (0.5 + 0.2 * shared / shared.std() + 0.1 * tint / tint.std()).clamp(0, 1).mul(255).to(torch.uint8)


def evaluation(seed, *, size=512):
    records = tuple(
        Record(
            id=2 * number + prompt,
            prompt=f"a photo of a rather long prompt that names many things, number {2 * number + prompt}",
            tag=kind,
            k=k,
            strict=(number + k + seed) % 3 > 0,
            graded=((number + k + seed) % 4) / 4,
            clauses={"count": True, "colour": k > 1},
        )
        for number, kind in enumerate(KINDS)
        for prompt in range(2)
        for k in range(4)
    )
    return Evaluation(suite="geneval", seed=0, records=records, images=photographs(len(records), size, seed))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of GenEval's size: twelve prompts, two models, and wide tables."""
    wide = Table(title="A wide table", columns=tuple(f"column {number}" for number in range(12)), rows=[["a long cell of text"] * 12])
    path = tmp_path_factory.mktemp("page") / "report.html"
    return write_evaluation(
        path, evaluation(0), evaluation(1), names=("a/model", "b/model"), notes=["strict: undecided"], settings="x: 1\n" * 40, tables=[wide]
    )


def look(path, width, *options):
    """Open a page in a frame so wide; returns what its script could tell, and what the console said."""
    script = """
      const shown = document.querySelector("iframe").contentDocument, told = document.createElement("pre"), root = shown.documentElement;
      const images = [...shown.images];
      told.id = "told";
      told.textContent = [root.scrollWidth, root.clientWidth, images.length, images.filter(i => i.naturalWidth > 0 && i.alt).length,
        getComputedStyle(shown.body).backgroundColor].join("|");
      document.body.append(told);
    """
    frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(path.read_text(), quote=True)}"></iframe>'
    around = path.with_name(f"frame_{width}.html")
    around.write_text(f"<!doctype html><meta charset=utf-8><body>{frame}<script>addEventListener('load', () => {{{script}}})</script>")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1400,1000", *options]
    done = subprocess.run([*command, "--dump-dom", around.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    scroll, client, images, whole, background = found[1].split("|")
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return int(scroll), int(client), int(images), int(whole), background, console


@needs_browser
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_a_page_fits_its_window_shows_all_its_images_with_texts_and_logs_nothing(page, width):
    scroll, client, images, whole, _, console = look(page, width)
    assert width - 20 < client <= width  # but for the scroll bar
    assert scroll <= client
    assert images == whole >= 2 * 48
    assert console == []


@needs_browser
def test_a_page_is_dark_where_the_reader_wants_it_dark(page):
    light, dark = (look(page, DESK, f"--blink-settings=preferredColorScheme={scheme}")[4] for scheme in (1, 0))
    brightness = [sum(map(int, re.findall(r"\d+", found)[:3])) for found in (light, dark)]
    assert brightness[0] > 600
    assert brightness[1] < 150


@needs_browser
def test_the_look_at_a_page_sees_what_is_wrong(tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text('<body><img src="data:,"><div style="width:2000px">wide</div><script>console.error("no")</script>')
    scroll, client, images, whole, _, console = look(broken, PHONE)
    assert (scroll > client, images, whole, len(console)) == (True, 1, 0, 1)


def test_a_page_of_twelve_prompts_and_two_models_at_512_pixels_stays_below_ten_megabytes(page):
    assert page.stat().st_size < 10e6
