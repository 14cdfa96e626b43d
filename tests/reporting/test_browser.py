"""The page in headless Chromium: no error, nothing wider than a phone, and a click on a head sorts."""

import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A frame has a phone's width, which a headless window cannot have.
PHONE = """<iframe src="report.html" style="width: 375px; height: 800px; border: 0"></iframe><pre></pre><script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument;
  const table = page.querySelector("table"), head = table.tHead.rows[0].cells[3], seen = [];
  const note = () => seen.push([head.ariaSort, ...[...table.tBodies[0].rows].map((row) => row.cells[3].textContent)]);
  for (let click = 0; click < 4; click++) { note(); head.querySelector("button").click(); }
  const wide = page.documentElement.scrollWidth, right = (part) => part.getBoundingClientRect().right;
  const picture = Math.max(...[...page.querySelectorAll("svg.tradeoff text")].map(right));
  const columns = [...table.tHead.rows[0].cells].filter((cell) => right(cell) <= 375).length;
  document.querySelector("pre").textContent = JSON.stringify({ wide, picture, columns, seen });
};
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs chromium on the PATH")
def test_the_page_in_a_browser(three, tmp_path):
    shutil.copy(three / "report.html", tmp_path)
    (tmp_path / "phone.html").write_text(PHONE, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    options += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    shown = subprocess.run(
        [CHROMIUM, *options, f"file://{tmp_path / 'phone.html'}"], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in shown.stderr, shown.stderr
    measured = json.loads(re.search(r"<pre>(.*)</pre>", shown.stdout)[1])
    assert measured["wide"] <= 375 and 300 < measured["picture"] <= 375 and measured["columns"] >= 4
    (unsorted, *rows), (up, *ascending), (down, *descending), (again, *restored) = measured["seen"]
    assert (unsorted, up, down, again) == (None, "ascending", "descending", None)
    assert rows == restored and descending == ascending[::-1] and sorted(rows) == sorted(ascending)
    assert rows[-1] == ascending[-1] == "27.5 (25.0–30.0)" and rows[0] == descending[-1]
