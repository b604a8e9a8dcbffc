"""Pages of HTML: what is in them, and, where PySide6 is installed, what Chromium makes of one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from test_report import RESULT

from sdtrt_backend import page
from sdtrt_backend.report import comparison_picture, report_html, result_html
from sdtrt_backend.values import LayerReport, Report

NAMES = [f"blocks.{i}.attn.{kind}" for i in (0, 2, 10) for kind in ("to_q", "to_out.0")]
SQNR = [41.0, 9.5, 43.0, None, 39.0, 100.0]
LOOK = """
import sys
from PySide6.QtCore import QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

class Page(QWebEnginePage):
    def javaScriptConsoleMessage(self, level, message, line, source):
        print("console:", message, line)

path, width, script = sys.argv[1:]
app = QApplication(sys.argv[:1])
view = QWebEngineView()
page = Page(view)
view.setPage(page)
view.resize(int(width), 900)
view.show()
page.loadFinished.connect(lambda ok: page.runJavaScript(script, 0, lambda found: (print("found:", found), app.quit())))
page.load(QUrl.fromLocalFile(path))
QTimer.singleShot(60000, app.quit)
app.exec()
"""
TABLE = """
const heads = [...document.querySelectorAll("#layers th button")], filter = document.querySelector("input");
const names = () => [...document.querySelectorAll("#layers tbody tr")].filter(r => !r.hidden).map(r => r.cells[0].textContent);
const found = {given: names(), count: filter.nextElementSibling.textContent};
heads[4].click(); found.rising = names();
heads[4].click(); found.falling = names();
heads[0].click(); found.named = names();
filter.value = "TO_Q attn"; filter.oninput(); found.filtered = names(); found.counted = filter.nextElementSibling.textContent;
found.width = document.documentElement.scrollWidth;
found.paper = getComputedStyle(document.body).backgroundColor;
JSON.stringify(found)
"""


def report():
    rows = [LayerReport(name, "linear", (64, 64), "int8" if db else "float32", "inductor", "" if db else "last <layer>",
                        1.0 if db else None, db, 300) for name, db in zip(NAMES, SQNR, strict=True)]
    memory = {"unet": {"codes": 3_000_000, "graphs": 2_000_000}, "vae.decoder": {"codes": 500_000}}
    pieces = ("unet", Report("ready", error=0.01, timings={"eager_ms": 3.0})), ("vae.decoder", Report("refused"))
    return Report("ready", tuple(rows), memory=memory, peak=12_000_000, notes=("a note",), pieces=pieces)


def test_parts_memory_and_layers_are_on_the_page():
    text = report_html(report())
    assert "<td>unet</td><td>ready</td>" in text
    assert '<td>vae.decoder</td><td class="number">0.5</td><td class="number"></td>' in text
    assert "12.0 MB on this GPU at most" in text
    assert text.count("<tr>") == 3 + 3 + 7
    assert "last &lt;layer&gt;" in text


def test_columns_of_numbers_are_told_from_text():
    text = page.table(("name", "ms", "of", "shape", "empty"), [("a", "1.5", "2.0x", "3x3", ""), ("1", "", "50%", "64x64", "")])
    assert text.startswith('<div class="wide"><table><thead><tr><th>name</th><th class="number">ms</th><th class="number">of</th>'
                           "<th>shape</th><th>empty</th>")


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_chromium_shows_sorts_and_filters_it(tmp_path, width, dark):
    pytest.importorskip("PySide6.QtWebEngineCore", reason="pip install PySide6, to open it in Chromium", exc_type=ImportError)
    picture = comparison_picture([("a", np.zeros((1, 64, 64, 3), np.float32))], ["b"])
    (tmp_path / "report.html").write_text(result_html(RESULT, report(), picture))
    flags = "--no-sandbox --disable-gpu" + " --blink-settings=preferredColorScheme=0" * dark
    environment = os.environ | {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": flags,
                                "QTWEBENGINE_DISABLE_SANDBOX": "1"}
    run = subprocess.run([sys.executable, "-c", LOOK, tmp_path / "report.html", str(width), TABLE], capture_output=True,
                         text=True, env=environment, timeout=100)
    assert "console:" not in run.stdout, run.stdout
    found = json.loads(run.stdout.partition("found: ")[2])
    assert found["given"] == NAMES
    assert (found["count"], found["counted"]) == ("6 of 6", "3 of 6")
    order = sorted((db, name) for name, db in zip(NAMES, SQNR, strict=True) if db is not None)
    unknown = NAMES[SQNR.index(None)]
    assert found["rising"] == [name for _, name in order] + [unknown]
    assert found["falling"] == [name for _, name in reversed(order)] + [unknown]
    assert found["named"] == [f"blocks.{i}.attn.{kind}" for i in (0, 2, 10) for kind in ("to_out.0", "to_q")]
    assert found["filtered"] == [f"blocks.{i}.attn.to_q" for i in (0, 2, 10)]
    assert found["width"] <= width
    assert found["paper"] == ("rgb(24, 26, 27)" if dark else "rgb(255, 255, 255)")
