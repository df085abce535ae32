"""Documents that are generated, or that name commands and files, are true."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
from own_process import captured
from PIL import Image

from cpikan_hr.cli import main as cli
from cpikan_hr.recipe_docs import document

ROOT = Path(__file__).parents[1]


def test_the_table_of_keys_is_the_one_of_the_types():
    assert (ROOT / "docs" / "recipes.md").read_text() == document()


def commands_of(name: str) -> list[list[str]]:
    """The indented command lines of a document, in order."""
    lines = re.findall(r"^    ((?:cpikan-hr|accelerate launch) .+?)(?:\s+#.*)?$", (ROOT / name).read_text(), flags=re.M)
    return [shlex.split(line) for line in lines]


def test_files_that_documents_name_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        assert not re.search(r"\b[A-Z]+_(ROWS?|FIELD|PPX|TIME|RSS|TEXT)\b", text), f"{page.name}: a number is missing"
        named = r"\b((?:accelerate_configs|recipes|docs|benchmarks)/[\w./-]+\.(?:yaml|md|py|jpg))"
        for path in re.findall(named, text):
            assert (ROOT / path).exists(), f"{page.name} names {path}"
        for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
            assert (page.parent / path).exists(), f"{page.name} shows {path}"


def test_the_commands_of_the_readme_run_one_after_the_other(tmp_path):
    """As they stand there, on a smaller wafer and a small photograph."""
    for folder in ("recipes", "accelerate_configs", "ds_configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    y, x = np.mgrid[0:310, 0:510]
    photo = np.stack([128 + 100 * np.sin(x / 19), 128 + 90 * np.cos(y / 17), (x + y) / 4], -1)
    Image.fromarray(photo.round().astype(np.uint8)).save(tmp_path / "photo.png")
    commands = commands_of("README.md")
    assert len(commands) >= 8
    for words in commands:
        script, *options = [word.replace("2336x1750", "160x120") for word in words]
        code, _, err = captured([str(Path(sys.executable).parent / script), *options], tmp_path)
        assert code == 0, f"{shlex.join(words)}: {err[-2000:]}"
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"height.tif", "classical.tif", "part.png"}
    assert (tmp_path / "runs" / "image" / "field.packed.safetensors").is_file()


def test_the_equation_of_the_documentation_is_trained_evaluated_and_drawn(tmp_path, monkeypatch, capsys):
    """Its files and commands as they stand there, with fewer iterations."""
    text = (ROOT / "docs" / "add_an_equation.md").read_text()
    for kind, language in (("py", "python"), ("yaml", "yaml")):
        codes = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)
        for name, code in zip(("klein_gordon", "plate"), codes, strict=True):
            assert kind != "py" or code.count("\n") < 40
            (tmp_path / f"{name}.{kind}").write_text(code.replace("iterations: 60", "iterations: 15"))
    monkeypatch.chdir(tmp_path)
    commands = commands_of("docs/add_an_equation.md")
    assert [words[1] for words in commands] == ["train", "evaluate", "render", "train", "train", "evaluate"]
    for words in commands:
        capsys.readouterr()
        assert cli(words[1:]) == 0, capsys.readouterr().err
        if words[1] == "evaluate":
            table = json.loads(capsys.readouterr().out)
            assert table["rel_l2"] < (1e-6 if words[2] == "runs/plate" else 0.1)
    assert list(table["conditions"]) == ["y_low_slope_u", "y_low_u", "y_high_u", "y_high_m", "periodic_x"]
    assert all(error["max"] < 1e-5 for error in table["conditions"].values())
    assert (tmp_path / "klein_gordon.tif").is_file()
    assert (tmp_path / "runs" / "inverse" / "field.safetensors").is_file()


def test_every_case_of_the_reliability_page_names_tests_that_are_there():
    lines = (ROOT / "docs" / "reliability.md").read_text().splitlines()
    cells = [line.split("|")[-2] for line in lines if line.startswith("|")]
    named = [re.findall(r"`([\w/]*\.py)?(?:::(\w+)(\*)?)?`", cell) for cell in cells if "`" in cell]
    assert len(named) > 40
    file = ""  # as a reader reads it: that of the test before
    for names in named:
        for path, name, more in names:
            file = path or file
            text = (ROOT / "tests" / file.removeprefix("tests/")).read_text()
            assert not name or f"def {name}{'' if more else '('}" in text, (file, name)
