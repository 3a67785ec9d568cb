"""A headless Chromium: opens a page, runs a script in it, and returns what that found and what the console said."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PROBE = """
window.addEventListener("load", () => setTimeout(() => {
  let found;
  try { found = (() => { %s })(); } catch (error) { found = {error: String(error)}; }
  parent.postMessage(JSON.stringify(found), "*");
}, 300));
"""
FRAME = """<!doctype html><body style="margin:0">
<script>
addEventListener("message", event => {
  const probe = document.createElement("pre");
  probe.id = "probe";
  probe.textContent = event.data;
  document.body.append(probe);
});
</script>
<iframe src="%s" style="border:0; width:%dpx; height:%dpx"></iframe>
"""


def chromium() -> str | None:
    """Path of a Chromium: CHROMIUM, else the first of its usual names on PATH; None where there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def probe(page: Path, script: str, width: int, folder: Path, picture: Path | None = None) -> tuple[dict, list[str]]:
    """Opens a copy of `page` in a frame of `width` pixels (a window of Chromium's is no narrower than 500), runs the
    body of a function `script` in it, and returns what that returned and the console's lines."""
    copy, frame = folder / "probed.html", folder / "frame.html"
    text = page.read_text(encoding="utf-8")
    assert text.count("</body>") == 1
    copy.write_text(text.replace("</body>", f"<script>{PROBE % script}</script></body>"), encoding="utf-8")
    height = 2600
    frame.write_text(FRAME % (copy.name, width, height))
    output = [f"--screenshot={picture}"] if picture is not None else ["--dump-dom"]
    command = [
        *(chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"),
        *(f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=4000"),
        *(f"--window-size={max(500, width)},{height}", *output, frame.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    if picture is not None:
        return {}, console
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(text), console
