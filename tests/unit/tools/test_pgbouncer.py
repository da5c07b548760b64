from collections.abc import Callable
from pathlib import Path

import pytest

from tools.debs import PackagesUnavailable
from tools.pgbouncer import find_pgbouncer

WriteProgram = Callable[[Path, str], Path]

FAKE_APT = """
echo "$*" >>"$0.log"
for word; do case "$word" in pgbouncer|lib*) touch "$PWD/${word}_1.deb";; esac; done
"""
FAKE_DPKG = """
case "$1" in
--field) echo 'debconf | none, libone (>= 1), libtwo';;
--extract) mkdir -p "$3/usr/sbin" "$3/usr/lib/x86_64-linux-gnu"; touch "$3/usr/sbin/pgbouncer";;
esac
"""
FAKE_DPKG_QUERY = 'for last; do :; done; test "$last" = libtwo && printf installed || printf no'


@pytest.fixture
def path(tmp_path: Path, write_program: WriteProgram, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The programs of a machine with Debian's tools and no PgBouncer."""
    folder = tmp_path / "path"
    write_program(folder / "apt-get", FAKE_APT)
    write_program(folder / "dpkg-deb", FAKE_DPKG)
    write_program(folder / "dpkg-query", FAKE_DPKG_QUERY)
    for program in ("mkdir", "touch", "sh", "bash", "env"):
        if (real := Path("/bin", program)).exists():
            (folder / program).symlink_to(real)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_it_is_unpacked_once_with_the_libraries_that_the_system_lacks(
    path: Path, tmp_path: Path
) -> None:
    found = find_pgbouncer(tmp_path / "cache", tmp_path / "none")
    assert found.program.is_file()
    assert found.libraries is not None
    assert find_pgbouncer(tmp_path / "cache", tmp_path / "none") == found
    calls = (path / "apt-get.log").read_text().splitlines()
    assert [call.partition("download ")[2] for call in calls] == ["pgbouncer", "libone"]


def test_where_it_cannot_be_had_that_is_said(path: Path, tmp_path: Path) -> None:
    (path / "apt-get").unlink()
    with pytest.raises(PackagesUnavailable, match="no apt-get"):
        find_pgbouncer(tmp_path / "cache", tmp_path / "none")
