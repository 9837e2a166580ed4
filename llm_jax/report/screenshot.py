"""A report as a browser shows it, as a picture."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from llm_jax.config import ConfigError

# Under one of these names a browser that can do without a screen is found.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
# Down to what a model tells apart, on the page of a run of no experts.
WIDTH, HEIGHT = 1144, 3190
SCALE = 0.75
PATIENCE_S = 120.0


def take(page: Path, picture: Path) -> None:
    """Writes the upper part of a page as a PNG picture. Raises ConfigError where no browser can be found, or fails."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise ConfigError(f"--screenshot needs a browser on the path: one of {', '.join(BROWSERS)}")
    picture.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            "--headless",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--force-device-scale-factor={SCALE}",
            "--no-first-run",
            f"--user-data-dir={profile}",
            f"--window-size={WIDTH},{HEIGHT}",
            f"--screenshot={picture.absolute()}",
            page.absolute().as_uri(),
        ]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # it refuses to work for root otherwise
        before = picture.stat().st_mtime_ns if picture.exists() else None
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
            said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        except subprocess.TimeoutExpired:
            said = [f"not done after {PATIENCE_S:.0f} s"]
        if not picture.exists() or picture.stat().st_mtime_ns == before:
            raise ConfigError(f"--screenshot {picture}: {browser} made no picture: {said[0]}")
