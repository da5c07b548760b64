from collections.abc import Callable
from pathlib import Path

import pytest

from tools.debs import PackagesUnavailable
from tools.prometheus import Prometheus, find_prometheus

WriteProgram = Callable[[Path, str], Path]

FAKE_APT = 'echo "$*" >>"$0.log"; touch "$PWD/prometheus_1.deb"'
FAKE_EXTRACT = 'mkdir -p "$3/usr/bin"; touch "$3/usr/bin/prometheus" "$3/usr/bin/promtool"'


@pytest.fixture
def path(tmp_path: Path, write_program: WriteProgram, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with Debian's tools and no Prometheus."""
    folder = tmp_path / "path"
    write_program(folder / "apt-get", FAKE_APT)
    write_program(folder / "dpkg-deb", FAKE_EXTRACT)
    for program in ("mkdir", "touch", "sh", "bash", "env"):
        if (real := Path("/bin", program)).exists():
            (folder / program).symlink_to(real)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_the_installed_one_is_used(path: Path, tmp_path: Path, write_program: WriteProgram) -> None:
    for program in ("prometheus", "promtool"):
        write_program(path / program, "")
    found = find_prometheus(tmp_path / "cache")
    assert found == Prometheus(path / "prometheus", path / "promtool")
    assert not (tmp_path / "cache").exists()


def test_it_is_unpacked_once(path: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    found = find_prometheus(cache)
    assert found.server == cache / "prometheus/usr/bin/prometheus"
    assert found.promtool.is_file()
    assert find_prometheus(cache) == found
    assert len((path / "apt-get.log").read_text().splitlines()) == 1
    assert [entry.name for entry in cache.iterdir()] == ["prometheus"]


def test_where_it_cannot_be_had_that_is_said(path: Path, tmp_path: Path) -> None:
    (path / "apt-get").unlink()
    with pytest.raises(PackagesUnavailable, match="no apt-get"):
        find_prometheus(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_promtool_finds_is_shown(tmp_path: Path, write_program: WriteProgram) -> None:
    promtool = write_program(tmp_path / "promtool", 'echo "checked $*"; test "$2" = good')
    prometheus = Prometheus(tmp_path / "prometheus", promtool)
    assert prometheus.check("check", "good") == "checked check good\n"
    with pytest.raises(AssertionError, match="checked check bad"):
        prometheus.check("check", "bad")
