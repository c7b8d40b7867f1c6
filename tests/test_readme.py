"""The README's tables follow from the code, and its Python runs. `python tests/test_readme.py --write` writes them."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest
import typer
from test_cli import ROOT, TOY, run, write_toy_data

from mdpt.data import Experiment, Section, d4rl_facts
from mdpt.mdpt import app
from mdpt.models import CHOICES, GUIDANCES, POLICIES, load_experiment, read_policy

FILE = ROOT / "README.md"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def option_rows() -> Iterator[str]:
    """An option, the commands that have it with this help, and the help."""
    yield from ("| option | commands | meaning |", "|---|---|---|")
    owners: dict[str, list[str]] = {}
    for name, command in COMMANDS.items():
        for option in command.params:
            if option.opts[0].startswith("--"):
                value = "" if option.is_flag else f" {option.metavar or option.type.name.upper()}"
                owners.setdefault(f"| `{option.opts[0]}{value}` | {{}} | {option.help} |", []).append(name)
    for row, names in owners.items():
        yield row.format("all" if len(names) == len(COMMANDS) else ", ".join(names))


def allowed(schema: dict[str, Any]) -> str:
    """What a field accepts, from its JSON schema."""
    if "anyOf" in schema:
        return ", or ".join(allowed(branch) for branch in schema["anyOf"] if branch != {"type": "null"})
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "prefixItems" in schema:
        return f"[{', '.join(allowed(item) for item in schema['prefixItems'])}]"
    if schema["type"] == "array":
        return f"list of {allowed(schema['items'])}"
    if schema["type"] == "object":
        return "table"
    if "pattern" in schema:
        return f"text of the form `{schema['pattern']}`"
    words = [{"integer": "integer", "number": "number", "string": "text", "boolean": "boolean"}[schema["type"]]]
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    words += [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    words += [f"multiple of {schema['multipleOf']}"] if "multipleOf" in schema else []
    return words[0] + (f" {', '.join(words[1:])}" if words[1:] else "")


def readers(table: str, name: str) -> str:
    """Which choices of a table read a field of it, such as "dql" or "sampler ddpm"; "" if all do."""
    found = []
    for field, registry in CHOICES.get(table, {}).items():  # type: ignore[call-overload]
        lines = [f"`{choice}`" for choice, line in registry.items() if name in line.reads]
        prefix = "" if field == "algorithm" else f"{field} "
        found += [prefix + ", ".join(lines)] if lines else []
    return "; ".join(found)


def field_rows(section: type[Section], table: str = "") -> Iterator[str]:
    """A field of a table: name, default, what is allowed, what reads it, meaning."""
    chosen = table in CHOICES
    yield f"| field | default | allowed |{' read by |' * chosen} meaning |"
    yield f"|---|---|---|{'---|' * chosen}---|"
    properties = section.model_json_schema()["properties"]
    for name, field in section.model_fields.items():
        if "$ref" not in properties[name]:
            default = "" if field.default is None else f"`{json.dumps(field.default)}`"
            by = f" {readers(table, name)} |" if chosen else ""
            yield f"| `{name}` | {default} | {allowed(properties[name])} |{by} {field.description} |"


def algorithm_rows(registry: dict[str, Any]) -> Iterator[str]:
    """An algorithm, and how it learns, by the first line about its loss; of policies also the network they bring."""
    policies = registry is POLICIES
    yield "| algorithm | how it learns | network |" if policies else "| algorithm | how it learns |"
    yield "|---|---|---|" if policies else "|---|---|"
    for name, line in registry.items():
        how = inspect.getdoc(line.loss).partition("\n")[0]  # type: ignore[union-attr]
        yield f"| `{name}` | {how} |" + (f" `{line.network}` |" if policies else "")


TABLES: dict[str, Any] = {"### Options": (option_rows,), "### top level": (field_rows, Experiment)} | {
    f"### `[{name}]`": (field_rows, type(field.default), name)
    for name, field in Experiment.model_fields.items()
    if isinstance(field.default, Section)
}
TABLES |= {"### Guidance algorithms": (algorithm_rows, GUIDANCES), "### Policy algorithms": (algorithm_rows, POLICIES)}


def with_table(text: str, heading: str) -> str:
    """The README with the first table under a heading made from the code."""
    lines = text.splitlines()
    assert lines.count(heading) == 1, heading
    first = next(i for i in range(lines.index(heading), len(lines)) if lines[i].startswith("|"))
    last = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
    rows, *what = TABLES[heading]
    return "\n".join([*lines[:first], *rows(*what), *lines[last:], ""])


@pytest.mark.parametrize("heading", TABLES)
def test_the_tables_follow_from_the_code(heading: str) -> None:
    text = FILE.read_text(encoding="utf-8")
    assert with_table(text, heading) == text, "run `python tests/test_readme.py --write`"


def test_the_front_door_is_short_and_has_both_command_lines() -> None:
    """Each one line that makes an environment, installs and runs; `.ci/run` runs the second as it stands there."""
    text = FILE.read_text(encoding="utf-8")
    assert len(text.partition("\n## Options and fields\n")[0].encode()) <= 12_000 and len(text.encode()) <= 32_000
    assert all(f"### `mdpt {name}`" in text for name in COMMANDS)
    main, tests = re.findall(r"^python3\.11 -m venv .*$", text, re.MULTILINE)
    assert " && pip install . && mdpt guidance hopper.toml && mdpt policy hopper.toml --guidance " in main
    assert main.endswith(" && mdpt evaluate hopper-dql.policy.pt")
    assert tests.endswith(" && pip install -e '.[test]' && pytest")


@pytest.mark.usefixtures("one_thread")
def test_the_python_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy.toml").write_text(TOY)
    write_toy_data(Path("toy.hdf5"))
    run("guidance toy.toml")
    run("policy toy.toml --guidance toy-idql.guidance.pt --out hopper-dql.policy.pt")
    recipes = (ROOT / "experiments" / "RECIPES.md").read_text(encoding="utf-8")
    code, arrays_code = (
        re.findall(r"```python\n(.*?)```", t, re.DOTALL)[0] for t in (FILE.read_text("utf-8"), recipes)
    )
    for observation, shape in ((np.zeros(2), (2,)), (np.zeros((3, 2)), (3, 2))):
        names = {"observation": observation}
        exec(code, names)  # noqa: S102
        action = np.asarray(names["action"])
        assert action.shape == shape and (action >= [-1, 0]).all() and (action <= [1, 4]).all() and action.any()
    Path("my.toml").write_text(TOY.replace('"hdf5"\npath = "toy.hdf5"', '"arrays"'))
    with h5py.File("toy.hdf5") as file:
        exec(arrays_code, {"arrays": {key: column[()] for key, column in file.items()}})  # noqa: S102
    by_arrays, by_file = read_policy(Path("my.policy.pt")), read_policy(Path("hopper-dql.policy.pt"))
    assert by_arrays.complete and by_arrays.dataset.hash == by_file.dataset.hash
    assert "Gentle-v0, 2 members x 1 episodes" in run("evaluate my.policy.pt --episodes 1").output
    assert max(len(block.replace("\n\n", "\n").splitlines()) for block in (code, arrays_code)) <= 6


@pytest.mark.parametrize(
    "path", [ROOT / "hopper.toml", *ROOT.glob("experiments/**/*.toml")], ids=lambda path: path.stem
)
def test_the_experiments_are_sound(path: Path) -> None:
    experiment = load_experiment(path)
    if experiment.data.source == "d4rl":
        assert "reference" in d4rl_facts(experiment.data.dataset or "")[0]


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    readme = FILE.read_text(encoding="utf-8")
    for each in TABLES:
        readme = with_table(readme, each)
    FILE.write_text(readme, encoding="utf-8")
