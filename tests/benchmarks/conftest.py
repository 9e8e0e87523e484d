"""All tests of this folder are slow: no promise of the README rests on them.

They use the fixture `programs` of tests/launch, one server that runs programs.
"""

import pathlib

import pytest

from tests.launch.conftest import programs

__all__ = ["programs"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  for item in items:
    if pathlib.Path(__file__).parent in item.path.parents:
      item.add_marker(pytest.mark.slow)
