"""One hypothesis profile for all tests: machines here are shared, so that no single example has a deadline."""

from hypothesis import settings

settings.register_profile("shared", deadline=None)
settings.load_profile("shared")
