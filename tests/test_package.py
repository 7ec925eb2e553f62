"""What a stranger installs: the wheel works on its own, the pins agree, the README's table is true."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from tiny import ROOT


def pins() -> list[str]:
    lines = (ROOT / "constraints" / "main.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_environment_yml_has_the_same_pins() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (listed,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert listed == pins()


def test_constraints_are_exact_public_versions() -> None:
    """No local version label, no CUDA package: the CPU wheel is taken where offered, the CUDA build elsewhere."""
    assert "torch==2.13.0" in pins()
    for pin in pins():
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!-]+", pin), pin
        assert not pin.lower().startswith(("nvidia-", "triton", "cuda-")), pin


def test_lock_keeps_public_pins_only() -> None:
    spec = importlib.util.spec_from_file_location("lock", ROOT / "constraints" / "lock.py")
    assert spec is not None and spec.loader is not None
    lock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lock)
    frozen = (
        "torch==2.13.0+cpu\nnvidia-cublas==1\npip==23\n-e git+x#egg=cppo-bench\n# note (a==1)\nabc @ file:///x\nB==2\n"
    )
    assert lock.pins(frozen) == ["B==2", "torch==2.13.0"]


def test_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    """Built, unpacked elsewhere, and used from there: every module is in it, and the command line runs."""
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--quiet",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "cppo").rglob("*.py")}
    assert modules == {p.relative_to(tmp_path / "site").as_posix() for p in (tmp_path / "site" / "cppo").rglob("*.py")}
    code = "import sys; sys.path.insert(0, sys.argv.pop()); import cppo.__main__ as m; print(m.__file__)"
    code += "; sys.exit(m.main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-P",
        "-c",
        code,
        "check-suite",
        str(ROOT / "config" / "mini.yaml"),
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith(str(tmp_path)) and "runs" in done.stdout


def test_objectives_import_neither_transformers_nor_lm_eval() -> None:
    code = "import sys, cppo.objectives, cppo.loss, cppo.divergences; print({'transformers', 'lm_eval'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_imports_point_backwards() -> None:
    """The order in the package's docstring is the order of its imports (functions may import late, with a reason)."""
    import cppo

    listed = re.search(r"in this order: (.*?)\.\n", cppo.__doc__ or "", re.DOTALL)
    assert listed is not None
    order = [name.strip() for name in listed[1].replace("\n", " ").split(",")]
    modules = {p.stem for p in (ROOT / "cppo").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert modules - {"__init__", "__pycache__", "verify_worker"} == set(order)
    for name in order:
        path = ROOT / "cppo" / name
        files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            for found in re.findall(
                r"^(?:from|import) cppo\.(\w+)|^from cppo import (.+)", file.read_text(), re.MULTILINE
            ):
                for imported in [found[0]] if found[0] else re.split(r", ", found[1]):
                    assert order.index(imported) <= order.index(name), f"{file.name} imports {imported}"


@pytest.mark.parametrize("name", ["LICENSE", "CITATION.cff", "CONTRIBUTING.md", "LOG.md"])
def test_documents_exist(name: str) -> None:
    assert (ROOT / name).stat().st_size > 200


def test_readme_names_real_files_and_targets() -> None:
    """Every path in code font exists and every make target is one."""
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^)make ([a-z-]+)", readme, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in set(
        re.findall(r"`((?:cppo|paper_figures|workflow|constraints|docs|tests|benchmarks)/[\w./-]+)`", readme)
    ):
        assert (ROOT / path).exists(), path


def test_readme_shows_the_published_table() -> None:
    shown = re.search(
        r"<!-- table1: (\S+), .*?-->\n(.*?)\n<!-- end of table1 -->", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert shown is not None and shown[2].strip() == (ROOT / shown[1]).read_text().strip()


def test_version_is_said_once() -> None:
    import cppo

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == cppo.__version__
