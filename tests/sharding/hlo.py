"""What a compiled program does between devices, read from its text."""

import re

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "reduce-scatter",
)
_CALL = re.compile(r" (" + "|".join(COLLECTIVES) + r")(?:-start)?\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", re.MULTILINE)


def compiled_text(fun, *args):
    """Returns the optimized program of a jitted function."""
    return fun.lower(*args).compile().as_text()


def collectives(text):
    """Returns how many collectives of each kind a program holds."""
    found = _CALL.findall(text)
    return {kind: found.count(kind) for kind in COLLECTIVES if kind in found}


def collectives_under_a_condition(text):
    """Returns the collectives that only some branch of a conditional runs."""
    bodies = _computations(text)
    pending = []
    for line in text.splitlines():
        if " conditional(" in line:
            pending += _called(line)
    seen = set()
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += _called(bodies[name])
    return [call for name in seen for call in _CALL.findall(bodies[name])]


def reducers(text):
    """Returns the operations by which the all-reduces of a program join values."""
    bodies = _computations(text)
    joined = []
    for line in text.splitlines():
        if re.search(r" all-reduce(?:-start)?\(", line):
            body = bodies[re.search(r"to_apply=%?([\w.\-]+)", line)[1]]
            joined.append(re.search(r"ROOT .*? (\w+)\(", body)[1])
    return sorted(joined)


def _computations(text):
    """Returns the lines of each computation by its name."""
    heads = list(_HEAD.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return {
        head[1]: text[head.end() : end] for head, end in zip(heads, ends, strict=True)
    }


def _called(text):
    """Returns the computations that are named in some lines."""
    names = _CALLED.findall(text)
    for branches in _BRANCHES.findall(text):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    return names
