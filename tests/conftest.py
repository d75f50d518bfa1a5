"""What all tests have in common."""

import gc

from hypothesis import settings

# A deadline for each example fails on a busy machine. What must be fast is measured by itself.
settings.register_profile("mail", deadline=None)
settings.load_profile("mail")


def pytest_collection_finish() -> None:
    """What is loaded by now stays: the garbage collector need not look through it again, and seldom
    through what tests leave, which is little.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 10, 100)
