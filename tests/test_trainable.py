"""The graph that is trained: equal to what is deployed, gradients by closed form, results in their formats."""

from __future__ import annotations

import pytest
import torch
from small_llada import small_llada

from dlqc.compile import compile
from dlqc.compiled import Compiled
from dlqc.errors import FeasibilityError
from dlqc.execute import forward
from dlqc.trainable import IntegerSite, Trainable

VOCAB = 61
W2 = "quantize_weights(bits=2, group_size=8, method=rtn), pack, lower"
W4A4 = "quantize_weights(group_size=None, symmetric=True, method=rtn), quantize_activations(bits=4), pack, lower"
NF4 = "quantize_weights(method=rtn, format=nf4(block=16, scale_block=16)), lower"


def compiled(recipe: str) -> Compiled:
    return compile(small_llada(VOCAB), recipe, backend="reference", progress=False)


@pytest.fixture(scope="module")
def w2() -> Compiled:
    return compiled(W2)


@pytest.fixture(scope="module")
def w4a4() -> Compiled:
    return compiled(W4A4)


@pytest.fixture(scope="module")
def nf4() -> Compiled:
    return compiled(NF4)


@pytest.fixture(scope="module")
def p8() -> Compiled:
    return compiled(W2.replace("pack", "quantize_attention(probabilities=8, keys=None, values=None), pack"))


@pytest.fixture(scope="module", name="float")
def no_passes() -> Compiled:
    return compile(small_llada(VOCAB), (), backend="reference", progress=False)


def ids(rows: int = 3, length: int = 10) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "learn"), [(n, how) for n in ("w2", "w4a4") for how in ("codes", "scales", "lora")] + [("nf4", "lora")]
)
def test_it_computes_what_is_deployed(name: str, learn: str, request: pytest.FixtureRequest) -> None:
    model: Compiled = request.getfixturevalue(name)
    student = Trainable(model.graph, model.weights, learn, rank=2)  # type: ignore[arg-type]
    expected = forward(model.graph, model.weights, ids())
    assert torch.allclose(student(ids()), expected, atol=1e-5, rtol=1e-5)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.05 * torch.randn(p.shape, generator=rng)
            if learn == "lora":  # what factors are stored in, so that a rounding flips no code of an activation
                p.copy_(p.bfloat16())
        if learn == "codes":
            for site in student.integers.values():
                site.v += torch.randn(site.v.shape, generator=rng)
    found = student(ids())
    assert not torch.allclose(found, expected, atol=1e-3), "something was learned"
    graph, weights, bits = student.result()
    assert torch.allclose(forward(graph, weights, ids()), found, atol=1e-4, rtol=1e-4)
    corrections = sum(w.leaf.numel() for n, w in weights.items() if ".low_rank." in n)
    assert bits == 16 * corrections
    assert (corrections > 0) == (learn == "lora")
    again = forward(model.graph, model.weights, ids())
    assert torch.equal(again, expected), "the model that was given is as it was"


def test_a_head_that_is_the_embedding_stays() -> None:
    recipe = "quantize_embedding(bits=8), " + W2.replace("method=rtn", "method=rtn, head=8")
    model = compile(small_llada(VOCAB, tied=True), recipe, backend="reference", progress=False)
    student = Trainable(model.graph, model.weights, "codes")
    assert len(student.integers) == 15
    assert len(student.parameters()) == 2 * 14
    with torch.no_grad():
        for p in student.parameters():
            p += 0.3
    graph, weights, _ = student.result()
    assert torch.allclose(forward(graph, weights, ids()), student(ids()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("learn", ["codes", "scales"])
def test_gradients_of_a_site(w2: Compiled, learn: str) -> None:
    """d/dρ of Σ G·ŵ is Σ G·(q - z)·s within a group; d/dv is G·s inside of the range, nothing outside."""
    node = next(n for n in w2.graph.nodes if "linear_packed" in str(n.target))
    site = IntegerSite(node, w2.weights, learn)  # type: ignore[arg-type]
    with torch.no_grad():
        site.v[0, 0], site.v[0, 1] = -0.7, 3.4
    g = torch.randn(site.v.shape, generator=torch.Generator().manual_seed(0))
    (site.value() * g).sum().backward()
    q = site.v.detach().clamp(0, 3).round()
    groups = site.start.shape[1]
    s = site.start.float().unsqueeze(-1)
    expected = (g.reshape(len(g), groups, -1) * (q.reshape(len(g), groups, -1) - site.zero) * s).sum(-1)
    assert site.rho.grad is not None
    assert torch.allclose(site.rho.grad, expected, atol=1e-5)
    if learn == "scales":
        assert site.v.grad is None
        return
    inside = (g.reshape(len(g), groups, -1) * s).reshape(g.shape)
    inside[0, 0] = inside[0, 1] = 0
    assert site.v.grad is not None
    assert torch.allclose(site.v.grad, inside, atol=1e-6)


def test_gradients_reach_every_parameter(w4a4: Compiled) -> None:
    for learn in ("codes", "lora"):
        student = Trainable(w4a4.graph, w4a4.weights, learn, rank=2)  # type: ignore[arg-type]
        with torch.no_grad():
            for one in student.factors.values():
                one.left += 0.1
        student(ids()).square().sum().backward()
        parameters = student.parameters()
        assert len(parameters) == 2 * 14
        for p in parameters:
            assert p.grad is not None
            assert bool(p.grad.any())


def test_a_correction_that_is_there_is_learned_on() -> None:
    recipe = W2.replace("method=rtn", "method=rtn, low_rank=low_rank(rank=2, weighting='none', dtype='bfloat16')")
    model = compiled(recipe)
    student = Trainable(model.graph, model.weights, "lora", rank=4)
    assert torch.allclose(student(ids()), forward(model.graph, model.weights, ids()), atol=1e-5)
    assert {f.format.rank for f in student.factors.values()} == {2}, "its rank is its own"
    with torch.no_grad():
        for p in student.parameters():
            p *= 1.5
    graph, weights, bits = student.result()
    assert (bits, len(list(graph.nodes))) == (0, len(list(model.graph.nodes)))
    assert torch.allclose(forward(graph, weights, ids()), student(ids()), atol=0.05, rtol=0.05)
    frozen = Trainable(model.graph, model.weights, "scales")
    assert torch.allclose(frozen(ids()), forward(model.graph, model.weights, ids()), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("float", {}, "model: holds no quantized linear. Compile it with a recipe that quantizes, such as w2a16-gptq"),
        ("nf4", {"learn": "codes"}, "learn: 14 linears are no integers and have no codes to learn, "),
        ("w2", {"learn": "all"}, "learn: 'all' is unknown. Use 'codes', 'scales' or 'lora'"),
        ("w2", {"learn": "lora", "rank": 17}, "matrix has no rank of 17. Use a lower rank"),
        (
            "p8",
            {},
            "model: quantized attention probabilities have no gradient. Compile without -p, then fine-tune",
        ),
    ],
)
def test_what_cannot_be_trained(
    name: str, options: dict[str, object], message: str, request: pytest.FixtureRequest
) -> None:
    model: Compiled = request.getfixturevalue(name)
    with pytest.raises(FeasibilityError) as error:
        Trainable(model.graph, model.weights, **({"learn": "codes"} | options))  # type: ignore[arg-type]
    assert message in str(error.value)
