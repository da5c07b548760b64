"""Create the development environment: `python3.11 -m tools.venv .venv`.

Runs on a bare interpreter, standard library only. Writes nothing outside the project: pip's cache
is in `.cache`, and where Debian's interpreter has no ensurepip, pip itself comes from a Debian
package that is unpacked, not installed.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.debs import Packages, PackagesUnavailable, unpack

OLDEST_PYTHON = (3, 11)
PIP_PACKAGES = ("python3-pip-whl", "ca-certificates")
SYSTEM_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PINS = "constraints.txt"
EXTRAS = ("dev", "uvloop")


def main() -> None:
    """Create or refresh the environment that is named first; further extras may follow."""
    if sys.version_info < OLDEST_PYTHON:
        sys.exit("venv: Python 3.11 or newer is needed; set PYTHON to its path")
    folder, extras = Path(sys.argv[1]), (*EXTRAS, *sys.argv[2:])
    python = folder / "bin" / "python"
    if not _has_pip(python):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            _create(folder, python)
        except PackagesUnavailable as error:
            sys.exit(f"venv: install python3-venv, this Python has no ensurepip ({error})")
    # The build backend is pinned too, so it is installed first and used in place.
    _pip(python, "install", "-c", PINS, "hatchling", "editables")
    _pip(python, "install", "-c", PINS, "--no-build-isolation", "-e", f".[{','.join(extras)}]")


def _has_pip(python: Path) -> bool:
    try:
        done = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


def _create(folder: Path, python: Path) -> None:
    if importlib.util.find_spec("ensurepip") is not None:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        return
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    cache = Path(".cache")
    cache.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="pip.") as name:
        work = Path(name).resolve()
        unpack(Packages(work).download(PIP_PACKAGES), work)
        wheel = next(work.glob("usr/share/python-wheels/pip-*.whl"))
        trusted = SYSTEM_CERTIFICATES.exists() or "PIP_CERT" in os.environ
        options = [] if trusted else ["--cert", str(_bundle_certificates(work))]
        _pip(python, "install", *options, "-c", PINS, "pip", path=str(wheel))


def _bundle_certificates(root: Path) -> Path:
    """Debian's pip trusts the system's certificates alone, and a minimal system has none."""
    bundle = root / "certificates.pem"
    found = sorted(root.glob("usr/share/ca-certificates/mozilla/*.crt"))
    bundle.write_text("".join(path.read_text() for path in found))
    return bundle


def _pip(python: Path, *arguments: str, path: str = "") -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "-q"]
    command += ["--cache-dir", str(Path(".cache/pip").resolve()), *arguments]
    environment = {**os.environ, "PYTHONPATH": path} if path else None
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode != 0:
        sys.exit("venv: pip failed, see above")


if __name__ == "__main__":
    main()
