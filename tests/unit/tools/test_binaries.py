import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.localpg import binaries as module
from tools.localpg.binaries import Binaries, BinariesNotFound, embedded_binaries, find_binaries

Install = Callable[[Path, str], Path]
WriteProgram = Callable[[Path, str], Path]


@pytest.fixture
def machine(
    tmp_path: Path,
    install: Install,
    write_program: WriteProgram,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A machine with a chosen 14, a configured 16 and Debian's 9 and 17."""
    configured = install(tmp_path / "configured", "16.4")
    write_program(tmp_path / "path" / "pg_config", f"echo {configured}")
    for version in ("9.6", "17.2"):
        install(tmp_path / "debian" / version.partition(".")[0], version)
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    monkeypatch.setenv("PG_BINDIR", str(install(tmp_path / "chosen", "14.1")))
    monkeypatch.setattr(module, "DEBIAN_SERVERS", tmp_path / "debian")
    return tmp_path


def test_the_search_goes_from_chosen_to_embedded(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_binaries().version == 14
    monkeypatch.delenv("PG_BINDIR")
    assert find_binaries().version == 16
    (machine / "path" / "pg_config").unlink()
    monkeypatch.setenv("PATH", str(machine / "path"))
    assert find_binaries().version == 17
    monkeypatch.setattr(module, "DEBIAN_SERVERS", machine / "nowhere")
    assert find_binaries() == embedded_binaries()


@pytest.mark.parametrize("version", [14, 16, 17, 9])
def test_a_version_is_found_wherever_it_is(machine: Path, version: int) -> None:
    assert find_binaries(version).version == version


def test_a_version_that_is_nowhere_is_named(machine: Path) -> None:
    with pytest.raises(BinariesNotFound, match="no PostgreSQL 8 server found: set PG_BINDIR"):
        find_binaries(8)


def test_a_wrong_choice_is_an_error_not_a_fallback(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_BINDIR", str(machine / "path"))
    with pytest.raises(BinariesNotFound, match="holds no postgres and initdb"):
        find_binaries()


def test_a_client_only_installation_is_passed_over(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PG_BINDIR")
    (machine / "configured" / "bin" / "initdb").unlink()
    assert find_binaries().version == 17


def test_what_a_build_knows(tmp_path: Path, install: Install) -> None:
    found = Binaries(install(tmp_path, "15.20"), tmp_path)
    assert (found.version, found.full_version) == (15, "15.20")
    assert found.settings == {"wal_level", "work_mem"}
    assert not found.has_wal2json
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "wal2json.so").touch()
    assert Binaries(found.bindir, tmp_path).has_wal2json


def test_programs_get_nothing_of_the_callers_environment(
    tmp_path: Path, write_program: WriteProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "secret")
    write_program(tmp_path / "bin" / "show", "env")
    plain = Binaries(tmp_path / "bin", tmp_path)
    assert "secret" not in plain.output("show")
    with_libraries = Binaries(tmp_path / "bin", tmp_path, tmp_path / "lib")
    assert f"LD_LIBRARY_PATH={tmp_path / 'lib'}" in with_libraries.output("show")


@pytest.mark.parametrize("script", ["exit 3", "echo something else"])
def test_a_program_that_is_no_server_is_an_error(
    tmp_path: Path, write_program: WriteProgram, script: str
) -> None:
    write_program(tmp_path / "bin" / "postgres", script)
    with pytest.raises(BinariesNotFound, match=str(tmp_path)):
        _ = Binaries(tmp_path / "bin", tmp_path).version


def test_the_embedded_server_is_complete() -> None:
    found = embedded_binaries()
    assert found is not None
    programs = ("postgres", "initdb", "pg_recvlogical", "pgbench")
    assert all(os.access(found.bindir / program, os.X_OK) for program in programs)
