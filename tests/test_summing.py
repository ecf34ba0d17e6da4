"""Clipped sums are those of a loop that clips each example and adds it."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradnorm_jax as gn
from gradnorm_jax import shrink, thresholds

from .ghost.agreement import taking
from .ghost.oracle import QUICKLY, widened

B = 7
WAYS = ("one_pass", "two_pass", "vmap")
EVERYONE = np.ones(B, bool)
jit = functools.partial(jax.jit, compiler_options=QUICKLY)


def dense(params, example):
    h = jnp.tanh(example["x"] @ params["w"] + params["b"])
    return 0.5 * example["size"] * jnp.sum(jnp.square(h @ params["v"] - 1))


def tied(params, example):
    h = jnp.tanh(params["table"][example["ids"]] @ params["w"])
    logits = jax.nn.log_softmax(h @ params["table"].T)
    return -example["size"] * jnp.sum(logits[:, 0] + logits[:, 2])


def scan(params, example):
    layer = lambda x, own: (x + jnp.tanh(x @ own["w"] + own["b"]), None)  # noqa: E731
    layers = {"b": params["b"], "w": params["w"]}
    x, _ = jax.lax.scan(layer, example["x"], layers)
    return 0.5 * example["size"] * jnp.sum(jnp.square(x @ params["v"]))


def conv(params, example):
    x, numbers = example["x"][None], ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(
        x, params["w"], (2, 1), "SAME", dimension_numbers=numbers
    )
    h = jnp.sum(jnp.tanh(h[0] + params["b"]), (0, 1))
    return example["size"] * jnp.sum(jnp.square(h @ params["v"]))


def constant(params, example):
    """Has gradients that are the same for all, and one divided by inputs."""
    x = example["x"]
    h = jnp.tanh(x @ (params["w"] / x[0][:, None]))
    return example["size"] * jnp.sum(h) + params["b"][1] + jnp.sum(params["c"] ** 2)


# A loss, its parameters, one input, and the group of each parameter.
MODELS = {
    "dense": (dense, {"b": (5,), "v": (5, 2), "w": (4, 5)}, (3, 4), "xyx"),
    "tied": (tied, {"table": (6, 4), "w": (4, 4)}, (5,), ("x", "x")),
    "scan": (scan, {"b": (3, 4), "v": (4, 2), "w": (3, 4, 4)}, (2, 4), "xyx"),
    "conv": (conv, {"b": (3,), "v": (3, 2), "w": (3, 2, 2, 3)}, (5, 4, 2), "xxy"),
    "constant": (constant, {"b": (3,), "c": (B,), "w": (4, 5)}, (3, 4), "xyx"),
}


def drawn(name, seed=0, spread=1.0):
    """Parameters, and examples whose gradients differ in size by powers of ten."""
    _, shapes, inputs, _ = MODELS[name]
    normal = np.random.default_rng(seed).normal
    params = {leaf: np.float32(0.5 * normal(size=x)) for leaf, x in shapes.items()}
    x = np.float32(normal(size=(B, *inputs)))
    inputs = {"ids": np.int32(np.abs(3 * x)) % 6} if name == "tied" else {"x": x}
    return params, inputs | {"size": np.float32(10 ** (spread * normal(size=B)))}


def poisoned(batch, bad):
    """Puts numbers that are not finite into all floats of some examples."""
    batch = {name: np.array(x) for name, x in batch.items()}
    for x in batch.values():
        for i, value in bad.items():
            x[i] = value if x.dtype == np.float32 else x[i]
    return batch


@functools.cache
def truth(name):
    """Values, and the gradients of each example, in float64."""
    with jax.enable_x64(True):
        each = jax.vmap(jax.value_and_grad(MODELS[name][0]), (None, 0))
        found = jit(each)(*jax.tree.map(widened, drawn(name)))
        return jax.tree.map(np.asarray, found)


def belongs(name, kind):
    """Which leaf enters and is scaled by which part, as ones in a matrix."""
    _, leaves, _, groups = MODELS[name]
    labels = {"whole_tree": [0] * len(leaves), "per_leaf": leaves, "per_group": groups}
    parts = list(dict.fromkeys(labels[kind]))
    return np.array([[float(own == part) for part in parts] for own in labels[kind]])


def norms_by_hand(name, kind="whole_tree"):
    leaves = truth(name)[1].values()
    squares = np.stack([np.sum(x.reshape(B, -1) ** 2, axis=1) for x in leaves], 1)
    return np.sqrt(squares @ belongs(name, kind))


def sum_by_hand(name, scales, kind="whole_tree", added=range(B)):
    """Multiplies the gradient of each example part by part, and adds it."""
    factors = scales @ belongs(name, kind).T
    total = {leaf: np.zeros(x.shape[1:]) for leaf, x in truth(name)[1].items()}
    for i in added:
        for k, (leaf, x) in enumerate(truth(name)[1].items()):
            total[leaf] += factors[i, k] * x[i]
    return total


@functools.cache
def clipped(
    name,
    kind="whole_tree",
    way="one_pass",
    microbatch_size=None,
    rule="by shape",
    **how,
):
    """Returns a compiled function of parameters, batch, limit and mask."""
    loss_fn, leaves, _, groups = MODELS[name]
    labels = [dict(zip(leaves, groups, strict=True)).get] * (kind == "per_group")
    how |= {"granularity": getattr(gn, kind)(*labels), "implementation": way}
    how |= {"microbatch_size": microbatch_size}

    def run(params, batch, limit, mask=EVERYONE):
        with taking(rule):
            compute = gn.clipped_grad(loss_fn, limit, **how)
            return compute(params, batch, example_mask=mask)

    return jit(run)


def close(ours, theirs, rtol=1e-5):
    for x, y in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.max(np.abs(y)))


each_way = pytest.mark.parametrize("way", WAYS)
IN_PARTS = [("per_leaf", "one_pass"), ("per_group", "one_pass")]
CASES = [
    (name, kind, way, size, "by shape")
    for name, formed in zip(MODELS, ["per_leaf", "per_group"] * 3, strict=False)
    for size in (None, 3)
    for kind, way in [
        *(("whole_tree", way) for way in WAYS),
        *IN_PARTS,
        (formed, WAYS[2]),
    ]
    if size is None or (kind, way) == ("whole_tree", "one_pass")
]
CASES += [
    (name, "whole_tree", "one_pass", None, rule)
    for name in MODELS
    for rule in ("gram", "product in turn")
]


@pytest.mark.parametrize(("name", "kind", "way", "microbatch_size", "rule"), CASES)
def test_a_clipped_sum_is_that_of_a_loop(name, kind, way, microbatch_size, rule):
    run = clipped(name, kind, way, microbatch_size, rule)
    (params, batch), norms = drawn(name), norms_by_hand(name, kind)
    limits = np.float32(1.01 * np.median(norms, axis=0))
    scales = np.minimum(1, limits / norms)
    shape = (B,) if kind == "whole_tree" else norms.shape
    limit = limits.reshape(shape[1:])

    found = run(params, batch, limit)
    close(found.grads, sum_by_hand(name, scales, kind))
    close((found.norms, found.scales), (norms.reshape(shape), scales.reshape(shape)))
    close(found.values, truth(name)[0])
    smaller = np.any(norms > limits, axis=1)
    assert 0 < found.num_clipped == np.sum(smaller)
    assert found.num_dropped == 0

    mask, rest = np.arange(B) != 2, [0, 1, 3, 4]  # 2 is padding, whatever it holds
    batch = poisoned(batch, {2: np.nan, 5: np.inf, 6: np.nan})
    found = run(params, batch, limit, mask)
    close(found.grads, sum_by_hand(name, scales, kind, rest))
    close(np.asarray(found.scales)[rest], scales.reshape(shape)[rest])
    assert not np.any(np.asarray(found.scales)[[2, 5, 6]])
    assert (found.num_clipped, found.num_dropped) == (np.sum(smaller[rest]), 2)

    nobody = run(params, batch, limit, ~EVERYONE)
    chex.assert_trees_all_equal(nobody.grads, jax.tree.map(jnp.zeros_like, params))
    assert nobody.num_clipped == nobody.num_dropped == 0


@each_way
def test_a_mean_is_over_the_examples_that_are_there(way):
    run, (params, batch) = clipped("dense", way=way, reduce="mean"), drawn("dense")
    scales = np.minimum(1, 1 / norms_by_hand("dense"))
    batch = poisoned(batch, {4: np.nan})
    for absent in ([], [0, 4], [1, 2, 5], list(range(B))):
        mask = ~np.isin(np.arange(B), absent)
        total = sum_by_hand("dense", scales, added=set(range(B)) - {4, *absent})
        want = jax.tree.map(lambda x, m=mask: x / max(np.sum(m), 1), total)
        close(run(params, batch, 1.0, mask).grads, want)


def call(max_norm=1.0, loss_fn=jnp.dot, w=(1.0, 2.0), xs=None, **how):
    xs = np.ones((3, 2)) if xs is None else xs
    later = {k: how.pop(k) for k in ("example_mask", "clip_state") if k in how}
    fun = gn.clipped_grad(loss_fn, max_norm, **how)
    return fun(jnp.array(w), jax.tree.map(jnp.asarray, xs), **later)


linear = jit(call, static_argnames="implementation")


@each_way
@pytest.mark.parametrize(
    ("x", "limit", "here", "adds", "scale", "counts"),
    [
        ((0, 0), 0.25, True, (0, 0), 1, (1, 0)),
        ((0, 0), 0.0, True, (0, 0), 1, (1, 0)),
        ((30, 40), np.inf, True, (30, 40), 1, (0, 0)),
        ((30, 40), 0.0, True, (0, 0), 0, (2, 0)),
        ((3, 4), 1.0, True, (0.6, 0.8), 0.2, (1, 0)),
        ((0.3, 0.4), 1.0, True, (0.3, 0.4), 1, (0, 0)),
        ((3e30, 4e30), 1.0, True, (0.6, 0.8), 2e-31, (1, 0)),
        ((np.nan, 1), 1.0, True, (0, 0), 0, (0, 1)),
        ((-np.inf, 1), np.inf, True, (0, 0), 0, (0, 1)),
        ((np.nan, 1), 0.0, True, (0, 0), 0, (1, 1)),
        ((3, 4), 1.0, False, (0, 0), 0, (0, 0)),
        ((np.nan, np.inf), 1.0, False, (0, 0), 0, (0, 0)),
    ],
)
def test_what_an_example_adds_is_what_the_table_says(
    way, x, limit, here, adds, scale, counts
):
    other = np.array([0.3, -0.4], np.float32)
    xs = np.array([other, x], np.float32)
    mask = np.array([True, here])
    found = linear(limit, xs=xs, example_mask=mask, implementation=way)
    want = other * min(1, limit / 0.5) + adds
    np.testing.assert_allclose(found.grads, want, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(found.scales[1], scale, rtol=2e-6)
    assert (found.num_clipped, found.num_dropped) == counts


@pytest.mark.parametrize(
    ("rule", "way", "target"),
    [
        (shrink.normalize, "one_pass", lambda n, limit: np.full_like(n, limit)),
        (shrink.smooth, "two_pass", lambda n, limit: n * limit / (n + limit)),
    ],
)
def test_a_shrink_says_what_each_norm_becomes(rule, way, target):
    norms = norms_by_hand("dense")
    limit = np.float32(np.median(norms) * 1.01)
    found = clipped("dense", way=way, shrink=rule)(*drawn("dense"), limit)
    close(found.grads, sum_by_hand("dense", target(norms, limit) / norms))


@pytest.mark.parametrize("name", MODELS)
def test_one_example_more_moves_the_sum_by_at_most_the_limit(name):
    run, limit = clipped(name), 0.5
    for seed in range(5):
        args = (*drawn(name, seed, spread=3), limit)
        total, *others = jax.device_get(
            [run(*args, np.arange(B) != left_out).grads for left_out in range(-1, B)]
        )
        for rest in others:
            gaps = [np.float64(x) - rest[leaf] for leaf, x in total.items()]
            moved = math.sqrt(sum(np.sum(gap**2) for gap in gaps))
            assert moved <= limit * (1 + 1e-5)


@each_way
def test_sums_of_bfloat16_are_float32(way):
    params, batch = drawn("dense")
    half = {k: jnp.asarray(x, jnp.bfloat16) for k, x in params.items()}
    found = clipped("dense", way=way)(half, batch, 1.0)
    assert {x.dtype for x in (*found.grads.values(), found.norms)} == {np.dtype("f4")}
    wide = {k: np.asarray(x, np.float32) for k, x in half.items()}
    close(found.grads, clipped("dense", way=way)(wide, batch, 1.0).grads, rtol=0.03)


@each_way
def test_vmap_over_models_is_a_loop_over_models(way):
    run, (params, batch) = clipped("scan", way=way), drawn("scan")
    batch = poisoned(batch, {3: np.nan})
    models = [params, jax.tree.map(lambda p: -0.5 * p, params)]
    stacked = jax.tree.map(lambda *p: np.stack(p), *models)
    limits = np.array([0.5, 2], np.float32)
    found = jit(jax.vmap(run.__wrapped__, (0, None, 0)))(stacked, batch, limits)
    for i in range(2):
        want = run(models[i], batch, limits[i])
        own = jax.tree.map(lambda x, i=i: x[i], found)
        close((own.grads, own.norms[:3]), (want.grads, want.norms[:3]))
        assert (own.num_clipped, own.num_dropped) == (want.num_clipped, 1)


def test_a_function_of_the_step_rides_in_scan():
    fun = gn.clipped_grad(dense, lambda step: 0.5 / (1 + step))
    params, batch = drawn("dense")

    def step(state, _):
        found = fun(params, batch, clip_state=state)
        return found.clip_state, found.grads

    state, sums = jit(lambda x: jax.lax.scan(step, x, length=3))(fun.init(params))
    assert state.step == 3
    limits = np.array([0.5, 0.25, 0.5 / 3])[:, None, None]
    scales = np.minimum(1, limits / norms_by_hand("dense"))
    each = [sum_by_hand("dense", x) for x in scales]
    close(sums, jax.tree.map(lambda *x: np.stack(x), *each))


def following(kind):
    """Returns what a limit that follows the median of norms is of, and those norms."""
    rule = thresholds.quantile(0.5, rate=0.3, start=1.0)
    fun = gn.clipped_grad(dense, rule, granularity=getattr(gn, kind)())
    return fun, *drawn("dense"), norms_by_hand("dense", kind)


either = pytest.mark.parametrize("kind", ["whole_tree", "per_leaf"])


@either
def test_a_quantile_moves_by_the_share_of_norms_that_passed(kind):
    fun, params, batch, norms = following(kind)
    run = jit(lambda *args, mask: fun(*args[:2], clip_state=args[2], example_mask=mask))
    bad, state = poisoned(batch, {2: np.nan}), fun.init(params)
    limit, rest = np.ones(norms.shape[1]), [1, 3, 4, 5, 6]
    some = np.arange(B) != 0
    for given, mask, added in [(batch, EVERYONE, slice(B)), (bad, some, rest)]:
        found = run(params, given, state, mask=mask)
        scales = np.minimum(1, limit / norms)
        close(found.grads, sum_by_hand("dense", scales, kind, np.arange(B)[added]))
        share = np.mean(norms[added] <= limit, axis=0)
        limit, state = limit * np.exp(-0.3 * (share - 0.5)), found.clip_state
        close(np.reshape(state.memory.own, limit.shape), limit)


@either
def test_a_quantile_learns_nothing_from_nobody(kind):
    fun, params, batch, _ = following(kind)
    state = fun.init(params)
    found = jit(fun)(params, batch, clip_state=state, example_mask=~EVERYONE)
    chex.assert_trees_all_equal(found.clip_state.memory, state.memory)


@either
def test_a_quantile_of_one_batch_is_found(kind):
    fun, params, batch, norms = following(kind)

    def step(state, _):
        return fun(params, batch, clip_state=state).clip_state, None

    state, _ = jit(lambda x: jax.lax.scan(step, x, length=150))(fun.init(params))
    # Of 7 norms 3 are below the fourth, and 4 are not above it: it goes to and fro.
    gap = np.log(np.reshape(state.memory.own, -1) / np.median(norms, axis=0))
    assert np.all(np.abs(gap) <= 0.3 / 14 * 1.01)


def test_each_example_has_a_key_and_the_same_key_gives_the_same():
    def loss_fn(w, key, x, v):
        kept = jax.random.bernoulli(key, 0.5, (8,))
        return jnp.sum(jnp.square((x @ w) * kept)) + jnp.sum(v * x), kept

    how = {"argnums": (3, 0), "batch_argnums": 2, "key_argnum": 1, "has_aux": True}
    run = jit(gn.clipped_grad(loss_fn, np.inf, **how))
    random = np.random.default_rng(0)
    w, v, x = (np.float32(random.normal(size=s)) for s in ((4, 8), 4, (B, 4)))
    found = run(w, jax.random.key(0), x, v)
    assert len(np.unique(found.aux, axis=0)) > 1
    close(found.grads, (np.sum(x, 0), 2 * x.T @ ((x @ w) * found.aux)))
    close(found.values, np.sum(((x @ w) * found.aux) ** 2, 1) + x @ v)
    chex.assert_trees_all_equal(found, run(w, jax.random.key(0), x, v))
    assert np.any(run(w, jax.random.key(1), x, v).aux != found.aux)


def test_a_loss_of_a_batch_is_given_batches_of_one():
    def loss_fn(params, batch):
        chex.assert_shape(batch["size"], (1,))
        return jnp.mean(jax.vmap(dense, (None, 0))(params, batch))

    found = jit(gn.clipped_grad(loss_fn, 1.0, batched=True))(*drawn("dense"))
    close(found.grads, sum_by_hand("dense", np.minimum(1, 1 / norms_by_hand("dense"))))


BY_LEAF = {"implementation": "two_pass", "granularity": gn.per_leaf()}


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"max_norm": -1.0}, ValueError, r"clipped_grad\(max_norm=.*got -1.0"),
        ({"max_norm": thresholds.max_ema()}, ValueError, "max_norm=.*one norm"),
        ({"max_norm": lambda k: 1.0}, ValueError, r"clip_state=.*\.init\(params\)"),
        ({"max_norm": thresholds.quantile(0.5)}, ValueError, "clip_state=.*a rule"),
        ({"clip_state": ()}, TypeError, "clipped_grad.*SumState.*got a tuple"),
        ({"max_norm": np.ones(2)}, ValueError, r"limit must be one .*shape \(2,\)"),
        ({"example_mask": np.ones(4, bool)}, ValueError, "example_mask=.*3 booleans"),
        ({"example_mask": np.ones(3)}, ValueError, "example_mask=.*3 booleans"),
        ({"implementation": "ghost"}, ValueError, "implementation=.*got 'ghost'"),
        ({"reduce": "max"}, ValueError, "reduce=.*'sum', 'mean'.*got 'max'"),
        ({"microbatch_size": 0}, ValueError, "microbatch_size=.*at least 1, got 0"),
        ({"granularity": "leaf"}, TypeError, r"granularity=.*whole_tree.*got 'leaf'"),
        ({"shrink": shrink.spikes}, ValueError, r"shrink=spikes.*single entries"),
        ({"has_aux": True}, ValueError, r"one number.*and `aux`, got no pair"),
        ({"argnums": ()}, ValueError, r"argnums=\(\), batch_argnums=1.*at least one"),
        ({"shrink": 0.5}, TypeError, r"clipped_grad\(shrink=.*a Shrink.*got 0.5"),
        ({"argnums": 1}, ValueError, r"argnums=1, batch_argnums=1.*different"),
        ({"batch_argnums": 2}, TypeError, "at least 3 arguments by position, got 2"),
        ({"xs": (np.ones(3), np.ones(4))}, ValueError, r"shapes \[\(3,\), \(4,\)\]"),
        ({"loss_fn": jnp.multiply}, ValueError, r"must return one number.*got \(2,\)"),
        ({"loss_fn": 3}, TypeError, r"clipped_grad\(loss_fn\).*got 3"),
        ({"w": (1, 2)}, TypeError, "int32"),
        (BY_LEAF, ValueError, r"granularity=.*'two_pass'.*only `whole_tree\(\)`"),
    ],
)
def test_what_cannot_be_is_refused_by_name(how, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(functools.partial(call, **how))


@pytest.mark.parametrize(
    "granularity",
    [
        gn.per_group({"w": "x"}),
        gn.per_group({"w": "x", "b": "x"}, scaled={"w": "x"}),
    ],
)
def test_a_gradient_without_a_bound_of_its_own_is_refused(granularity):
    compute = gn.clipped_grad(lambda params, x: 0.0, 1.0, granularity=granularity)
    with pytest.raises(ValueError, match=r"granularity=.*'b' would be added without a"):
        compute.init({"b": jnp.ones(3), "w": jnp.ones(2)})
