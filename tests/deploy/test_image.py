"""The image: linted, and built here as its Dockerfile says, without an engine."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.deploy.dockerfile import Stage, parse
from tests.deploy.kustomize import PROJECT
from tests.servers import wait_until
from tools.supervision import free_port

DOCKERFILE = PROJECT / "deploy" / "Dockerfile"
IGNORED = PROJECT / "deploy" / "Dockerfile.dockerignore"
STAGES = {stage.name: stage for stage in parse(DOCKERFILE.read_text())}
UNPRIVILEGED = 65534 if os.geteuid() == 0 else None
"""Who runs what was built; nobody else than now, unless that is root."""
SIZE_LIMIT_MB = 120
"""Of the environment that is shipped; the base is about as large again."""


def test_the_linter_has_nothing_to_say() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, DOCKERFILE], capture_output=True, check=False, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_can_say_something() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    text = DOCKERFILE.read_text().replace("python:3.11-slim-bookworm AS base", "python AS base")
    done = subprocess.run([linter, "-"], input=text, capture_output=True, check=False, text=True)
    assert "DL3006" in done.stdout  # always tag the version of an image explicitly
    assert done.returncode == 1


def judge_stages(stages: dict[str, Stage]) -> list[str]:
    """What the linter does not look at."""
    findings = []
    base = stages["base"]
    if [i.value for i in base.all("USER")] != ["10001:10001"]:
        findings.append("not the numeric user that the manifests run it as")
    if not base.all("HEALTHCHECK"):
        findings.append("no HEALTHCHECK")
    if any(
        i.name in {"USER", "RUN"}
        for name in ("shop", "pgconductor")
        for i in stages[name].instructions
    ):
        findings.append("a stage on the base may become another user")
    if list(stages)[-1] != "pgconductor":
        findings.append("without --target, another image is built")
    named = {stage.base for stage in stages.values()} - stages.keys()
    findings += [f"{name} has no version" for name in named if ":" not in name.rpartition("/")[2]]
    return findings


def test_the_stages_are_as_they_must_be() -> None:
    assert judge_stages(STAGES) == []


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ("USER 10001:10001\n", "", "numeric user"),
        ("USER 10001:10001\n", "USER root\n", "numeric user"),
        ("HEALTHCHECK", "LABEL", "HEALTHCHECK"),
        ("FROM base AS pgconductor", "FROM base AS pgconductor\nUSER root", "another user"),
        ("FROM base AS pgconductor", "FROM base AS pgconductor\nFROM base AS x", "--target"),
        ("python:3.11-slim-bookworm AS base", "host:5000/python AS base", "no version"),
    ],
)
def test_a_wrong_stage_is_found(old: str, new: str, finding: str) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    found = judge_stages({stage.name: stage for stage in parse(text.replace(old, new))})
    assert len(found) == 1
    assert finding in found[0]


def test_the_entry_points_are_those_of_the_project() -> None:
    scripts = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {"cdc", "conductor"}


# --- built as it says ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """The file system of the image, below a folder."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """The variables of the stage `base`, with their paths below the folder."""
        pairs = [word.partition("=") for i in STAGES["base"].all("ENV") for word in i.words]
        values = {name: relocate(value, self.root) for name, _, value in pairs}
        values["PATH"] = values["PATH"].replace("$PATH", os.environ["PATH"])
        return values

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command as the unprivileged user, in the image's folder."""
        return subprocess.run(
            command,
            cwd=self.root / "app",
            env={**self.environment, **variables},
            capture_output=True,
            check=False,
            text=True,
            user=UNPRIVILEGED,
            group=UNPRIVILEGED,
        )


def relocate(text: str, root: Path) -> str:
    """Move the image's paths below a folder."""
    for path in ("/opt/", "/wheels", "/app"):
        text = text.replace(path, f"{root}{path}")
    return text


def is_in_context(path: str) -> bool:
    """Whether the build sees a file: the last line of the ignore file that fits decides."""
    parts = path.split("/")
    prefixes = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    seen = True
    for line in IGNORED.read_text().splitlines():
        pattern, again = line.removeprefix("!"), line.startswith("!")
        anywhere = pattern.startswith("**/")
        candidates = parts if anywhere else prefixes
        if any(fnmatchcase(part, pattern.removeprefix("**/")) for part in candidates):
            seen = again
    return seen


def copy(words: list[str], target: Path) -> None:
    """COPY from the project, through the ignore file."""
    *sources, to = words
    for source in sources:
        path = PROJECT / source
        for file in [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]:
            if not is_in_context(file.relative_to(PROJECT).as_posix()):
                continue
            into = target / to / path.name if to.endswith("/") else target / to
            place = into / file.relative_to(path)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place)


@pytest.fixture(scope="module")
def built() -> Iterator[Built]:
    """Everything that the Dockerfile does, below a folder that everybody can read."""
    with tempfile.TemporaryDirectory(prefix="image-") as name:
        root = Path(name).resolve()
        root.chmod(0o755)
        build(STAGES["build"], root, root / "source", interpreter())
        (root / "app").mkdir()
        for stage in ("base", "shop"):
            for instruction in STAGES[stage].all("COPY"):
                words = [relocate(word, root) for word in instruction.words]
                if words[0] != "--from=build":  # it is there already
                    copy(words, root / "app")
        set_writable(root, on=False)
        yield Built(root)
        set_writable(root, on=True)


