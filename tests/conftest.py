"""What all tests have in common."""

from hypothesis import settings

# A deadline for each example fails on a busy machine. What must be fast is measured by itself.
settings.register_profile("mail", deadline=None)
settings.load_profile("mail")
