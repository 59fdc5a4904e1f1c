"""What users of torch do with operations and models: choose a form, differentiate twice, map, run without numbers."""

import copy
import io
import pickle
import threading

import pytest
import torch
from helpers import DOUBLE, normal, somewhere

import dynattn
from dynattn import core, ops
from dynattn.kernels import operators
from dynattn.mechanisms import dynamic_group

pytestmark = pytest.mark.usefixtures("unchecked")

GROUPS = torch.tensor([[[0, 1, 2, 0], [1, 1, 0, 2]]])
SELECTED = torch.tensor([[[[0, 2], [1, 3], [2, 4]], [[3, 4], [0, 1], [1, 2]]]])
ROUTES = torch.tensor([[[0, 2], [1, 2]]])
TINY = dict(img_size=32, num_classes=3, drop_path_rate=0.0)
DAT = TINY | dict(dims=(8, 16), depths=(2, 2), heads=(2, 2), groups=(1, 2), deformable_stages=(2,), window=4)
DGT = TINY | dict(dims=(8, 16), depths=(1, 1), heads=(2, 2), groups=3, keys=5, head_dim=8)


def model(name: str, **options) -> torch.nn.Module:
    """A model of a few hundred parameters in float64; DGT's with two stages, the second dense."""
    sizes = DAT | dict(strides=(2, 1), kernels=(3, 3)) if name == "dat_mini" else DGT
    return dynattn.create_model(name, **(sizes | options)).double().eval()


def grouped(q, k, v, impl="auto"):
    return ops.grouped_attention(q, k, v, GROUPS, SELECTED, impl=impl)


def cases() -> dict:
    """Every operation with a kernel, as a function of floating tensors and `impl`, and such tensors."""
    q, k, v = normal(1, 2, 4, 3), normal(1, 2, 5, 3), normal(1, 2, 5, 3)
    routed = lambda q, k, v, impl: ops.routed_attention(q, k, v, ROUTES, impl=impl)  # noqa: E731
    deform = lambda *tensors, impl: ops.deformable_attention(*tensors, (2, 2), impl=impl)  # noqa: E731
    sample = lambda x, points, impl: ops.sample_points(x, points, impl=impl)  # noqa: E731
    return {
        "grouped_attention": (grouped, [q, k, v]),
        "routed_attention": (routed, [normal(1, 2, 2, 2, 3), normal(1, 2, 3, 2, 3), normal(1, 2, 3, 2, 3)]),
        "deformable_attention": (deform, [q, k, v, somewhere(1, 1, 5), normal(2, 3, 3)]),
        "sample_points": (sample, [normal(1, 2, 3, 4), somewhere(1, 5)]),
    }


OPERATIONS = ("grouped_attention", "routed_attention", "deformable_attention", "sample_points")


@pytest.fixture
def used(monkeypatch) -> list:
    """The forms that run, as they run."""
    names = []
    tables = [operation.forms for operation in core.OPERATIONS.values()]
    for table in (*tables, dynamic_group.ASSIGN, dynamic_group.SELECT):
        for name, form in list(table.items()):
            monkeypatch.setitem(table, name, lambda *a, name=name, form=form: names.append(name) or form(*a))
    return names


# ---------------------------------------------------------------------------------------------------------- the switch


@pytest.mark.parametrize("form", ["torch", "loops", "numba"])
@pytest.mark.parametrize("name", ["dat_mini", "dgt_mini"])
def test_a_block_decides_for_all_operations_inside(name, form, used):
    """Of a model as well; what has no kernel at all takes its torch form."""
    network, x = model(name), torch.rand(1, 3, 16, 16, dtype=DOUBLE)
    expected = network(x)
    used.clear()
    with dynattn.implementation(form):
        torch.testing.assert_close(network(x), expected)
    assert set(used) == ({form, "torch"} if form == "numba" else {form})
    used.clear()
    assert network(x) is not None and "loops" not in used


def test_blocks_are_nested_and_end(used):
    q = normal(1, 2, 5, 3)
    with dynattn.implementation("loops"):
        with dynattn.implementation("torch"):
            ops.dense_attention(q, q, q)
        with dynattn.implementation("auto"):
            ops.dense_attention(q, q, q)
        ops.dense_attention(q, q, q)
        ops.dense_attention(q, q, q, impl="torch")  # what a call says counts
        with pytest.raises(KeyError), dynattn.implementation("torch"):
            raise KeyError
        ops.dense_attention(q, q, q)
    ops.dense_attention(q, q, q)
    assert used == ["torch", "torch", "loops", "torch", "loops", "torch"]


def test_a_block_is_one_thread_s(used):
    q, entered, done = normal(1, 2, 5, 3), threading.Event(), threading.Event()

    def other():
        with dynattn.implementation("loops"):
            entered.set()
            done.wait()

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait()
    ops.dense_attention(q, q, q)
    done.set()
    thread.join()
    assert used == ["torch"]


