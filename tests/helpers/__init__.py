"""What several tests need."""

from pathlib import Path

TESTS = Path(__file__).parent.parent
