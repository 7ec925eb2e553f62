"""What a stranger installs: the wheel works on its own, the pins agree, the README's table is true."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from tiny import ROOT

import cppo


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


PACKAGE = ROOT / "cppo"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
OPTIONAL = {"vllm", "verl", "trl"}
"""Packages that may be missing, so that they may be imported in a function."""


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(module, whether a function imports it) of every import in a file, wherever it stands."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, path
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.append((name if name in MODULES else node.module, id(node) in inside))
        elif isinstance(node, ast.Import):
            found += [(alias.name, id(node) in inside) for alias in node.names]
    return found


def own_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports."""
    return {name for name, _ in imports_of(path) if name.split(".")[0] == "cppo"}


def test_there_is_no_circle_of_imports() -> None:
    TopologicalSorter({name: own_imports(path) for name, path in MODULES.items()}).prepare()


def test_imports_point_one_way() -> None:
    """The package's docstring lists its rooms in order; a file imports from earlier ones and its own only."""
    order = re.findall(r"^    ([\w.]+) {2,}\S", cppo.__doc__ or "", re.MULTILINE)

    def place(module: str) -> int:
        parts = module.removeprefix("cppo.").split(".")
        prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        return next(order.index(prefix) for prefix in prefixes if prefix in order)

    wrong = [
        f"{name} imports {imported}"
        for name, path in MODULES.items()
        for imported in own_imports(path)
        if name != "cppo" and imported != "cppo" and place(imported) > place(name)
    ]
    assert not wrong
    assert {name.split(".")[1] for name in MODULES if name != "cppo"} == {name.split(".")[0] for name in order}


PROGRAMS = {"cppo.__main__", "cppo.rewards.verify_worker"}
"""The command line imports what a command needs when it is given; the judge's process guards itself before it imports."""


def test_functions_import_optional_packages_only() -> None:
    wrong = [
        f"{path.name} imports {imported} in a function"
        for name, path in MODULES.items()
        if name not in PROGRAMS
        for imported, inside in imports_of(path)
        if inside and imported.split(".")[0] not in OPTIONAL
    ]
    assert not wrong


def test_files_are_of_a_size_that_a_person_holds_in_mind() -> None:
    sizes = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert max(sizes.values()) <= 460, max(sizes, key=sizes.__getitem__)
    assert sizes["cppo.training.train"] < 300


def test_the_run_folder_has_one_owner() -> None:
    """No other file of the package spells the names of its parts."""
    for name, path in MODULES.items():
        if name in ("cppo.results.run_folder", "cppo.system.lock"):
            continue
        strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not strings & {"DONE", "checkpoints", "provenance.json", "metrics.jsonl"}, name


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
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == cppo.__version__
