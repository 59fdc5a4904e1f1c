"""A package from outside brings a mechanism, a model, a recipe and a figure: everything here works with it, unpatched.

The package lies in tests/neighbourhood. It is installed into a folder as pip would do it: its files, and beside them
the folder of metadata with its entry points. Each test uses it in a process of its own.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "neighbourhood"
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # starts processes


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """An environment in which the package is installed, with a trained checkpoint."""
    site = tmp_path_factory.mktemp("site")
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]
    shutil.copytree(SOURCE / "neighbourhood", site / "neighbourhood")
    metadata = site / f"neighbourhood-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: neighbourhood\nVersion: {project['version']}\n")
    lines = [
        f"[{group}]\n{name} = {value}\n"
        for group, plugins in project["entry-points"].items()
        for name, value in plugins.items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    cache = tmp_path_factory.mktemp("cache")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (site, ROOT))), "XDG_CACHE_HOME": str(cache)}
    runs = tmp_path_factory.mktemp("runs")
    run(environment, "train", "neighbourhood_mini", "--out", runs, "--workers", "1")  # the recipe
    shutil.copy(runs / "model.safetensors", site / "neighbourhood" / "neighbourhood_mini.safetensors")
    return environment


def run(environment: dict[str, str], *arguments: object, module: str = "dynattn", expect: int = 0) -> str:
    """What a command prints."""
    command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


def program(environment: dict[str, str], text: str, folder: Path | None = None) -> str:
    """What a program prints, that runs in a folder."""
    command = [sys.executable, "-W", "ignore", "-c", text]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_oracle_checks_it_and_names_its_mistakes(installed):
    text = """
import neighbourhood.plugin
from dynattn import verify
from neighbourhood.mechanism import neighbourhood_attention as right, neighbourhood_attention_torch as form
verify.check("neighbourhood_attention", right)
def wrong(q, k, v, shape, radius=1, scale=None):
    return right(q, k, v, shape, radius=radius + 1, scale=scale)
try:
    verify.check("neighbourhood_attention", wrong)
except verify.Mismatch as mismatch:
    print(mismatch.mistakes)
"""
    assert program(installed, text).strip() == "['one cell too far']"


def test_it_is_an_operation_like_any_other(installed):
    """`ops` offers it, and its form is switched by call, block and model."""
    text = """
import torch, dynattn, neighbourhood.plugin
from dynattn import ops
assert "neighbourhood_attention" in dir(ops) and ops.neighbourhood_attention.__doc__.startswith("Every query reads")
used, forms = [], ops.neighbourhood_attention.forms
for name, form in list(forms.items()):
    forms[name] = lambda *inputs, name=name, form=form: used.append(name) or form(*inputs)
q = torch.randn(1, 2, 6, 3)
ops.neighbourhood_attention(q, q, q, (2, 3))
ops.neighbourhood_attention(q, q, q, (2, 3), impl="loops")
with dynattn.implementation("loops"):
    ops.neighbourhood_attention(q, q, q, (2, 3))
model = dynattn.use_implementation(dynattn.create_model("neighbourhood_mini"), "loops")
model(torch.randn(1, 3, 16, 16))
print(*used)
try:
    ops.neighbourhood_attention(q, q, q, (2, 3), impl="numba")
except ValueError as error:
    print(error)
"""
    used, message = program(installed, text).splitlines()
    assert used.split() == ["torch", "loops", "loops", "loops", "loops"]  # two layers
    assert message == "impl: neighbourhood_attention has no 'numba' kernel here, only 'loops', 'torch' or 'auto'"


def test_dynattn_check_knows_it(installed, tmp_path):
    """In the process of its own, too."""
    file = tmp_path / "answers.py"
    file.write_text(
        "from neighbourhood import mechanism\n\n"
        "def neighbourhood_attention(q, k, v, query_shape, *, radius=1, scale=None):\n"
        "    return mechanism.neighbourhood_attention(q, k, v, query_shape, radius=radius, scale=scale)\n"
    )
    assert "neighbourhood_attention: passed" in run(installed, "check", file, "--cases", "5")


def test_its_model_is_made_trained_and_traced(installed):
    """By both doors, with features, and in the lens."""
    text = """
import timm, torch, dynattn, neighbourhood.plugin
from dynattn.widgets import Lens
model = dynattn.create_model("neighbourhood_mini", pretrained=True)
assert "neighbourhood_mini" in dynattn.list_models() and timm.is_model_pretrained("neighbourhood_mini")
x = torch.randn(1, 3, 32, 32)
assert torch.equal(timm.create_model("neighbourhood_mini", pretrained=True).eval()(x), model(x))
maps = timm.create_model("neighbourhood_mini", features_only=True)(x)
print([tuple(one.shape) for one in maps])
trace = dynattn.trace(model, x[0])
record = trace.of_kind("neighbourhood")[0]
assert record.exact and record.rest(0) < 1e-5
print(len(record.keys(16, 16).weight), round(float(trace.rollout(16, 16).sum()), 4))
print(Lens(model, x[0]))
"""
    shapes, keys, lens = program(installed, text).splitlines()
    assert shapes == "[(1, 8, 8, 8), (1, 16, 4, 4)]" and keys == "25 1.0"  # radius 2: five by five cells
    assert lens.startswith("Neighbourhood: Query (row ")


def test_its_checkpoint_is_kept_up_to_date(installed, tmp_path):
    """It lies in the folder of the package. What ships with dynattn is left out here: it takes hours."""
    text = """
import neighbourhood.plugin
from dynattn.training import print_runs, recipes, shipping, train_all
recipes()
shipping.SHIPPED = {"neighbourhood_mini": shipping.SHIPPED["neighbourhood_mini"]}
(run,) = shipping.shipped_runs()
print_runs()
assert train_all()
run.file.unlink()
print_runs()
assert train_all(2)
print_runs()
print(sorted(file.name for file in run.file.parent.glob("*mini*")), run.folder)
"""
    _, before, nothing, _, between, trained, _, after, files = program(installed, text, tmp_path).splitlines()
    assert before.split() == ["neighbourhood_mini", "up", "to", "date"] and nothing == "everything is up to date"
    assert between.split() == ["neighbourhood_mini", "to", "train", "missing"]
    assert trained.startswith("  1 of 1  neighbourhood_mini: accuracy 0.") and "after 2 steps" in trained
    assert after == before
    assert files == "['neighbourhood_mini.csv', 'neighbourhood_mini.safetensors'] runs/neighbourhood_mini/seed0"


def test_its_figure_is_drawn(installed, tmp_path):
    assert "attention on the object" in run(installed, "figures", "--paper", "neighbourhood", "--out", tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 1 and (tmp_path / "conditions.json").exists()


def test_a_plugin_that_fails_is_named_and_the_rest_works(installed, tmp_path):
    broken = tmp_path / "broken-1.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (broken / "entry_points.txt").write_text("[dynattn.plugins]\nbroken = no_such_module\n")
    environment = installed | {"PYTHONPATH": os.pathsep.join([str(tmp_path), installed["PYTHONPATH"]])}
    text = """
import warnings
from dynattn import plugins
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(plugins.load())
print([str(one.message) for one in caught if "broken" in str(one.message)])
"""
    names, warned = program(environment, text).splitlines()
    assert names == "('neighbourhood',)" and "plugin broken (no_such_module) is left out" in warned
