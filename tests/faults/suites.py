"""Bad suites of every kind, through the real command line: one line, exit code 2, nothing written.

    python tests/faults/suites.py --count 200                what make faults runs; exit code 1 on a broken promise

Every kind is a function from a random generator to (the file's content, a part of the key that the error must name).
"""

import argparse
import contextlib
import copy
import gzip
import io
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from cppo.__main__ import main

TEXT = (Path(__file__).resolve().parents[2] / "config" / "smoke.yaml").read_text(encoding="utf-8")
SMOKE: dict[str, Any] = yaml.safe_load(re.sub(r"\b(\d)e-", r"\1.0e-", TEXT))  # PyYAML alone reads 1e-3 as text
SECONDS = 5.0
"""No suite may take longer to refuse."""
Keys = tuple[Any, ...]
Bad = tuple[str | bytes, str]
KINDS: dict[str, Callable[[random.Random], Bad]] = {}
COMMANDS = {
    "check-suite": lambda suite, root: ["check-suite", suite],
    "runs": lambda suite, root: ["runs", "--suite", suite],
    "train": lambda suite, root: ["train", "--suite", suite, "--root", root, "--run", "0123456789"],
    "data": lambda suite, root: ["data", "--suite", suite, "--root", root, "--setting", "tiny"],
    "collect": lambda suite, root: ["collect", "--suite", suite, "--root", root],
}


def kind(function: Callable[[random.Random], Bad]) -> Callable[[random.Random], Bad]:
    """Register a kind of bad suite under its name."""
    KINDS[function.__name__.replace("_", " ")] = function
    return function


