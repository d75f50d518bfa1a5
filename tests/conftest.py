"""What all tests have in common."""

import gc

from hypothesis import settings

# A deadline for each example fails on a busy machine. What must be fast is measured by itself.
settings.register_profile("mail", deadline=None)
settings.load_profile("mail")


def pytest_collection_finish() -> None:
    """What is loaded by now stays: the garbage collector need not look through it again."""
    gc.collect()
    gc.freeze()
