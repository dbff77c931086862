"""The wheel and the source package: what is in them, and that the wheel alone is a gateway."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile

import pytest

from tests.integration.process import REPOSITORY, environment

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
NAME = f"xenios-{PROJECT['version']}"
PACKAGES = {"gateway": REPOSITORY / "gateway", "gateway_plugins": REPOSITORY / "plugins/gateway_plugins"}


def run(*args, cwd):
    done = subprocess.run(args, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with both, by the build tools that are installed here: nothing is fetched."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, REPOSITORY, cwd=folder)
    return folder


def code():
    """The files of both packages that the gateway needs: its modules and their data."""
    return {
        f"{package}/{file.relative_to(folder)}"
        for package, folder in PACKAGES.items()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.name != "README.md"
    }


def test_the_wheel_holds_the_gateway_its_plugins_and_nothing_else(built):
    """No test, no deployment, no example, no file of a working copy: both packages, the default configuration, a licence."""
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        there = set(wheel.namelist())
    about = {
        f"{NAME}.dist-info/{name}" for name in ("METADATA", "WHEEL", "entry_points.txt", "licenses/LICENSE", "RECORD")
    }
    assert there == code() | {"gateway/data/xenios.yaml"} | about
    assert {name.rpartition(".")[2] for name in there - about} == {"py", "typed", "json", "yaml"}


def test_the_source_package_holds_what_the_wheel_is_made_from(built):
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        there = {file.name.removeprefix(f"{NAME}/") for file in archive.getmembers() if file.isfile()}
    sources = {name.replace("gateway_plugins/", "plugins/gateway_plugins/", 1) for name in code()}
    readmes = {str(file.relative_to(REPOSITORY)) for folder in PACKAGES.values() for file in folder.rglob("README.md")}
    whole = {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "PKG-INFO", ".gitignore", "config/xenios.yaml"}
    assert there == sources | readmes | whole


def test_the_wheel_alone_runs(built, tmp_path):
    """In an environment that has it and what it depends on, without the repository, each plugin is there."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    wheel = built / f"{NAME}-py3-none-any.whl"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=tmp_path,
    )
    [site] = (tmp_path / "venv/lib").glob("*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # not installed once more
    where = run(
        python, "-c", "import gateway, gateway_plugins; print(gateway.__file__, gateway_plugins.__file__)", cwd=tmp_path
    )
    assert all(path.startswith(str(site)) for path in where.split())
    assert "Start the gateway." in run(tmp_path / "venv/bin/xenios", "--help", cwd=tmp_path)
    shown = run(tmp_path / "venv/bin/xenios", "plugins", cwd=tmp_path)
    assert "api_keys" in shown
    assert PROJECT["version"] in run(tmp_path / "venv/bin/xenios", "version", cwd=tmp_path)
