"""docs/objectives.md is what the docstrings say today, and the command line lists every objective."""

import dataclasses
import re
from pathlib import Path

import pytest
from tiny import ROOT

from cppo import advantages, divergences
from cppo.__main__ import main
from cppo.objectives import laws, names, objective, registry, spec
from cppo.render_docs import field_docs, markdown
from cppo.suite.presets import PRESETS

PAGE = (ROOT / "docs" / "objectives.md").read_text()


def test_the_page_is_not_stale(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["objectives", "--markdown"]) == 0
    renew = "stale: python -m cppo objectives --markdown > docs/objectives.md"
    assert capsys.readouterr().out == PAGE == markdown(), renew


def test_the_page_is_complete() -> None:
    for name in names():
        section = PAGE.split(f"\n## {name}\n")[1].split("\n#")[0]
        assert "Source:" in section, name
        assert ("Needs a divergence." in section) == ("divergence" in objective(name).needs)
        for field in dataclasses.fields(spec(name).params):
            assert f"| `{field.name}` |" in section, (name, field.name)
    for entry in PRESETS:
        assert f"| `{entry}` |" in PAGE
    for law in laws.LAWS:
        assert f"- **{law}**: " in PAGE
    for function in (divergences.exact, divergences.top_k, advantages.gae, advantages.rloo):
        assert f"- `{function.__name__}`: " in PAGE


def test_tables_have_equal_columns() -> None:
    """An unescaped | in a sentence would add one."""
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


@pytest.mark.parametrize("name", names())
def test_every_setting_and_rule_is_documented(name: str) -> None:
    """A sentence below every setting; what the rule is and its source in the docstring."""
    assert all(field_docs(spec(name).params).values())
    assert re.search(r"Source: .*\S", spec(name).function.__doc__ or "")


def test_objectives_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["objectives"]) == 0
    listed = capsys.readouterr().out
    blocks = {block.split(maxsplit=1)[0]: block for block in re.split(r"\n\n(?=\S)", listed.strip())}
    assert tuple(blocks) == names()
    for name, block in blocks.items():
        assert "Source:" in block and ("(needs a divergence)" in block) == ("divergence" in objective(name).needs)
        for field in dataclasses.fields(spec(name).params):
            assert f"      {field.name} = " in block, (name, field.name)


def test_the_readmes_example_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its file beside the caller and its entry in a suite: the suite is valid, and every law is kept."""
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(# my_rules\.py\n.*?)```", readme, re.DOTALL)
    entry = re.search(r"```yaml\n(.*?)```", readme, re.DOTALL)
    assert code is not None and entry is not None
    (tmp_path / "my_rules.py").write_text(code[1])
    suite = tmp_path / "suite.yaml"
    suite.write_text((ROOT / "config" / "smoke.yaml").read_text() + entry[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        registry._REGISTRY, "_entries", dict(registry._REGISTRY._entries)
    )  # leaves no trace for other tests
    assert main(["check-suite", str(suite)]) == 0
    assert main(["check", "my_rules:halt"]) == 0
    assert "my_rules:halt keeps every law" in capsys.readouterr().out
