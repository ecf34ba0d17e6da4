"""What the tests of sharding share: meshes of every kind and every shape.

There are too many to run all at each change. The gate runs of each test its first case.
"""

import os

import pytest

from ..shares import leave_out
from . import meshes


def name_of(param):
    kind, shape = param
    return f"{kind}-{'x'.join(map(str, shape))}"


@pytest.fixture(
    params=[(kind, shape) for shape in meshes.SHAPES for kind in meshes.KINDS],
    ids=name_of,
)
def every_mesh(request):
    """A mesh with the axes "d" and "t", of each kind and of each shape."""
    return meshes.mesh_of(*request.param)


@pytest.fixture(
    params=[
        ("Auto", (4, 2)),
        ("Explicit", (3, 2)),
        ("Explicit", (8, 1)),
        ("Auto", (1, 1)),
    ],
    ids=name_of,
)
def mesh(request):
    """One of each shape, for what takes long to compile."""
    return meshes.mesh_of(*request.param)


@pytest.fixture(params=[("Auto", (4, 2)), ("Explicit", (3, 2))], ids=name_of)
def wide_mesh(request):
    """One of each kind that splits along both axes."""
    return meshes.mesh_of(*request.param)


def pytest_collection_modifyitems(config, items):
    """Leaves cases out, unless all are asked for."""
    here, seen = os.path.dirname(__file__), set()

    def is_chosen(item):
        test = item.nodeid.split("[")[0]
        is_first = test not in seen
        seen.add(test)
        return is_first or not str(item.path).startswith(here)

    leave_out(config, items, is_chosen)
