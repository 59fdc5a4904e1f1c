"""`import dynattn` is light, and what it loads later it loads when it is used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import dynattn

ROOT = Path(__file__).parents[1]
HEAVY = ["timm", "torchvision", "matplotlib", "skimage", "sklearn", "accelerate", "numba", "IPython", "scipy"]


def loaded_after(program: str) -> set[str]:
    """Top-level modules in a new process, after it has run a program."""
    program += "; import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout))


@pytest.mark.slow
def test_import_loads_nothing_heavy():
    loaded = loaded_after("import dynattn; dir(dynattn); dynattn.__version__")
    assert not loaded & {"torch", "numpy", *HEAVY}


@pytest.mark.slow
def test_what_models_do_not_need_loads_nothing_heavy():
    program = "import dynattn, dynattn.cli; from dynattn import bench; dynattn.core, dynattn.weights, dynattn.tracing"
    assert not loaded_after(program) & set(HEAVY)


@pytest.mark.slow
def test_a_model_loads_neither_figures_nor_training():
    loaded = loaded_after("import dynattn; dynattn.create_model('dat_mini')")
    assert "timm" in loaded and not loaded & {"matplotlib", "skimage", "sklearn", "accelerate", "IPython"}


def test_public_names():
    for name in dynattn.__all__:
        assert getattr(dynattn, name) is not None
    assert set(dynattn.__all__) <= set(dir(dynattn))
    for name in ("create_model", "list_models", "load_official", "trace"):
        assert callable(getattr(dynattn, name)) and name in dynattn.__all__
    with pytest.raises(AttributeError, match="module 'dynattn' has no attribute 'modles'"):
        dynattn.modles  # noqa: B018


def test_every_name_can_be_imported_from_the_models():
    namespace = {}
    exec("from dynattn.models import *", namespace)
    assert {"create_model", "list_models", "dat_tiny"} <= set(namespace)