def test_a_block_that_cannot_be_followed_says_why(monkeypatch):
    with pytest.raises(ValueError, match="implementation: expected one of 'auto', 'loops', .* got 'fast'"):
        dynattn.implementation("fast").__enter__()
    q = torch.empty(1, 2, 4, 3, device="meta")
    k = torch.empty(1, 2, 5, 3, device="meta")
    indices = GROUPS.to("meta"), SELECTED.to("meta")
    with dynattn.implementation("numba"):
        with pytest.raises(ValueError, match=r"implementation\('numba'\) cannot run grouped_attention .* on meta"):
            ops.grouped_attention(q, k, k, *indices)
        assert ops.dense_attention(q, k, k).shape == q.shape  # has no kernel
    monkeypatch.setitem(operators.INSTALLED, "numba", False)
    with dynattn.implementation("numba"), pytest.raises(ValueError, match="numba is not installed"):
        grouped(normal(1, 2, 4, 3), normal(1, 2, 5, 3), normal(1, 2, 5, 3))


@pytest.mark.parametrize("name", ["dat_mini", "dgt_mini"])
def test_a_model_keeps_its_choice(name, used):
    """In copies, pickles and files; its state dict does not know it, and a block does not change it."""
    network, x = model(name), torch.rand(1, 3, 16, 16, dtype=DOUBLE)
    expected, state = network(x), network.state_dict()
    assert dynattn.use_implementation(network, "loops") is network
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    network.load_state_dict(state)
    for one in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network)), loaded):
        used.clear()
        with dynattn.implementation("torch"):
            torch.testing.assert_close(one(x), expected)
        assert set(used) == {"loops"}
    assert network.state_dict().keys() == state.keys()
    dynattn.use_implementation(network, "numba")
    used.clear()
    torch.testing.assert_close(network(x), expected)
    assert "numba" in used and "loops" not in used
    dynattn.use_implementation(network, "auto")
    with dynattn.implementation("loops"):
        used.clear()
        network(x)
    assert set(used) == {"loops"}


def test_a_model_s_choice_is_checked():
    with pytest.raises(ValueError, match="implementation: expected one of"):
        dynattn.use_implementation(model("dgt_mini"), "fast")
    with pytest.raises(ValueError, match="model: expected one with attention layers of dynattn, got Linear"):
        dynattn.use_implementation(torch.nn.Linear(2, 2), "torch")


def test_a_kernel_that_is_installed_but_broken_is_not_chosen(monkeypatch):
    """By "auto"; who asks for it is told why."""
    monkeypatch.setattr(operators, "_BROKEN", {})
    monkeypatch.setitem(operators.FOUNDATIONS, "numba", "dynattn.no_such_module")
    function, tensors = cases()["grouped_attention"]
    torch.testing.assert_close(function(*tensors, impl="auto"), function(*tensors, impl="torch"))
    with pytest.raises(ValueError, match="numba is installed, but does not work: No module named"):
        function(*tensors, impl="numba")


# ------------------------------------------------------------------------------------------------- second derivatives


