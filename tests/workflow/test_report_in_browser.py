"""Snakemake's report opens in a browser: each figure has its label, is drawn, and has its caption."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from support.workflow import REPOSITORY, Workflow

FIGURES = ("ablation_bars", "ablation_curve", "checkpoint_curve", "loss", "summary")
CATEGORY = "Context distillation"
# Goes through the report as a reader would, and leaves what it saw in the page's title.
VISIT = """<script>
const seen = {}, pause = () => new Promise(resume => setTimeout(resume, 300));
const link = text => [...document.querySelectorAll('a')].find(a => a.textContent.trim() === text);
const open = async (row, icon) => {
  [...document.querySelectorAll('tr')].find(tr => tr.cells[0].textContent.trim() === row)
    .querySelector(`a[iconname=${icon}]`).click();
  await pause();
};
setTimeout(async () => {
  try {
    link('Results').click(); await pause();
    for (const name of FIGURES) {
      link(CATEGORY).click(); await pause();
      await open(name, 'eye');
      const width = Math.max(0, ...[...document.images].map(image => image.naturalWidth));
      link(CATEGORY)?.click(); await pause();
      await open(name, 'information-circle');
      seen[name] = {width, text: document.body.innerText};
    }
  } catch (error) { seen.error = String(error); }
  document.title = JSON.stringify(seen);
}, 1000);
</script></body>"""

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("workflow")]


def test_the_report_opens_in_a_browser_with_every_figure_its_label_and_its_caption(
    finished: Workflow, tmp_path: Path
) -> None:
    browser = find_browser()
    finished.run("--report", str(tmp_path / "report.zip"))
    with zipfile.ZipFile(tmp_path / "report.zip") as archive:
        archive.extractall(tmp_path)
    [page] = tmp_path.glob("*/report.html")
    seen = visit(browser, page)
    assert seen.keys() == set(FIGURES)
    for name, view in seen.items():
        assert view["width"] > 300, f"{name} is not drawn"
        assert caption_start(name) in " ".join(view["text"].split()), f"{name} has another caption"


def find_browser() -> str:
    """Chromium; where `CI` is set it is installed if missing, elsewhere the test is skipped."""
    if not (browser := installed_browser()):
        install = ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]
        if not os.environ.get("CI") or not shutil.which("apt-get"):
            pytest.skip(f"no Chromium here: {' '.join(install)}")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update"], install):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not (browser := installed_browser()):
            pytest.skip(f"{' '.join(install)} failed: {done.stderr.strip()[-300:]}")
    return browser


def installed_browser() -> str | None:
    """Where a browser of Chromium's kind is."""
    return shutil.which("chromium") or shutil.which("google-chrome")


def caption_start(figure: str) -> str:
    """The first words of a figure's caption, up to the first mark-up."""
    text = (REPOSITORY / "docs/captions/context_distillation.rst").read_text()
    found = re.search(rf'figure == "{figure}" %}}\n([^`%]{{20,60}})', text)
    assert found, f"{figure} has no caption"
    return " ".join(found[1].split())


def visit(browser: str, page: Path) -> dict[str, dict]:
    """What a reader sees of each figure: the width of the image, the text of its details."""
    source = page.read_text()
    script = VISIT.replace("FIGURES", json.dumps(FIGURES)).replace("CATEGORY", json.dumps(CATEGORY))
    probe = page.with_name("visit.html")
    end = source.rindex("</body>")
    probe.write_text(source[:end] + script + source[end + len("</body>") :])
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'browser'}"]
    command = [browser, *options, "--virtual-time-budget=60000", "--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout, re.DOTALL)
    assert title, f"the report did not come up: {done.stderr[-2000:]}"
    seen = json.loads(html.unescape(title[1]))
    assert "error" not in seen, seen["error"]
    return seen
