"""What each code of a finding means, what it rests on, and what helps."""

_TEXTS = {
    "non-finite": """
A norm is NaN or infinite, of the gradients, the updates or the parameters.

Criterion: any such norm, at any step, warm-up and short runs included. The first step
decides which parts are named. It is an error, or a warning where the updates of all
such steps stayed finite: then a clip with nonfinite="zero", skip_step or
optax.apply_if_finite kept them out. Nothing is floored or dropped before it is looked
at. Where the norm grew more than tenfold in the six steps before, that is told.
Grounds: every large trainer checks for this; a NaN in the parameters stays.

What helps:
- after growth: a lower learning rate or a warm-up. A clip only delays it.
- in a few parts: run that batch again with jax.config.update("jax_debug_nans", True),
  and look for softmax, sqrt, log or a norm at 0 in the backward pass.
- with a dynamic loss scale a few such steps are how it works: use the rule
  nonfinite(tolerated=0.01).
""",
    "exploding": """
The gradient norm has grown for long, and still grows.

Criterion: the median of the last quarter of the steps (20 at least) is more than 10
times that of the first quarter after the warm-up, and more than 1.5 times that of the
quarter before. Both together tell growth from a spike and from a new level.
Grounds: Pascanu, Mikolov and Bengio, 2013, and Goodfellow, Bengio and Courville, 2016,
section 10.11, for what it is; the factors are this library's own.

It looks at gradients of weights. An explosion of activations alone, in a linear
network for instance, need not show in them.

What helps: a lower learning rate; a clip at about the 90th percentile of the calm
part; in a recurrent network an orthogonal initialization.
""",
    "spike": """
The norm of all gradients, or of all updates, stood out for a few steps.

Criterion: with m and d the median and the median absolute deviation of the logarithm
of the last 128 norms (20 at least), log(norm) - m is more than 6 times 1.4826 d (0.05
at least), and the norm is more than 3 times its running median, in at most 10 steps in
a row. Spikes less than 16 steps apart are one and its aftershocks; one of gradients
and of updates at the same time is one. One that ends in a NaN is told as non-finite.
More than 5 are told as one finding. The part that is named has the largest share of
the square of the norm, if that is 10 % at least.
Grounds: 128 rows and 6 sigma are the rule of OLMo-core, Levanter and MaxText.
Logarithms, since norms are positive and vary by factors; a median, so that one spike
cannot hide the next. Spikes of the update norm can precede those of the gradient and
of the loss.

What helps: a clip; skip_step; where the loss does not recover, a restart about 100
steps back past these batches (PaLM, section 5.1); for updates alone a lower b2.
""",
    "vanishing": """
The gradient becomes smaller and smaller toward the input.

Criterion: over the last 128 steps, the median RMS of the gradient of each matrix, in
the order of the network, rises with depth (Spearman above 0.8) and a straight line
through its logarithms falls by more than 3 decades from output to input. At least 4
matrices with a gradient. Where the sizes of the parts are unknown, norms are taken.
Grounds: a sigmoid multiplies by 1/4 at most in each layer (Glorot and Bengio, 2010);
3 decades are this library's own.

What helps: residual connections, normalization, ReLU or GELU with He initialization.
Adam evens out the scale, so that the harm is less there.
""",
    "below-eps": """
Gradients are so small that the eps of Adam outweighs them.

Criterion: the median RMS of the gradient of a part over the last 128 steps is not 0
and below 10 times eps. A record does not hold eps: add the rule below_eps(eps).
Grounds: Wortsman et al., 2023, section 3.4, and Molybog et al., 2023: where the
gradient comes near eps, updates shrink and training stalls or spikes.

What helps: a smaller eps, such as 1e-15; a loss of a larger scale.
""",
    "dead": """
The gradient of a part is exactly 0, step after step.

Criterion: exactly 0 in 50 recorded steps in a row, warm-up included, in which some
other part has a gradient; or in every recorded step, of which there are at least 10.
Or no part has a gradient in 50 steps in a row. Parts that died within 16 steps of one
another are one finding.
Grounds: a ReLU that is off for all inputs passes nothing back (Maas et al., 2013).
The same is seen of parameters that the loss does not use, behind a stop_gradient, of
experts that are not chosen, and where float16 underflows.

What helps: check that the part is called; a leaky activation, a lower learning rate,
a loss scale in float16. What is frozen on purpose can be left out by ignore=.
""",
    "frozen": """
A part has a gradient, but its update is exactly 0.

Criterion: no update in the last 128 steps (20 at least), and a gradient in some.
Grounds: a mask, a label of multi_transform, a learning rate of 0; or, where nothing
moves, gradients that are accumulated over more steps than that.

What helps: nothing, if it is meant to be so: leave it out by ignore=.
""",
    "imbalance": """
One part alone makes up the global norm.

Criterion: in more than 80 % of the last 128 steps one of at least 4 parts that have a
gradient has more than 90 % of the squared gradient norm.
Grounds: a clip of the global norm then scales all parts by what one of them does. The
shares are this library's own; that ratios of layers differ by orders of magnitude is
what LARS, AGC and AdaGC start from.

What helps: a clip of its own for each part or group (clip_by_leaf_norm,
clip_by_group_norm, adaptive_grad_clip); a smaller scale of that part or its input.
""",
    "ratio-high": """
Updates are large beside the parameters.

Criterion: the norm of the update over that of the parameter, its median over the
matrices that move and over 50 steps, is above 0.1 in some window after the warm-up
(warning) or above 0.03 (info). At most 200 windows, evenly spread, are looked at.
Grounds: about 1e-3 is the rule of thumb (CS231n), 1e-2 that of Bottou and of
Goodfellow et al. It is a hint: with Adam at a far too large rate the weights inflate
at once, and the ratio looks healthy again; see param-growth.

What helps: a lower learning rate, a longer warm-up.
""",
    "ratio-low": """
Updates are nothing beside the parameters.

Criterion: the norm of the update over that of the parameter, its median over the
matrices that move and over 50 steps, was below 1e-5 in all windows after the warm-up,
and its median over the last 128 steps is so in at least half of these matrices. Where
it was larger earlier, a schedule has come to its end, and nothing is told.
Grounds: 0.001 % is what Goodfellow et al. call too little.

What helps: a higher learning rate.
""",
    "clip-always": """
A clip is on in most steps.

Criterion: after the warm-up more than 50 % of the steps are clipped, in the first half
of at least 100 recorded steps and in the second; of the norms, where the clip has many
parts. Where the limit moves it is an info: a rule that follows
the norms may mean it, as AutoClip at its 10th percentile does. A clip that also
enlarges normalizes on purpose, and is passed over.
Grounds: the Deep Learning Tuning Playbook calls more than 50 % extremely aggressive,
and starts from the 90th percentile of the norms.

What helps: a limit at the 90th percentile, which the finding names; or a lower
learning rate.
""",
    "clip-never": """
A clip never did anything.

Criterion: in at least 200 steps after the warm-up none was clipped, and the largest
norm is below half of the limit at every step.
Grounds: then it is a safety net only; the 99.9th percentile says how far away.

What helps: nothing has to be done.
""",
    "param-growth": """
The parameters grow fast.

Criterion: the norm of all parameters becomes more than 3 times as large within 300
steps, warm-up included; more than 100 times is a warning, since a run that diverged
and stayed finite shows only here. Parameters that begin at 0 say nothing.
Grounds: a far too large rate of Adam shows here, and not in ratio-high: the weights
inflate at once. The factor is this library's own.

What helps: a lower learning rate, weight decay.
""",
}

#: The codes of all findings that this package can make.
CODES = tuple(_TEXTS)


def explain(code: str) -> str:
    """Says what a code means: its criterion, the grounds of its numbers, what helps.

    Args:
      code: One of `CODES`.

    Raises:
      ValueError: If there is no such code.

    Example:
      >>> print(explain("frozen").splitlines()[0])
      A part has a gradient, but its update is exactly 0.
    """
    if code not in _TEXTS:
        raise ValueError(
            f"`explain(code={code!r})`: there is no such code. The codes are"
            f" {', '.join(CODES)}."
        )
    return _TEXTS[code].strip()


__all__ = ["CODES", "explain"]