@pytest.mark.parametrize("impl", ["torch", "numba"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_second_derivatives(operation, impl):
    """By finite differences of the first ones."""
    function, tensors = cases()[operation]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradgradcheck(lambda *x: function(*x, impl=impl), leaves, fast_mode=True)


def test_second_derivatives_of_dense_attention():
    """Also where one tensor is queries, keys and values; torch's fused form takes a bias only if it has no slope."""
    q, bias = normal(1, 2, 4, 3).requires_grad_(), normal(2, 4, 4)
    for added in (None, bias, bias.requires_grad_()):
        function = lambda q: ops.dense_attention(q, q.sin(), q, bias=added)  # noqa: B023, E731
        assert torch.autograd.gradgradcheck(function, [q], fast_mode=True)


def test_first_derivatives_stay_the_kernel_s(monkeypatch):
    """The plain form is for second ones only."""
    monkeypatch.setattr(operators, "_PLAIN", {})
    function, tensors = cases()["grouped_attention"]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(function(*leaves, impl="numba").sum(), leaves))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", ["dat_mini", "dgt_mini"])
def test_a_gradient_penalty(name, batch, used):
    """Whatever the batch, with "auto": equal to that of the torch form throughout."""
    network, x = model(name), torch.rand(batch, 3, 16, 16, dtype=DOUBLE, requires_grad=True)
    if name == "dat_mini":
        dynattn.use_implementation(network, "numba")  # it would not pay at this size

    def slopes():
        network.zero_grad()
        (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        return {key: p.grad.clone() for key, p in network.named_parameters() if p.grad is not None}

    found = slopes()
    assert "numba" in used
    dynattn.use_implementation(network, "torch")
    for key, expected in slopes().items():
        torch.testing.assert_close(found[key], expected)


# --------------------------------------------------------------------------------------------------------- torch.func


@pytest.mark.parametrize("impl", ["torch", "numba"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_vmap_and_grad(operation, impl):
    """Of every combination of what is mapped and what is not: the same as one call after another."""
    function, tensors = cases()[operation]
    loss = lambda *x: function(*x, impl=impl).square().sum()  # noqa: E731
    every = tuple(range(len(tensors)))
    several = [torch.stack([x, 0.9 * x, 0.5 * x]) for x in tensors]
    for dims in ([0] * len(tensors), [0] + [None] * (len(tensors) - 1), [None] * (len(tensors) - 1) + [0]):
        given = [x if dim == 0 else x[0] for x, dim in zip(several, dims, strict=True)]
        calls = [[x[i] if dim == 0 else x for x, dim in zip(given, dims, strict=True)] for i in range(3)]
        torch.testing.assert_close(torch.vmap(loss, tuple(dims))(*given), torch.stack([loss(*call) for call in calls]))
        found = torch.vmap(torch.func.grad(loss, every), tuple(dims))(*given)
        for i, call in enumerate(calls):
            leaves = [x.clone().requires_grad_() for x in call]
            for one, other in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
                torch.testing.assert_close(one[i], other)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_hessians(operation):
    """By every way of torch.func and of torch.autograd.functional, "auto" and the kernel."""
    function, (x, *others) = cases()[operation]
    loss = lambda x, impl="numba": function(x, *others, impl=impl).square().sum()  # noqa: E731
    expected = torch.autograd.functional.hessian(lambda x: loss(x, "torch"), x)
    if operation != "sample_points":  # torch's grid_sample has no forward mode of its backward
        torch.testing.assert_close(torch.func.hessian(lambda x: loss(x, "auto"))(x), expected)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(loss))(x), expected)
    for vectorize in (False, True):
        found = torch.autograd.functional.hessian(loss, x, vectorize=vectorize)
        torch.testing.assert_close(found, expected)


def test_mapped_indices_are_checked():
    """All of a batch, before memory is read."""
    q, k = normal(3, 1, 2, 4, 3), normal(1, 2, 5, 3)
    attend = lambda q, groups, selected: ops.grouped_attention(q, k, k, groups, selected)  # noqa: E731
    groups, selected = torch.stack([GROUPS] * 3), torch.stack([SELECTED] * 3)
    assert torch.vmap(attend)(q, groups, selected).shape == q.shape
    with pytest.raises(ValueError, match="groups: expected values from 0 to 2, got 3"):
        torch.vmap(attend)(q, groups + torch.tensor([0, 0, 1]).reshape(3, 1, 1, 1), selected)
    with pytest.raises(ValueError, match="selected: expected distinct keys in every group, got one twice"):
        torch.vmap(attend)(q, groups, selected * torch.tensor([1, 1, 0]).reshape(3, 1, 1, 1, 1))


@pytest.mark.parametrize("name", ["dat_mini", "dgt_mini"])
def test_per_sample_gradients(name):
    """Through a whole model with kernels, by vmap of grad of functional_call."""
    network, x = model(name), torch.rand(3, 3, 16, 16, dtype=DOUBLE)
    if name == "dat_mini":
        dynattn.use_implementation(network, "numba")
    parameters = {key: p.detach() for key, p in network.named_parameters()}
    loss = lambda p, x: torch.func.functional_call(network, p, (x[None],)).square().sum()  # noqa: E731
    found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        network.zero_grad()
        network(x[i : i + 1]).square().sum().backward()
        for key, p in network.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(found[key][i], p.grad)


def test_transforms_add_nothing_to_the_sums():
    """Centroids of a layer in training: a mapped forward pass is none of training."""
    layer = dynamic_group.DynamicGroupAttention(8, 2, 3, 4).double().train()
    torch.func.grad(lambda x: layer(x).sum())(normal(1, 3, 3, 8))
    assert layer.sums is None
    layer(normal(1, 3, 3, 8))
    assert layer.counts.sum() == 2 * 9


# ---------------------------------------------------------------------------------------------------- without numbers


MINIS = [
    "dat_mini",
    "dgt_mini",
    "swin_mini",
    "vit_mini",
    "biformer_mini",
    "debiformer_mini",
    "sgformer_mini",
    "hlg_mini",
]


@pytest.mark.parametrize("name", MINIS)
def test_the_meta_device(name):
    with torch.device("meta"):
        network = dynattn.create_model(name)
    assert network(torch.empty(2, 3, 128, 128, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("name", ["sgformer_mini", "debiformer_mini", "hlg_mini", "setr_pup_hlg_mini"])
@torch.no_grad()
def test_nobody_overwrites_what_a_hook_holds(name):
    """Of every layer: what it put out is the same after the forward pass, without gradients too."""
    model, held = dynattn.create_model(name).eval(), []
    for layer in model.modules():
        layer.register_forward_hook(
            lambda layer, _, out: held.append((layer, out, out.clone())) if isinstance(out, torch.Tensor) else None
        )
    model(torch.randn(1, 3, 64, 64))
    assert len(held) > 50 and all(torch.equal(out, then) for _, out, then in held)
