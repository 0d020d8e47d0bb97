"""What runs of several processes have in common with those whose clients are apart."""

from tests.test_apart import base  # noqa: F401, a fixture