def nodes(node: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Every node below, with its path."""
    yield keys, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield from nodes(child, (*keys, key))


NODES = dict(nodes(SMOKE))
LEAVES = {keys: node for keys, node in NODES.items() if not isinstance(node, dict | list)}
MAPPINGS = [keys for keys, node in NODES.items() if isinstance(node, dict)]
NUMBERS = [keys for keys, node in LEAVES.items() if isinstance(node, int | float) and not isinstance(node, bool)]
NAMES = [keys for keys in LEAVES if keys[-1] == "name"]


def at(keys: Keys, value: Any) -> Any:
    """A copy of the smoke suite with this node replaced."""
    raw = copy.deepcopy(SMOKE)
    node = raw
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    return raw


def dump(raw: Any) -> str:
    return yaml.safe_dump(raw, allow_unicode=True)


def named(keys: Keys) -> str:
    """What the error must name: the last key that is not a position in a list."""
    return next((str(key) for key in reversed(keys) if isinstance(key, str)), "")


def spliced(rng: random.Random, text: str) -> str:
    """The suite's text with one value replaced by this piece of YAML."""
    place = rng.choice(list(re.finditer(r"(?<=: )[a-z0-9.]+(?=[,}\n])", TEXT)))
    return TEXT[: place.start()] + text + TEXT[place.end() :]


@kind
def wrong_type(rng: random.Random) -> Bad:
    keys = rng.choice(list(LEAVES))
    old = LEAVES[keys]
    wrong: list[Any] = [[], {}, [old], {"x": old}, None]
    wrong += [str(old)] if not isinstance(old, str) else [7, True, 1.5]
    return dump(at(keys, rng.choice(wrong))), named(keys)


@kind
def out_of_range(rng: random.Random) -> Bad:
    keys = rng.choice(NUMBERS)
    return dump(at(keys, rng.choice([-1, -(10**9), -0.5, -1e308]))), named(keys)


@kind
def huge_number(rng: random.Random) -> Bad:
    keys = rng.choice(NUMBERS)
    mark = "0.123456789"
    huge = rng.choice(["9" * 5000, "1e999", "-1e400", "0x" + "f" * 40 + "z", "1:99:99:99z"])
    return dump(at(keys, float(mark))).replace(mark, huge), ""


@kind
def not_a_number(rng: random.Random) -> Bad:
    keys = rng.choice(NUMBERS)
    return dump(at(keys, rng.choice([float("nan"), float("inf"), -float("inf")]))), named(keys)


@kind
def unknown_key(rng: random.Random) -> Bad:
    keys = rng.choice([k for k in MAPPINGS if k != ("settings",) and "settings" not in k[2:]])
    name = rng.choice(
        ["colour", "Seeds", "título", "__class__", "model_config", "a.b", "x\ny", "", " lr", "$ref", "x" * 400]
    )
    raw = copy.deepcopy(SMOKE)
    node: Any = raw
    for key in keys:
        node = node[key]
    node[name] = rng.choice([1, "x", None, [], {}])
    return dump(raw), ""


@kind
def missing_key(rng: random.Random) -> Bad:
    required = "title model task family seeds lr prompts sizes size objective samples".split()
    keys = rng.choice([k for k in NODES if k and k[-1] in required])
    raw = copy.deepcopy(SMOKE)
    node: Any = raw
    for key in keys[:-1]:
        node = node[key]
    del node[keys[-1]]
    return dump(raw), named(keys)


@kind
def duplicate_key(rng: random.Random) -> Bad:
    lines = TEXT.splitlines()
    keyed = [i for i, line in enumerate(lines) if re.match(r" *[a-z_]+: \S", line)]
    i = rng.choice(keyed)
    key = lines[i].split(":")[0].strip()
    lines.insert(i, lines[i])
    return "\n".join(lines), key


@kind
def duplicate_name(rng: random.Random) -> Bad:
    what = rng.choice(["rules", "benchmarks", "seeds", "many seeds"])
    if what == "rules":
        entries = SMOKE["rules"]
        return dump({**SMOKE, "rules": [*entries, rng.choice(entries)]}), "name"
    if what == "benchmarks":
        keys = ("settings", "tiny", "task", "benchmarks")
        return dump(at(keys, [*NODES[keys], rng.choice(NODES[keys])])), "benchmarks"
    seeds = list(range(20_000)) if what == "many seeds" else [3, 4, 5]
    return dump({**SMOKE, "seeds": [*seeds, rng.choice(seeds)]}), "seeds"


@kind
def path_in_a_name(rng: random.Random) -> Bad:
    names = [
        "../x",
        "/etc/passwd",
        "a/../../b",
        "..",
        ".",
        "a\\..\\b",
        "~root",
        "a\0b",
        "$HOME",
        "a b",
        "con:",
        "\u2024\u2024/x",
    ]
    name = rng.choice([*names, "../" * 40 + "x"])
    place = rng.choice([*NAMES, "setting", "params_by_setting", "resources"])
    if place == "setting":
        return dump({**SMOKE, "settings": {name: SMOKE["settings"]["tiny"]}}), "settings"
    if place == "resources":
        return dump({**SMOKE, "resources": {name: {}}}), "resources"
    if place == "params_by_setting":
        return dump(at(("rules", 0), {**SMOKE["rules"][0], "params_by_setting": {name: {}}})), "params_by_setting"
    return dump(at(place, name)), "name"  # type: ignore[arg-type]


@kind
def module_path(rng: random.Random) -> Bad:
    paths = (
        "os:system ..os:system builtins:eval a/b:c subprocess:run os.path cppo.__main__:main x:y:z no.such:rule math:pi"
    )
    text = rng.choice(paths.split())
    return dump(at(("rules", 0, "objective"), text)), "objective"


@kind
def alias_cycle(rng: random.Random) -> Bad:
    cycles = ["&a [*a]", "&a {x: *a}", "&a [1, [2, {y: *a}]]", "&a {*a : 1}", "&a [&b [*a, *b]]", "{<<: &a {<<: *a}}"]
    return spliced(rng, rng.choice(cycles)), ""


@kind
def alias_bomb(rng: random.Random) -> Bad:
    """A billion laughs: each list is nine times the one before."""
    depth, shape = rng.randrange(9, 40), rng.choice(["list", "mapping", "merge"])
    lines = ["a0: &a0 [lol, lol]" if shape == "list" else "a0: &a0 {lol: 1}"]
    for i in range(1, depth):
        names = [f"*a{i - 1}"] * 9
        body = {
            "list": f"[{', '.join(names)}]",
            "mapping": "{" + ", ".join(f"k{j}: {name}" for j, name in enumerate(names)) + "}",
            "merge": f"{{<<: [{', '.join(names)}], k{i}: 1}}",
        }[shape]
        lines.append(f"a{i}: &a{i} {body}")
    text = "\n".join(lines) + "\n"
    return (text + TEXT) if rng.random() < 0.5 else TEXT.replace("seeds: [0, 1]", f"seeds: *a{depth - 1}").join(
        [text, ""]
    ), ""


@kind
def wrong_encoding(rng: random.Random) -> Bad:
    text = TEXT.replace("Qwen3-tiny", "Qwen3-größe")
    return text.encode(rng.choice(["utf-16", "utf-32", "latin-1", "utf-16-le", "cp1252", "utf-7"])), ""


@kind
def binary(rng: random.Random) -> Bad:
    noise, packed = rng.randbytes(rng.randrange(1, 3000)), gzip.compress(TEXT.encode())
    return rng.choice([noise, packed, b"\x89PNG\r\n\x1a\n" + bytes(50), b"\0" * 100]), ""


@kind
def empty(rng: random.Random) -> Bad:
    texts = [
        "",
        " \n\n",
        "# only a comment\n",
        "---\n",
        "null",
        "[]",
        "{}",
        "~",
        "''",
        "--- \n...\n",
        "0",
        "- - -",
        "\ufeff",
    ]
    return rng.choice(texts), ""


@kind
def deep(rng: random.Random) -> Bad:
    n = rng.choice([90, 300, 1000, 5000])
    left, right = rng.choice([("[", "]"), ("{a: ", "}"), ("[{a: [", "]}]"), ("? ", "")])
    return spliced(rng, left * n + "1" + right * n), ""


@kind
def large(rng: random.Random) -> Bad:
    return rng.choice([TEXT + "#" * 2**20, TEXT + "x: [" + "1," * 150_000 + "]\n", "[" * 2**21, TEXT * 1000]), ""


@kind
def tag(rng: random.Random) -> Bad:
    tags = """!!python/object/apply:os.system ['touch CANARY']|!!python/name:os.system|!!python/module:os|!!binary x
    !!set {a, b}|!!omap [a: 1]|!unknown x|!!timestamp x|!!int x|!!float x|!!bool x|!!null x|!!python/tuple [1]|!!map [1]
    !!binary aGk=|!!seq {a: 1}|!!python/object/new:type [x, [], {}]
    !!pairs [a: 1]|!!str|2026-02-31|!<tag:yaml.org,2002:python/object:os.x> {}"""
    return spliced(rng, rng.choice([text.strip() for text in re.split(r"[|\n]", tags)])), ""


@kind
def syntax(rng: random.Random) -> Bad:
    how, i = rng.choice(["cut", "insert", "remove"]), rng.randrange(200, len(TEXT))
    if how == "cut":
        return TEXT[:i], ""
    if how == "insert":
        return TEXT[:i] + rng.choice("{}[]:,&*!|>%@`\t\"'\x07\x85\ufffe") + TEXT[i:], ""
    return TEXT[:i] + TEXT[i + rng.randrange(1, 40) :], ""


@kind
def impossible_together(rng: random.Random) -> Bad:
    keys, value, says = rng.choice(
        [
            (("settings", "tiny", "rollout", "minibatch"), 3, "minibatch"),
            (("settings", "tiny", "model", "kv_heads"), 3, "kv_heads"),
            (("settings", "tiny", "model", "experts"), 4, "experts"),
            (("settings", "tiny", "checkpoint_every"), 3, "checkpoint_every"),
            (("settings", "tiny", "rollout", "max_response_tokens"), 5, "max_response_tokens"),
            (("settings", "tiny", "rollout", "overlong_buffer"), 99, "overlong_buffer"),
            (
                ("settings", "tiny", "model"),
                {"name": "organisation/model", "trust_remote_code": True},
                "trust_remote_code",
            ),
            (("rules", 4, "divergence"), None, "divergence"),
            (("rules", 0, "divergence"), {"estimator": "binary"}, "divergence"),
            (("rules", 4, "divergence"), {"estimator": "top_k"}, "divergence"),
            (("rules", 0, "params"), {"delta": 1.0}, "delta"),
            (("rules", 0, "name"), "base", "base"),
        ]
    )
    return dump(at(keys, value)), says


@kind
def any_text(rng: random.Random) -> Bad:
    alphabet = "ab:-[]{}#&*!|>'\"%@`,? \n\t01.~<=\\é\u2028\x1b🙂"
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 200))), ""


