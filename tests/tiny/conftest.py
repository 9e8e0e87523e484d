"""The fixture `programs` of tests/launch, which runs programs in one server."""

from tests.launch.conftest import programs

__all__ = ["programs"]
