"""The server of programs, which tests/launch has too."""

from tests.launch.conftest import programs

__all__ = ["programs"]
