from collections.abc import Callable
from pathlib import Path

import pytest

from tools.localpg import debian
from tools.localpg.binaries import BinariesNotFound
from tools.localpg.debian import find_wal2json_binaries

WriteProgram = Callable[[Path, str], Path]

# Unpacks a server that wants liba, which wants libb; each is there once its package is.
FAKE_EXTRACT = """
case "$1" in
--field) case "$2" in
    *postgresql-15_*) echo 'locales | locales-all, liba (>= 1), libllvm14, tzdata';;
    *liba_*) echo 'libb, libc6';;
    esac;;
--extract)
    bin="$3/usr/lib/postgresql/15/bin"
    mkdir -p "$bin" "$3/usr/lib/x86_64-linux-gnu"
    touch "$bin/postgres" "$3/usr/lib/x86_64-linux-gnu/$(basename "$2" _1.deb).so";;
esac
"""
FAKE_LDD = """
for lib in liba libb; do
    test -e "$LD_LIBRARY_PATH/$lib.so" || echo "	$lib.so.1 => not found"
done
"""
FAKE_APT = """
echo "$*" >>"$0.log"
for word; do
    case "$word" in
    download) downloading=1;;
    postgresql-*|lib*) test -n "$downloading" && touch "$PWD/${word}_1.deb";;
    esac
done
"""
FAKE_DPKG_QUERY = """
for last; do :; done
test "$last" = libc6 && printf installed || printf not-installed
"""


@pytest.fixture
def path(tmp_path: Path, write_program: WriteProgram, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with Debian's tools and no server."""
    folder = tmp_path / "path"
    write_program(folder / "apt-get", FAKE_APT)
    write_program(folder / "dpkg-deb", FAKE_EXTRACT)
    write_program(folder / "dpkg-query", FAKE_DPKG_QUERY)
    write_program(folder / "ldd", FAKE_LDD)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(debian, "DEBIAN_SERVERS", tmp_path / "nowhere")
    return folder


def calls(path: Path) -> list[str]:
    log = path / "apt-get.log"
    return log.read_text().splitlines() if log.exists() else []


def test_the_system_server_is_used_when_it_has_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bindir = tmp_path / "15" / "bin"
    library = tmp_path / "15" / "lib"
    bindir.mkdir(parents=True)
    library.mkdir()
    (bindir / "postgres").touch()
    (library / "wal2json.so").touch()
    monkeypatch.setattr(debian, "DEBIAN_SERVERS", tmp_path)
    assert find_wal2json_binaries(tmp_path / "cache").bindir == bindir
    assert not (tmp_path / "cache").exists()


def test_packages_and_missing_libraries_are_unpacked_once(path: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    found = find_wal2json_binaries(cache)
    assert found.bindir == cache / "postgresql-15/usr/lib/postgresql/15/bin"
    assert found.library_path == cache / "postgresql-15/usr/lib/x86_64-linux-gnu"
    downloads = [call.partition("download ")[2] for call in calls(path)]
    expected = "postgresql-15 postgresql-client-15 postgresql-15-wal2json"
    assert downloads == [expected, "liba", "libb"]
    assert find_wal2json_binaries(cache) == found
    assert len(calls(path)) == 3
    assert [entry.name for entry in cache.iterdir()] == ["postgresql-15"]


def test_private_package_lists_when_the_machine_has_none(
    path: Path, tmp_path: Path, write_program: WriteProgram
) -> None:
    refusal = 'case "$*" in *Dir::State=*) ;; *) echo "E: No packages found" >&2; exit 100;; esac'
    write_program(path / "apt-get", f"{refusal}\n{FAKE_APT}")
    cache = tmp_path / "cache"
    find_wal2json_binaries(cache)
    assert calls(path)[0].endswith(" update")
    assert f"Dir::State={cache}" in calls(path)[0]


@pytest.mark.parametrize("program", ["apt-get", "dpkg-deb", "ldd"])
def test_another_system_is_told_in_one_line(
    path: Path, tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(path))
    (path / program).unlink()
    with pytest.raises(BinariesNotFound) as caught:
        find_wal2json_binaries(tmp_path / "cache")
    assert str(caught.value) == f"Debian's packages cannot be had here: no {program}"


def test_a_failed_download_is_told_in_one_line_and_leaves_nothing(
    path: Path, tmp_path: Path, write_program: WriteProgram
) -> None:
    script = "echo 'W: noise' >&2; echo 'E: Unable to locate package' >&2; exit 100"
    write_program(path / "apt-get", script)
    with pytest.raises(BinariesNotFound) as caught:
        find_wal2json_binaries(tmp_path / "cache")
    assert "here: E: Unable to locate package" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_library_that_no_package_brings_is_named(
    path: Path, tmp_path: Path, write_program: WriteProgram
) -> None:
    write_program(path / "ldd", "echo '	libz.so.9 => not found'")
    with pytest.raises(BinariesNotFound, match=r"libraries not found: libz\.so\.9"):
        find_wal2json_binaries(tmp_path / "cache")