# Running them ---------------------------------------------------------------------------------------------------------


def tree(folder: Path) -> list[tuple[str, int, int]]:
    """Everything below, files with size and time."""
    found = [(str(path), path.stat(), path.is_file()) for path in folder.rglob("*")]
    return sorted((name, stat.st_size, stat.st_mtime_ns) if file else (name, 0, 0) for name, stat, file in found)


def attempt(folder: Path, content: str | bytes, command: str) -> tuple[int, str, str]:
    """(exit code, what was printed, what was written to standard error) of a command on this suite."""
    path = folder / "suite.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(COMMANDS[command](str(path), str(folder / "runs")))
    return code, out.getvalue(), err.getvalue()


def fuzz(count: int) -> tuple[Counter[str], int, list[str]]:
    """`count` refused suites: (how many of each kind, how many others were valid after all, broken promises)."""
    tally: Counter[str] = Counter()
    valid, broken, number = 0, [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for command in COMMANDS:  # their imports are not what is timed
            attempt(folder, "", command)
        while tally.total() < count:
            label = list(KINDS)[number % len(KINDS)]
            content, key = KINDS[label](random.Random(f"{label} {number}"))
            # Every command refuses a bad suite in the same way: the first kinds of each round are tried with the others.
            command = list(COMMANDS)[number % len(COMMANDS)] if number % 3 else "check-suite"
            number += 1
            attempt(folder, "", "check-suite")
            before, start = tree(folder), time.perf_counter()
            code, out, err = attempt(folder, content, command)
            seconds = time.perf_counter() - start
            where = f"{label} ({command}): {content!r:.100}: "
            after = [entry for entry in tree(folder) if not entry[0].endswith("suite.yaml")]
            if after != [entry for entry in before if not entry[0].endswith("suite.yaml")]:
                broken.append(f"{where}written: {after}")
            if seconds > SECONDS:
                broken.append(f"{where}{seconds:.1f} s")
            if code == 0 and label in ("syntax", "any text", "empty", "wrong encoding", "tag", "huge number"):
                valid += 1
                continue
            tally[label] += 1
            start_of_line = f"cppo: error: {folder}/suite.yaml:"
            if code != 2 or out or len(err.splitlines()) != 1 or not err.startswith(start_of_line):
                broken.append(f"{where}exit code {code}, printed {out!r:.100}, said {err!r:.300}")
            elif key not in err.removeprefix(start_of_line) or len(err) > 1500:
                broken.append(f"{where}does not name {key}: {err!r:.300}")
    return tally, valid, broken


def script() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=200, help="how many bad suites")
    tally, valid, broken = fuzz(parser.parse_args().count)
    print(f"{tally.total()} bad suites refused ({valid} mutations were valid); of each kind: {json.dumps(dict(tally))}")
    for line in broken:
        print(f"BROKEN {line}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(script())
