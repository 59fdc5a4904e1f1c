"""Graphs and processes: compiled, exported, traced, forked. Each in a process of its own, as users have it: slow."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
MODELS_OF_PAPERS = ["dat_mini", "dgt_mini", "biformer_mini", "debiformer_mini", "sgformer_mini", "hlg_mini"]
MODELS_OF_PAPERS += ["setr_naive_mini", "setr_pup_mini", "setr_mla_mini", "setr_pup_hlg_mini"]

MODELS = """
    import io, os, sys, warnings
    warnings.simplefilter("ignore")
    import torch, dynattn
    torch.set_num_threads(1)
    torch.manual_seed(0)
    TINY = dict(img_size=32, num_classes=3, drop_path_rate=0.0)
    DAT = TINY | dict(dims=(8, 16), depths=(2, 2), heads=(2, 2), groups=(1, 2), deformable_stages=(2,), window=4,
                      strides=(2, 1), kernels=(3, 3))
    DGT = TINY | dict(dims=(8, 16), depths=(1, 1), heads=(2, 2), groups=3, keys=5, head_dim=8)
    ROUTED = TINY | dict(dims=(8, 16), depths=(2, 2), heads=(2, 2), regions=3, topk=(2, 4))
    HLG = dict(dims=(48, 96), depths=(2, 1), heads=(2, 2), window=4)
    SETR = dict(dim=16, depth=2, heads=2, channels=8)
    SMALL = dict(dat_mini=DAT, dgt_mini=DGT, biformer_mini=ROUTED | dict(topk=(2,)),
                 debiformer_mini=ROUTED | dict(groups=(1, 2), agent_topk=(2, 4), strides=(2, 1), kernels=(3, 3)),
                 sgformer_mini=TINY | dict(dims=(8, 16), depths=(2, 1), heads=(2, 2), scales=((2, 1),),
                                           rates=((4, 2),), window=4),
                 hlg_mini=TINY | HLG,
                 setr_naive_mini=TINY | SETR | dict(layers=(2,), aux_layers=(1,)),
                 setr_pup_mini=TINY | SETR | dict(layers=(2,), aux_layers=(1,)),
                 setr_mla_mini=TINY | SETR | dict(layers=(1, 2)),
                 setr_pup_hlg_mini=TINY | HLG | dict(channels=32, decoder_heads=2, aux_stage=1))
    def model(name):
        return dynattn.create_model(name, **SMALL.get(name, TINY)).eval()
    def image(*shape):
        return torch.rand(shape[0], 3, *shape[1:])
    def same(one, other):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
"""


def run(program: str, **environment: str) -> str:
    """What a program prints that has the models above; raises where it fails or hangs."""
    text = textwrap.dedent(MODELS) + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-c", text],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


LOAD = """
    import sys, torch
    sys.modules["dynattn"] = None  # cannot be imported
    x, expected = torch.load(sys.argv[1] + "/answer.pt")
    program = torch.export.load(sys.argv[1] + "/program.pt2").module()
    torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.parametrize("name", MODELS_OF_PAPERS)
def test_an_exported_model_takes_any_batch_and_needs_no_package(name, tmp_path):
    """torch.export: "auto" is the torch form in what is exported; the file is read by a process without dynattn."""
    run(f"""
        network = model("{name}")
        shapes = ({{0: torch.export.Dim("batch", min=1, max=64)}},)
        program = torch.export.export(network, (image(2, 32, 32),), dynamic_shapes=shapes)
        torch.export.save(program, "{tmp_path}/program.pt2")
        x = image(5, 32, 32)
        torch.save((x, network(x).detach()), "{tmp_path}/answer.pt")
    """)
    subprocess.run([sys.executable, "-c", textwrap.dedent(LOAD), str(tmp_path)], check=True, cwd=tmp_path, timeout=600)


@pytest.mark.parametrize("name", ["dat_mini", "dgt_mini"])
def test_an_exported_model_takes_any_size(name):
    run(f"""
        network, Dim = model("{name}"), torch.export.Dim
        shapes = ({{0: Dim("batch"), 2: Dim("height", min=40, max=512), 3: Dim("width", min=40, max=512)}},)
        program = torch.export.export(network, (image(2, 72, 88),), dynamic_shapes=shapes).module()
        for shape in ((2, 72, 88), (1, 64, 64), (3, 45, 70), (1, 100, 64)):
            x = image(*shape)
            same(program(x), network(x))
    """)


@pytest.mark.parametrize("name", [*MODELS_OF_PAPERS, "swin_mini", "vit_mini"])
def test_an_onnx_file_takes_any_batch(name, tmp_path):
    """torch.onnx.export: onnxruntime answers as torch does."""
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    run(f"""
        import onnxruntime
        network = model("{name}")
        shapes = dict(x={{0: torch.export.Dim("batch", min=1, max=64)}})
        with dynattn.implementation("torch"):
            program = torch.onnx.export(network, (image(2, 32, 32),), dynamo=True, dynamic_shapes=shapes, verbose=False)
        program.save("{tmp_path}/program.onnx")
        session = onnxruntime.InferenceSession("{tmp_path}/program.onnx")
        for batch in (2, 1, 5):
            x = image(batch, 32, 32)
            (found,) = session.run(None, {{session.get_inputs()[0].name: x.numpy()}})
            torch.testing.assert_close(torch.from_numpy(found), network(x).detach(), rtol=5e-4, atol=1e-6)
    """)