def interpreter() -> str:
    """A Python of this version that the unprivileged user can reach: root's own may be private."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (f"{sys.base_prefix}/bin/{version}", f"/usr/bin/{version}"):
        with suppress(OSError, subprocess.CalledProcessError):
            subprocess.run([candidate, "-c", "import venv"], check=True, user=UNPRIVILEGED)
            return candidate
    raise AssertionError(f"there is no {version} that an unprivileged user can run")


def set_writable(root: Path, *, on: bool) -> None:
    """Give or take the right to write below a folder, as the image's root is mounted read-only."""
    for path in (root, *root.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o200 if on else path.stat().st_mode & ~0o222)


def build(stage: Stage, root: Path, source: Path, python: str) -> None:
    """Run the build stage with this environment's pip: it has hatchling at its pinned version."""
    tools = root / "tools"
    tools.mkdir()
    source.mkdir()
    for tool, command in (("python", python), ("pip", f"{sys.executable} -m pip")):
        (tools / tool).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (tools / tool).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PIP_CACHE_DIR": str(PROJECT / ".cache" / "pip"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    for instruction in stage.instructions:
        if instruction.name == "COPY":
            copy(instruction.words, source)
        elif instruction.name == "RUN":
            done = subprocess.run(
                ["sh", "-ec", relocate(instruction.value, root)],
                cwd=source,
                env=environment,
                capture_output=True,
                check=False,
                text=True,
            )
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", ["conductor", "cdc"])
def test_an_unprivileged_user_runs_it(built: Built, program: str) -> None:
    done = built.run(program, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage" in done.stdout
    assert Path(shutil.which(program, path=built.environment["PATH"]) or "").is_relative_to(
        built.root
    )


def test_the_code_cannot_be_written_by_it(built: Built) -> None:
    places = ("app", "opt/pgconductor/lib", "opt/pgconductor/bin")
    done = built.run("sh", "-c", f"for d in {' '.join(places)}; do touch {built.root}/$d/x; done")
    assert done.stderr.count("Permission denied") == len(places)


def test_it_has_what_the_installation_can_use_and_no_more(built: Built) -> None:
    names = ("uvloop", "opentelemetry", "psycopg_binary", "cdc", "conductor")
    probe = f"import importlib.util as u; print([n for n in {names} if not u.find_spec(n)])"
    assert built.run("python", "-c", probe).stdout.strip() == "[]"
    packages = next(built.root.glob("opt/pgconductor/lib/python*/site-packages"))
    assert not list(packages.glob("pip*"))
    assert not list(packages.glob("pytest*"))
    size = sum(f.stat().st_size for f in packages.rglob("*") if f.is_file()) / 1e6
    assert size < SIZE_LIMIT_MB


def test_the_installed_versions_are_the_pinned_ones(built: Built) -> None:
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    pins = {normal(line.partition("==")[0]): line.partition("==")[2] for line in lines}
    probe = (
        "from importlib.metadata import distributions\n"
        "for d in distributions(): print(d.metadata['Name'], d.version)"
    )
    found = dict(
        line.split() for line in built.run("python", "-I", "-c", probe).stdout.splitlines()
    )
    del found["pgconductor"]
    assert {n: v for n, v in found.items() if pins.get(normal(n)) != v} == {}


def normal(name: str) -> str:
    """A distribution's name as it is compared."""
    return name.lower().replace("_", "-").replace(".", "-")


def test_the_shop_is_in_its_image(built: Built) -> None:
    done = built.run("python", "-c", "import examples.shop.tasks, examples.shop.traffic")
    assert (done.returncode, done.stderr) == (0, "")
    done = built.run("python", "-m", "examples.shop.traffic", "--help")
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("cdc/cli.py", True),
        ("deploy/healthcheck.py", True),
        ("examples/shop/schema.sql", True),
        ("examples/monorepo/x.py", False),
        ("cdc/__pycache__/cli.cpython-311.pyc", False),
        (".git/config", False),
        ("tests/conftest.py", False),
        ("deploy/compose.yaml", False),
    ],
)
def test_the_build_sees_what_it_needs_and_no_more(path: str, seen: bool) -> None:
    assert is_in_context(path) == seen


# --- its health check ---------------------------------------------------------------------------


@pytest.fixture
def command(built: Built) -> list[str]:
    """The command of HEALTHCHECK."""
    _, _, words = STAGES["base"].all("HEALTHCHECK")[0].value.partition("CMD ")
    return [relocate(word, built.root) for word in json.loads(words)]


def test_the_health_check_asks_the_process(built: Built, command: list[str]) -> None:
    port = free_port()
    ports = {"CDC_METRICS_PORT": str(port), "CONDUCTOR_METRICS_PORT": str(free_port())}
    done = built.run(*command, **ports)
    assert (done.returncode, done.stderr.strip()) == (1, "nothing answers")
    process = subprocess.Popen(
        ["cdc", "run"],
        cwd=built.root / "app",
        env={**built.environment, **ports, "CDC_SOURCE_DSN": f"host=127.0.0.1 port={free_port()}"},
        stderr=subprocess.DEVNULL,
        user=UNPRIVILEGED,
        group=UNPRIVILEGED,
    )
    with process:
        try:
            wait_until(lambda: built.run(*command, **ports).returncode == 0, 60, "serving")
            done = built.run(*command, "/readyz", **ports)
            assert done.returncode == 1
            assert "not connected" in done.stderr
        finally:
            process.terminate()
        assert process.wait(10) == 0