@pytest.mark.parametrize("name", MODELS_OF_PAPERS)
def test_a_traced_model_takes_any_batch(name):
    """torch.jit.trace, saved and read again."""
    run(f"""
        network, file = model("{name}"), io.BytesIO()
        torch.jit.save(torch.jit.trace(network, image(2, 32, 32)), file)
        file.seek(0)
        traced = torch.jit.load(file)
        for batch in (2, 1, 5):
            x = image(batch, 32, 32)
            same(traced(x), network(x))
    """)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["dat_mini", "dgt_mini"])
def test_compiled_once_for_many_sizes(name, training):
    """torch.compile(dynamic=True): no new graph for another size, whether windows divide it or not.

    Torch itself makes another graph for one window where there were several, for one image, for sixteen or more, and
    where two sizes were equal at first, as the sides of a square image, or the batch and the heads.
    In training the second call of dynamic groups finds the sums that the first has started. The plain model is another
    one: what its dynamic groups count in training is a number that a graph is made for.
    """
    run(f"""
        import copy
        from torch._dynamo.testing import CompileCounterWithBackend
        network, counter = model("{name}").train({training}), CompileCounterWithBackend("aot_eager")
        plain = copy.deepcopy(network)
        compiled = torch.compile(network, backend=counter, fullgraph=True, dynamic=True)
        graphs = []
        with torch.set_grad_enabled({training}):
            for shape in ((5, 72, 88), (5, 64, 96), (3, 45, 70), (2, 64, 64), (4, 50, 34)):
                one = image(*shape).requires_grad_({training})
                other = one.detach().clone().requires_grad_({training})
                same(compiled(one), plain(other))
                if {training}:
                    compiled(one).square().sum().backward()
                    plain(other).square().sum().backward()
                    same(one.grad, other.grad)
                graphs.append(counter.frame_count)
        assert len(set(graphs)) == 1, graphs
    """)


def test_a_compiled_model_follows_the_switch():
    """A block is seen from inside the graph: the model is compiled again for it."""
    run("""
        network, x, forms = model("dgt_mini"), image(1, 32, 32), []
        def backend(graph, inputs):
            forms.append(any("dynattn" in str(node.target) for node in graph.graph.nodes))
            return graph
        compiled = torch.compile(network, backend=backend, fullgraph=True)
        with torch.no_grad():
            same(compiled(x), network(x))
            with dynattn.implementation("torch"):
                same(compiled(x), network(x))
            compiled(x)
        assert forms[:2] == [True, False] and False not in forms[2:], forms
    """)


def test_a_child_that_imports_the_kernels_after_a_fork():
    """Torch's threads are not the child's: it must not wait for them."""
    run("""
        import signal
        from dynattn import ops
        torch.set_num_threads(2)
        torch.rand(10**7).exp()  # starts torch's threads
        x, points = torch.randn(4, 40, 5, 5), torch.rand(4, 6, 2)
        assert "dynattn.kernels.sampling_numba" not in sys.modules
        child = os.fork()
        if child == 0:
            signal.alarm(600)
            out = ops.sample_points(x, points, impl="numba")
            os._exit(0 if out.isfinite().all() else 1)
        assert os.waitpid(child, 0)[1] == 0
    """)


def test_without_a_compiler_auto_is_torch():
    """NUMBA_DISABLE_JIT leaves numba installed and its kernels useless."""
    run(
        """
        network, x = model("dgt_mini"), image(1, 32, 32)
        expected = network(x)
        dynattn.use_implementation(network, "torch")
        same(network(x), expected)
        try:
            with dynattn.implementation("numba"):
                dynattn.use_implementation(network, "auto")(x)
        except ValueError as error:
            assert "NUMBA_DISABLE_JIT is set" in str(error), error
        else:
            raise AssertionError
        """,
        NUMBA_DISABLE_JIT="1",
    )


def test_compiled_code_is_kept_apart_for_every_width_of_registers(tmp_path):
    """Processors of several kinds may share a folder; numba's own key does not know what the kernels read of them."""
    program = """
        from llvmlite import binding
        features = binding.get_host_cpu_features()
        binding.get_host_cpu_features = lambda: {**features, "avx512f": WIDE}
        from dynattn import ops
        x, points = torch.randn(1, 3, 5, 5), torch.rand(1, 6, 2)
        same(ops.sample_points(x, points, impl="numba"), ops.sample_points(x, points))
        from dynattn.kernels import sampling_numba
        print(sum(sampling_numba.forward_items.stats.cache_hits.values()))
    """
    hits = [
        run(program.replace("WIDE", wide), NUMBA_CACHE_DIR=str(tmp_path), NUMBA_CPU_NAME="generic").strip()
        for wide in ("False", "True", "False", "True")
    ]
    assert hits == ["0", "0", "1", "1"]
    names = {path.name for path in tmp_path.rglob("*forward_items*.nbi")}
    assert len(names) == 2
